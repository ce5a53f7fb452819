"""model.py: masks, leaks, whitening, objectives, measures, decoder, checkpoints."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
import try_start
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import model as lib
from prepare import Corpus


def jepa(context='concepts', vocab=400):
    torch.manual_seed(0)
    net = lib.JEPA(lib.JEPAConfig(vocab, n_layer=2, n_head=2, n_embd=32, predictor_layer=2, context=context)).eval()
    for block in (*net.encoder.blocks, *net.predictor.blocks):  # away from the start, at which branches are zero
        torch.nn.init.normal_(block.proj.weight, std=0.08)
        torch.nn.init.normal_(block.down.weight, std=0.05)
    net.target.load_state_dict(net.encoder.state_dict())
    return net


@pytest.fixture
def batch(corpus_dir):
    rows = Corpus(corpus_dir, 'train').batch(0, 3, 128, 12)
    return [torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document')]


def predict(net, tokens, sentence, document):
    return net.predict(tokens, sentence, document, net.masks(sentence, document)[1])


@pytest.mark.parametrize('view', ['sentence', 'context', 'causal'])
def test_masks_against_brute_force(batch, view):
    _, sentence, document = batch
    mod = {'sentence': lib.sentence_view(sentence, document), 'context': lib.context_view(sentence, document),
           'causal': lib.causal_view(sentence)}[view]
    mask = lib.build_mask(mod, sentence.shape, 'cpu')
    s, d = sentence.tolist(), document.tolist()
    for b in range(len(s)):
        for q in range(len(s[b])):
            for k in range(len(s[b])):
                i, j = s[b][q], s[b][k]
                of = [d[b][x] if x >= 0 else -1 for x in (i, j)]
                expected = {'sentence': i == j, 'context': of[0] == of[1] and j <= i, 'causal': i == j and k <= q}[view]
                assert mask[b, 0, q, k].item() == expected


@pytest.mark.parametrize('view', ['sentence', 'context'])
def test_both_attention_paths_agree(batch, view):
    _, sentence, document = batch
    mod = (lib.sentence_view if view == 'sentence' else lib.context_view)(sentence, document)
    q, k, v = torch.randn(3, len(sentence), 2, sentence.shape[1], 16)
    block = create_block_mask(mod, len(sentence), None, *[sentence.shape[1]] * 2, device='cpu')
    mask = lib.build_mask(mod, sentence.shape, 'cpu')
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.no_grad():
        assert torch.allclose(flex_attention(q, k, v, block_mask=block), dense, atol=1e-5)


@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_no_later_sentence_moves_a_prediction(batch, context):
    tokens, sentence, document = batch
    net = jepa(context)
    with torch.no_grad():
        before = predict(net, tokens, sentence, document)
        for i in (0, 2, 5):
            changed = torch.where(sentence > i, (tokens + 7) % 400, tokens)
            after = predict(net, changed, sentence, document)
            assert torch.equal(before[:, :i + 1], after[:, :i + 1])
            assert not torch.equal(before[:, i + 1], after[:, i + 1])


def test_targets_see_only_their_sentence(batch):
    tokens, sentence, document = batch
    net = jepa('tokens')
    own, _ = net.masks(sentence, document)
    before = net.target_means(tokens, sentence, document.shape[1], own)
    after = net.target_means(torch.where(sentence == 3, tokens, (tokens + 7) % 400), sentence, document.shape[1], own)
    assert torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_the_predictor_starts_between_the_last_sentence_and_the_mean():
    net = lib.JEPA(lib.JEPAConfig(400, n_layer=1, n_head=2, n_embd=32)).eval()
    c = lib.unit(torch.randn(2, 9, 32))
    p = lib.unit(net.predict_concepts(c, torch.zeros(2, 9, dtype=torch.long)))
    assert torch.allclose(p[:, 0], c[:, 0], atol=1e-5)
    share = torch.stack([torch.exp(-0.4 * (i - torch.arange(9.))) * (torch.arange(9) <= i) for i in range(9)])
    mean = (share / share.sum(1, keepdim=True)) @ c
    assert torch.allclose(p, lib.unit(c + 8 * mean), atol=0.1)


def test_an_encoder_starts_as_its_embeddings(batch):
    tokens, sentence, document = batch
    net = lib.JEPA(lib.JEPAConfig(400, n_layer=2, n_head=2, n_embd=32)).eval()
    h = net.encoder(tokens, net.masks(sentence, document)[1])
    assert torch.allclose(h, net.encoder.norm(net.encoder.embedding(tokens)))


def test_start_of_embeddings_against_dense_algebra(batch):
    """Two passes of neighbour_embeddings over one batch, sentence by sentence; and try_start's, on sparse matrices."""
    tokens, sentence, document = batch
    weight = torch.rand(400) + 0.5
    torch.manual_seed(0)
    found = lib.neighbour_embeddings(lambda: [[(tokens, sentence, document)]], weight, 8, 2)
    torch.manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(400, 8).double(), dim=-1)
    table = random * 8 ** 0.5
    rows = [(b, s, tokens[b][sentence[b] == s]) for b in range(len(tokens)) for s in range(int(sentence[b].max()) + 1)]
    for _ in range(2):
        means = torch.stack([(table[ids] * weight[ids, None]).mean(0) for _, _, ids in rows])
        centred = means - means.mean(0)
        value, vector = torch.linalg.eigh(centred.T @ centred / len(rows))
        z = torch.nn.functional.normalize(centred @ (vector * value.clamp(min=0.01 * value.mean()).rsqrt()) @ vector.T, dim=-1)
        new = torch.zeros_like(table)
        for (b, s, ids), (c, t, before), i in zip(rows[1:], rows, range(len(rows))):  # a sentence and the one before
            if b == c and document[b, s] == document[c, t]:
                new.index_add_(0, ids, z[i].expand(len(ids), -1) / len(ids))
                new.index_add_(0, before, z[i + 1].expand(len(before), -1) / len(before))
        mixed = 0.7 * torch.nn.functional.normalize(new, dim=-1) + 0.3 * random
        table = torch.nn.functional.normalize(mixed, dim=-1) * 8 ** 0.5
    assert 0 < (new.abs().sum(1) > 0).sum() < 400  # some tokens do not come: they stay random
    assert torch.allclose(found, table.float(), atol=1e-3)
    bags = try_start.Bags(None, weight.numpy()).matrices([ids.numpy() for _, _, ids in rows])
    documents = np.array([1000 * b + document[b, s].item() for b, s, _ in rows])
    assert np.allclose(found, try_start.start(list(bags), documents, random.float().numpy(), passes=2), atol=1e-3)


def test_words_of_a_topic_start_together():
    torch.manual_seed(0)
    tokens = 10 * torch.randint(0, 8, (64, 1)) + torch.randint(0, 10, (64, 40))  # a document each; 8 topics of 10 words
    sentence, document = torch.arange(40).expand(64, -1) // 5, torch.zeros(64, 8, dtype=torch.long)
    table = lib.neighbour_embeddings(lambda: [[(tokens, sentence, document)]], torch.ones(80), 8, 4, own=0)
    near = (lib.unit(table) @ lib.unit(table).T).view(8, 10, 8, 10).mean((1, 3))
    same = torch.eye(8, dtype=torch.bool)
    assert near[same].min() > 0.9
    assert near[~same].max() < 0.3


def test_a_sentence_is_the_weighted_mean_of_its_tokens(batch):
    tokens, sentence, document = batch
    counts = torch.bincount(tokens.flatten(), minlength=400)
    weights = lib.sif_weights(counts, a=1e-2)
    frequency = counts / counts.sum()
    assert (weights * frequency).sum().item() == pytest.approx(1)
    assert (weights[4] / weights[7]).item() == pytest.approx(((1e-2 + frequency[7]) / (1e-2 + frequency[4])).item())
    h = torch.randn(*tokens.shape, 8)
    got = lib.sentence_mean(h, weights[tokens], sentence, document.shape[1])
    for b in range(len(tokens)):
        for s in range(document.shape[1]):
            here = sentence[b] == s
            if here.any():
                assert torch.allclose(got[b, s], (h[b][here] * weights[tokens[b][here]][:, None]).mean(0), atol=1e-5)
            else:
                assert not got[b, s].any()


def test_statistics_are_fp32_under_autocast(batch):
    """A covariance from bf16 products is off by more than the eigenvalues that whitening divides by."""
    tokens, sentence, document = batch
    h = torch.randn(*tokens.shape, 8)
    means = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            z = lib.sentence_mean(h, torch.ones(tokens.shape), sentence, document.shape[1])
            means.append((z, *lib.moments(z[document >= 0])[:2]))
    for a, b in zip(*means):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def test_whitening_averages_plainly_before_it_forgets():
    w = lib.Whitening(4, rate=0.9, mean_rate=0.9)
    covs = [torch.randn(4, 4) for _ in range(5)]
    for cov in covs:
        w.update(torch.zeros(4), cov)
    assert torch.allclose(w.cov, torch.stack(covs).mean(0), atol=1e-6)
    for _ in range(100):
        w.update(torch.ones(4), torch.eye(4))
    assert torch.allclose(w.cov, torch.eye(4), atol=1e-3)
    assert torch.allclose(w.mean, torch.ones(4), atol=1e-3)


def test_every_parameter_learns_in_one_group_at_its_rate():
    net = jepa()
    groups = lib.optimizer_groups(net, 0.1, embedding_scale=50.0, predictor_scale=0.1)
    found = {id(p): g for g in groups for p in g['params']}
    assert len(found) == sum(len(g['params']) for g in groups) == sum(p.requires_grad for p in net.parameters())
    assert found[id(net.encoder.embedding.weight)]['scale'] == 50
    assert not found[id(net.encoder.embedding.weight)]['decays']
    assert found[id(net.predictor.blocks[0].up.weight)]['scale'] == 0.1
    assert found[id(net.encoder.blocks[0].up.weight)]['decays']
    assert found[id(net.encoder.norm.weight)]['weight_decay'] == 0


def test_whitening_gives_unit_covariance():
    torch.manual_seed(1)
    z = torch.randn(20_000, 24) @ torch.randn(24, 24) + 5
    w = lib.Whitening(24, floor=1e-6)
    mean, cov, n = lib.moments(z)
    w.update(mean, cov)
    w.refresh()
    white = (z - w.mean) @ w.W
    assert n == 20_000
    assert torch.allclose(torch.cov(white.T), torch.eye(24), atol=0.02)


def test_whitening_of_a_constant_batch_stays_finite():
    w = lib.Whitening(8)
    mean, cov, _ = lib.moments(torch.ones(50, 8))
    w.update(mean, cov)
    w.refresh()
    assert torch.isfinite(w(torch.ones(3, 8))).all()


def test_whitening_of_a_rank_deficient_batch_stays_finite():
    """Two directions of eight: what has no variance is not blown up to noise."""
    w, z = lib.Whitening(8), torch.randn(100, 2) @ torch.randn(2, 8)
    w.update(*lib.moments(z)[:2])
    w.refresh()
    assert w.W.isfinite().all()
    concepts = w(torch.cat((z, z[:1] * 1e6, w.mean[None])))
    assert concepts.isfinite().all()
    assert torch.linalg.svdvals(concepts)[2] < 1e-2


def test_a_constant_model_scores_nothing():
    z = lib.unit(torch.ones(50, 8))
    ranks = lib.worst_ranks(z @ z.T, torch.arange(50), ~torch.eye(50, dtype=torch.bool))
    assert (ranks == 50).all()
    assert lib.skill(z, z, z.mean(0), 1.0) == 0
    assert lib.rank_me(z - z.mean(0)) == pytest.approx(1, abs=1e-3)
    true = lib.unit(torch.randn(50, 8))
    assert (lib.worst_ranks(z @ true.T * 0, torch.arange(50), torch.ones(50, 50, dtype=torch.bool)) == 50).all()
    assert lib.skill(z, true, true.mean(0), lib.fit_scale(z, true)) <= 0


def test_the_scale_of_predictions():
    """Those made of few sentences come out no longer than those of many; at that length no other fits better."""
    torch.manual_seed(0)
    z, read = lib.unit(torch.randn(3000, 16)), torch.randint(1, 15, (3000,))
    sure = torch.rand(3000, 1)
    p = (sure * z + 0.2 * torch.randn(3000, 16)) * 5 / read[:, None] ** 0.5
    scale = lib.fit_prediction_scale(p, z, read)
    p = p * scale[read.clamp(max=lib.READ) - 1, None]
    length = p.norm(dim=-1)
    means = torch.stack([length[read == k].mean() for k in range(1, lib.READ)])
    assert torch.allclose(means, means[0].expand(lib.READ - 1), rtol=1e-4)
    assert lib.fit_scale(p, z).item() == pytest.approx(1, abs=1e-4)
    assert torch.corrcoef(torch.stack((length, sure[:, 0])))[0, 1] > 0.5
    few = lib.fit_prediction_scale(p[:1], z[:1], read[:1])
    assert few.isfinite().all()
    assert (lib.fit_prediction_scale(-p, z, read) > 0).all(), 'a prediction is never turned round'


def test_ranks_against_brute_force():
    torch.manual_seed(2)
    p, z, allowed = torch.randn(40, 6), torch.randn(30, 6), torch.rand(40, 30) > 0.4
    true = torch.randint(30, (40,))
    similar = (p.double() @ z.double().T).tolist()
    expected = [1 + sum(similar[i][j] >= similar[i][t] for j in range(30) if j != t and allowed[i, j])
                for i, t in enumerate(true.tolist())]
    assert lib.worst_ranks(p @ z.T, true, allowed).tolist() == expected


def test_rank_me_of_a_known_spectrum():
    q, _ = torch.linalg.qr(torch.randn(64, 16))
    assert lib.rank_me(q * 3) == pytest.approx(16, rel=1e-4)
    assert lib.rank_me(q[:, :4]) == pytest.approx(4, rel=1e-4)


def test_one_step_changes_everything_trainable(batch):
    tokens, sentence, document = batch
    net = jepa().train()
    own, ctx = net.masks(sentence, document)
    z = net.target_means(tokens, sentence, document.shape[1], own)
    net(tokens, sentence, document, net.whitening(z), ctx).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.predictor.parameters())
    assert all(p.grad is None for p in net.target.parameters())
    before = [p.clone() for p in net.target.parameters()]
    with torch.no_grad():
        for p in net.encoder.parameters():
            p.add_(1)
    net.update_target(0.75)
    assert all(torch.allclose(a + 0.25, b, atol=1e-6) for a, b in zip(before, net.target.parameters()))


@pytest.mark.parametrize('causal', [False, True])
def test_spans_equal_a_mask(batch, causal):
    """Forward and backward, in each block and through two of them; padding gets zeros and gives no gradient."""
    _, sentence, document = batch
    sentence = sentence.clone()
    sentence[0, 60:] = -1  # a sentence cut short, and padding
    sentence[1, :100] = 0  # one that is long: its width is the row's, no power of two
    sentence = sentence[:, :100]
    mod = lib.causal_view(sentence) if causal else lib.sentence_view(sentence, document)
    mask = lib.build_mask(mod, sentence.shape, 'cpu')
    torch.manual_seed(0)
    block = lib.Block(32, 2, 0.0, 2)
    rope = lib.rotary(torch.arange(sentence.shape[1]), 16)
    real = (sentence >= 0)[..., None]
    x, weight = torch.randn(*sentence.shape, 32), torch.randn(*sentence.shape, 32) * real
    found = []
    for m in (mask, lib.Spans(sentence, causal)):
        given = x.clone().requires_grad_()
        out = block(block(given, rope, m), rope, m)
        found.append((out * real, *torch.autograd.grad((out * weight).sum(), [given, *block.parameters()])))
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    assert (found[1][1] * ~real).abs().sum() == 0


def test_infonce_equals_brute_force():
    torch.manual_seed(5)
    document = torch.tensor([[0] * 12 + [1, 1, -1, -1], [0, 1, 1, 1] + [2] * 12, [0, 0, 0] + [-1] * 13])
    p, z = torch.randn(3, 16, 6, requires_grad=True), lib.unit(torch.randn(3, 16, 6))
    found, counted = lib.distance(p, z, document, 'infonce'), lib.pairs(document)
    torch.where(counted, found, 0).sum().backward()
    assert p.grad.isfinite().all()
    for b, i in counted.nonzero().tolist():
        others = [(c, j) for c in range(3) for j in range(16) if document[c, j] >= 0 and (c, j) != (b, i)]
        score = {at: (lib.unit(p[b, i]) @ z[at]).item() / 0.1 for at in others}
        expected = np.log(sum(np.exp(s) for s in score.values())) - score[b, i + 1]
        assert found[b, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('loss', ['cosine', 'mse', 'smooth_l1', 'infonce'])
def test_every_loss_is_least_where_prediction_and_target_agree(loss):
    torch.manual_seed(6)
    document = torch.zeros(2, 8, dtype=torch.long)
    z = lib.unit(torch.randn(2, 8, 16))
    right = 10 * 4 * torch.roll(z, -1, 1)  # the next concept, as long as the predictor's outputs are
    assert (lib.distance(right, z, document, loss) < lib.distance(right + 40 * lib.unit(torch.randn_like(right)), z, document,
                                                                  loss)).all()


@pytest.mark.parametrize('objective', [{'loss': 'mse'}, {'loss': 'smooth_l1'}, {'loss': 'infonce'}, {'target': 'shared'},
                                       {'reg': 'vicreg'}, {'reg': 'sigreg'}, {'target': 'shared', 'reg': 'sigreg'}])
def test_each_switch_teaches_something_else(batch, objective):
    tokens, sentence, document = batch
    taught = []
    for chosen in ({}, objective):
        net = jepa().train()
        net.objective = lib.Objective(**chosen)
        own, ctx = net.masks(sentence, document)
        z = net.target_means(tokens, sentence, document.shape[1], own)
        net(tokens, sentence, document, net.whitening(z), ctx).backward()
        taught.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
        assert taught[-1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*taught, dim=0) < 0.99


def several(k=3, **settings):
    """A model of k hypotheses, with the weights of jepa() otherwise."""
    torch.manual_seed(2)
    net = lib.JEPA(lib.JEPAConfig(400, n_layer=2, n_head=2, n_embd=32, predictor_layer=2, hypotheses=k, **settings))
    missing = net.load_state_dict(jepa(**settings).state_dict(), strict=False).missing_keys
    assert all(name.startswith('hypotheses.') for name in missing)
    assert bool(missing) == (k > 1)
    return net


@pytest.mark.parametrize('loss', ['cosine', 'mse', 'infonce'])
def test_the_best_of_several_hypotheses_learns(batch, loss):
    """The loss by hand; all of them and their choice get a gradient, and the next concept moves its nearest most."""
    tokens, sentence, document = batch
    net = several().train()
    net.objective = lib.Objective(loss)
    own, ctx = net.masks(sentence, document)
    concepts = net.whitening(net.target_means(tokens, sentence, document.shape[1], own))
    net(tokens, sentence, document, concepts, ctx).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.hypotheses.parameters())
    found = net.predict_concepts(concepts, document, each=True).detach().requires_grad_()  # (B, S, 3, D)
    losses = torch.stack([lib.distance(q, concepts, document, loss) for q in found.unbind(2)], -1)
    logits, counted = torch.randn(losses.shape), lib.pairs(document)
    total = lib.best_of(losses, logits, counted, relaxed=0.3, balance=0)
    best = losses.min(-1)
    by_hand = 0.7 * best.values + 0.1 * losses.sum(-1) - logits.log_softmax(-1).gather(-1, best.indices[..., None])[..., 0]
    assert torch.allclose(total, by_hand, atol=1e-5)
    other = torch.where(counted[..., None], losses, 9 * losses.flip(-1))
    given, same = (lib.best_of(x, logits, counted)[counted] for x in (losses, other))
    assert torch.allclose(given, same), 'the balance is of pairs only'
    assert (given - lib.best_of(losses, logits, counted, balance=0)[counted] > 0).all()
    total[counted].sum().backward()
    moved = found.grad[:, :-1].norm(dim=-1)[counted]
    assert (moved > 0).all()
    if loss == 'cosine':
        assert (moved.argmax(-1) == best.indices[counted]).float().mean() > 0.95


def test_a_hypothesis_that_never_wins_is_brought_back():
    """Four places and four hypotheses, of which one starts amid them and three far away: each finds work."""
    torch.manual_seed(3)
    ends = lib.unit(torch.randn(4, 16))
    for relaxed, balance, least in ((0.0, 0.0, 0), (0.05, 0.1, 0.1)):
        at = torch.cat((ends.mean(0, keepdim=True), -ends[:3] - ends.mean(0))).clone().requires_grad_()
        optimizer = torch.optim.Adam([at], lr=0.02)
        for _ in range(300):
            z = ends[torch.randint(4, (64,))]
            losses = 1 - lib.unit(at) @ z.T  # (4, 64)
            lib.best_of(losses.T[None], torch.zeros(1, 64, 4), torch.ones(1, 64).bool(), relaxed, balance).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        share = torch.bincount((lib.unit(at) @ ends.T).argmax(0), minlength=4) / 4
        assert (share.min() >= least) if least else (share.max() == 1), share


def test_one_prediction_from_several_hypotheses(batch):
    """At first all but the single model's prediction; later their mean by weight; one alone is that model, bit for bit."""
    document = batch[2]
    concepts = lib.unit(torch.randn(*document.shape, 32))
    one, net = jepa(), several().eval()
    with torch.no_grad():
        p, q, each = (f.predict_concepts(concepts, document, e) for f, e in ((one, False), (net, False), (net, True)))
        assert each.shape == (*document.shape, 3, 32)
        assert torch.nn.functional.cosine_similarity(p, q, dim=-1).min() > 0.97
        assert torch.nn.functional.cosine_similarity(p[:, :, None], each, dim=-1).max() < 0.999
        net.hypotheses.choice.bias[1] = 50
        assert torch.allclose(net.predict_concepts(concepts, document), each[:, :, 1], rtol=1e-5, atol=1e-4)
        assert torch.equal(several(1).eval().predict_concepts(concepts, document), p)
    encoder = lib.SentenceEncoder(net, None)
    found = encoder.roll(concepts[0].numpy(), [(0, 2), (1, 4)], each=True)
    assert found.shape == (2, 3, 32)
    assert np.allclose(found[:, 1], encoder.roll(concepts[0].numpy(), [(0, 2), (1, 4)]), atol=1e-4)


def test_an_unknown_switch_is_named():
    with pytest.raises(ValueError, match='--loss=l2: expected one of cosine'):
        lib.Objective(loss='l2')


@pytest.mark.parametrize('reg', [lib.vicreg, partial(lib.sigreg, directions=32)])
def test_a_regulariser_does_what_it_is_known_for(reg):
    """Points on a line become a cloud of unit variance in every direction."""
    torch.manual_seed(7)
    x = (0.7 * torch.randn(160, 1) * torch.ones(1, 6) + 0.05 * torch.randn(160, 6)).requires_grad_()
    counted = torch.arange(160) < 128
    others = x[128:].detach().clone()
    optimizer = torch.optim.Adam([x], lr=0.03)
    before = lib.rank_me(x[:128].detach())
    for _ in range(900):
        optimizer.zero_grad()
        reg(x, counted).backward()
        optimizer.step()
    cloud = x[:128].detach() - x[:128].detach().mean(0)
    spectrum = torch.linalg.eigvalsh(cloud.T @ cloud / 128)
    assert before < 2
    assert lib.rank_me(cloud) > 5.8
    assert spectrum.min() > 0.7
    assert spectrum.max() < 1.8
    assert torch.equal(x[128:].detach(), others)  # rows that do not count get no gradient


@pytest.mark.parametrize(('target', 'reaches'), [('ema', False), ('shared', True)])
def test_only_a_shared_target_takes_a_gradient(batch, target, reaches):
    tokens, sentence, document = batch
    tokens = torch.where(sentence == 1, tokens % 100, 100 + tokens % 100)  # words of their own
    net = jepa().train()
    net.objective = lib.Objective(target=target)
    one = torch.where(torch.arange(document.shape[1]) < 2, 0, -1).expand_as(document)
    last = torch.where(sentence < 2, sentence, -1)  # two sentences a row: the second one is a target only
    own, ctx = net.masks(last, one)
    z = net.target_means(tokens, last, one.shape[1], own)
    net(tokens, last, one, net.whitening(z), ctx).backward()
    moved = net.encoder.embedding.weight.grad.abs().sum(1) > 0
    assert moved[tokens[sentence == 0]].all()
    assert (moved[tokens[sentence == 1]] == reaches).all()


def decoder():
    torch.manual_seed(3)
    net = lib.Decoder(lib.DecoderConfig(400, 32, eos=399, n_layer=2, n_head=2, n_embd=32)).eval()
    torch.nn.init.normal_(net.embedding.weight, std=0.5)
    torch.nn.init.normal_(net.direct.weight, std=0.1)
    torch.nn.init.uniform_(net.token_weight)
    return net


def test_how_sure_a_concept_is(batch):
    """From none, where another concept changes nothing, to the sentence's own."""
    tokens, sentence, document = batch
    net, c = decoder(), lib.unit(torch.randn(*document.shape, 32))

    def losses(concepts):
        with torch.no_grad():
            return net.losses(tokens, sentence, concepts, net.mask(sentence))
    assert torch.equal(net.prefixes(0 * c[0, :1]).flatten(), net.no_concept)
    x, said = torch.randn(2, 1, 32)
    assert torch.equal(net.head_input(x, 0 * c[0, :1], said), net.norm(x))
    assert torch.allclose(losses(1e-6 * c), losses(0 * c), atol=1e-4)
    assert torch.allclose(losses(c), losses(3 * c), atol=1e-4)
    near, far = ((losses(s * c) - losses(0 * c)).abs().sum() for s in (0.1, 1.0))
    assert 0 < near < far
    assert (losses(0.1 * c) - losses(-0.1 * c)).abs().sum() > 0


@pytest.mark.parametrize('width', [16, 32, 48])
def test_a_decoder_starts_with_the_words_of_a_concept(corpus_dir, width):
    corpus = Corpus(corpus_dir, 'val')
    encoder = lib.SentenceEncoder(jepa(), None)
    net = lib.Decoder(lib.DecoderConfig(400, encoder.dim, eos=399, n_layer=1, n_head=1, n_embd=width)).eval()
    net.start_from(torch.from_numpy(encoder.encode_tokens([[i] for i in range(400)])), encoder.model.token_weight)
    sentences = [s for i in range(corpus.n_documents) for s in corpus.document(i)][:200]
    outside = lib.ConceptDecoder(net, None)
    concepts = encoder.encode_tokens(sentences)
    given, another = outside.nll(sentences, concepts), outside.nll(sentences, np.roll(concepts, 1, 0))
    print(f'width {width}: {given.sum():.0f} nats given the concept, {another.sum():.0f} given another')
    assert (given < another).mean() > 0.7


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_generation_with_a_cache_is_the_same(temperature):
    net, concepts = decoder(), lib.unit(torch.randn(5, 32))
    out = [net.generate(concepts, 20, temperature, 50, 0.9, torch.Generator().manual_seed(4), cache=c)
           for c in (True, False)]
    assert torch.equal(*out)
    assert out[0].unique().numel() > 3


def test_a_continuation_equals_reading_it_all_again():
    """The language model's, written with a cache, against the packed row of training read anew for every token."""
    class Numbers:
        decode = staticmethod(list)
    net = decoder()
    writer, P = lib.ConceptDecoder(net, Numbers), net.config.n_prefix
    contexts = [[[5, 9, 2], [7]], [[3] * 9], []]
    written = writer.continue_text(contexts, 12)
    for before, found in zip(contexts, written):
        ids = []
        while len(ids) < 12:
            parts = [[0] * P + s for s in (*before, ids)]
            tokens = torch.tensor([[i for part in parts for i in part]])
            sentence = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(s) for s in parts]))[None]
            none = torch.zeros(1, len(parts), 32)
            with torch.no_grad():
                x, _, _ = net.head_inputs(tokens, sentence, none, net.mask(torch.zeros_like(sentence)))
                ids.append(net.head(x[0, -1]).argmax().item())
            if ids[-1] == net.config.eos:
                ids.pop()
                break
        assert found == ids
    assert len({tuple(w) for w in written}) == 3, 'it is the context that is read'


def test_packed_cross_entropy_equals_single_sentences(corpus_dir):
    corpus, net = Corpus(corpus_dir, 'val'), decoder()
    rows = corpus.batch(0, 2, 128, 8, prefix=2)
    tokens, sentence, document = (torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document'))
    concepts = lib.unit(torch.randn(2, 8, 32))
    mask = net.mask(sentence)
    with torch.no_grad():
        packed = net.losses(tokens, sentence, concepts, mask)
        assert net(tokens, sentence, concepts, mask).item() == pytest.approx(packed.sum().item(), rel=1e-5)
    outside = lib.ConceptDecoder(net, corpus.tokenizer)
    for b in range(2):
        for s in range(int((document[b] >= 0).sum())):
            ids = tokens[b][sentence[b] == s][2:]
            # by hand: the prefix, then one token after the other
            x = torch.cat((net.prefixes(concepts[b, s][None])[0], net.embedding(ids)))[None]
            rope = lib.rotary(torch.arange(x.shape[1]), net.head_dim)
            with torch.no_grad():
                for block in net.blocks:
                    x = block(x, rope, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())
                said = torch.stack([sum((net.embedding(i) * net.token_weight[i] for i in ids[:n]), torch.zeros(32))
                                    for n in range(len(ids) + 1)])
                rest = net.direct(concepts[b, s] * 32 ** 0.5) - net.spent * said
                logits = net.head(net.norm(x)[0, 1:] + rest)
            by_hand = torch.nn.functional.cross_entropy(logits, torch.cat((ids, torch.tensor([399]))), reduction='sum')
            assert packed[b][sentence[b] == s].sum().item() == pytest.approx(by_hand.item(), rel=1e-4)
            alone = outside.nll([ids.numpy()], concepts[b, s][None].numpy())[0]
            assert alone == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize('compiled', [False, True])
def test_chunked_cross_entropy_equals_all_at_once(monkeypatch, compiled):
    monkeypatch.setattr(lib, 'HEAD_CHUNK', 7)
    torch.manual_seed(0)
    x, head = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target, counted = torch.randint(0, 50, (30,)), torch.rand(30) < 0.7
    expected = (torch.nn.functional.cross_entropy(x @ head.T, target, reduction='none') * counted).sum() / 3

    def loss(x, head):
        return lib.HeadCrossEntropy.apply(x, head, target, counted, torch.is_grad_enabled()) / 3
    found = (torch.compile(loss) if compiled else loss)(x, head)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(found, (x, head)), torch.autograd.grad(expected, (x, head))):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert loss(x, head).item() == pytest.approx(expected.item(), rel=2e-2)


def test_a_run_is_compiled_once(corpus_dir):
    """Neither other batches, nor evaluation between them, nor a missing concept make torch.compile begin again."""
    corpus, graphs = Corpus(corpus_dir, 'train'), []
    net, writer = jepa().train(), decoder().train()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    forward, means, write = (torch.compile(f, backend='eager') for f in (net, net.target_means, writer))
    for i in range(6):
        rows = corpus.batch(i, 2, 128, 16, prefix=2)
        tokens, sentence, document = (torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document'))
        own, context = net.masks(sentence, document)
        z = means(tokens, sentence, 16, own)
        forward(tokens, sentence, document, net.whitening(z), context).backward()
        concepts = torch.rand(2, 16, 1) * lib.unit(torch.randn(2, 16, 32))
        write(tokens, sentence, concepts, writer.mask(sentence)).backward()
        if i % 2:
            with torch.no_grad():
                write(tokens, sentence, concepts, writer.mask(sentence))
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs[0] >= 3
    assert graphs[1] == graphs[-1]  # the first evaluation, without gradients, is a graph of its own
    assert not counters['graph_break']


@pytest.mark.parametrize('switches', [{}, {'loss': 'mse'}, {'loss': 'infonce'}, {'reg': 'vicreg'}, {'reg': 'sigreg'}, {'target': 'shared'}], ids=str)
def test_a_step_leaves_its_device_alone(batch, switches, monkeypatch):
    """No tensor of the CPU comes in, and no value is waited for: on the device 'meta', which has no values to give."""
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: contextlib.nullcontext())  # unknown to that device
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: False)
    tokens, sentence, document = (x.to('meta') for x in batch)
    for net in (jepa(), jepa('tokens'), several()):
        net.to('meta').objective = lib.Objective(**switches)
        if net.config.context == 'tokens' and switches.get('target'):
            continue
        own, context = net.masks(sentence, document)
        z = net.target_means(tokens, sentence, document.shape[1], own)
        mean, cov, _ = lib.moments(z.flatten(0, 1))
        net.whitening.update(mean, cov)
        net.whitening.refresh()
        net(tokens, sentence, document, net.whitening(z, mean), context).backward()
        net.update_target(0.9)
    writer = decoder().to('meta')
    writer(tokens, sentence, net.whitening(z), writer.mask(sentence)).backward()
    assert all(p.grad.device.type == 'meta' for n in (net.encoder, net.predictor, writer) for p in n.parameters())
    net.token_weight = torch.ones(400)  # what this would find
    with pytest.raises(RuntimeError, match='device'):
        net.target_means(tokens, sentence, document.shape[1], own)


def test_running_sum_equals_a_loop():
    torch.manual_seed(0)
    group = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 2, 3]])
    x, weight = torch.randn(2, 8, 3, requires_grad=True), torch.randn(2, 8, 3)
    place = lib.place_in_sentence(group)
    first = torch.arange(8) - place
    last = torch.tensor([[2, 2, 2, 3, 5, 5, 7, 7], [0, 5, 5, 5, 5, 5, 6, 7]])
    expected = torch.stack([torch.stack([x[b, first[b, t]:t + 1].sum(0) for t in range(8)]) for b in range(2)])
    found = lib.RunningSum.apply(x, first, last)
    assert torch.allclose(found, expected, atol=1e-5)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), x)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_windows_equal_packed_rows(corpus_dir, context):
    corpus, net = Corpus(corpus_dir, 'train'), jepa(context)
    encoder = lib.SentenceEncoder(net, corpus.tokenizer)
    sentences = corpus.document(int(np.argmax([len(corpus.document(i)) for i in range(corpus.n_documents)])))[:12]
    assert len(sentences) > lib.READ
    ids = np.concatenate(sentences)
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    sentence = torch.from_numpy(np.repeat(np.arange(len(sentences)), [len(s) for s in sentences]))[None]
    with torch.no_grad():
        packed = predict(net, tokens, sentence, torch.zeros(1, len(sentences), dtype=torch.long))[0]
    net.prediction_scale.copy_(1 / (torch.arange(lib.READ) + packed.norm(dim=-1).mean()))
    windows = encoder.predict_windows(sentences, [(0, n) for n in range(1, len(sentences) + 1)], batch_size=2)
    scale = net.prediction_scale[torch.arange(len(packed)).clamp(max=lib.READ - 1)]
    assert np.allclose(windows, scale[:, None] * packed, atol=1e-5)


def test_encode_keeps_the_order_and_the_batch_does_not_matter(corpus_dir):
    net = jepa()
    net.whitening.mean.fill_(0.1)  # a space that has been measured: the empty sentence has a place in it too
    encoder = lib.SentenceEncoder(net, Corpus(corpus_dir, 'train').tokenizer)
    sentences = ['The river.', 'A stone stood near the long bridge for many winter days.', '', 'Copper <|endoftext|>']
    z = encoder.encode(sentences, batch_size=2)
    assert z.dtype == np.float32
    assert np.allclose((z ** 2).sum(1), 1, atol=1e-5)
    for s, row in zip(sentences, z):
        assert np.allclose(encoder.encode(s), row, atol=1e-5)


def test_checkpoints(tmp_path):
    path = tmp_path / 'encoder.pt'
    lib.save_checkpoint(path, {'kind': 'encoder', 'x': torch.ones(3)})
    assert torch.equal(lib.load_checkpoint(str(tmp_path), 'encoder')['x'], torch.ones(3))
    with pytest.raises(ValueError, match='holds no decoder'):
        lib.load_checkpoint(str(path), 'decoder')
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match='damaged'):
        lib.load_checkpoint(str(path), 'encoder')
    with pytest.raises(FileNotFoundError, match='train_decoder'):
        lib.load_checkpoint(str(tmp_path), 'decoder')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['encoder.pt']


def test_no_flipped_bit_of_a_checkpoint_s_directory_is_taken(tmp_path):
    """Of the zip archive's records, which no checksum covers: each is refused, or makes no difference."""
    path = tmp_path / 'encoder.pt'
    lib.save_checkpoint(path, {'kind': 'encoder', 'x': torch.ones(3)})
    content = path.read_bytes()
    begin, refused = content.index(b'PK\x01\x02'), 0
    for bit in range(8 * begin, 8 * len(content)):
        path.write_bytes(content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:])
        try:
            assert torch.equal(lib.load_checkpoint(str(path), 'encoder')['x'], torch.ones(3)), bit
        except ValueError:  # other errors are none of load_checkpoint's
            refused += 1
    assert refused > 100
