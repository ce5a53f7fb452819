"""model.py against references: masks, leaks, concepts, objectives, decoder, what other programs call."""

import contextlib
import math
import pickle
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import MORE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import model as lib
from config import UserError
from config.run import half_cosine, save_checkpoint
from prepare import Corpus

SENTENCES = ['The river.', 'A stone stood near the long bridge for winter days.', '', 'Copper <|endoftext|>']

def jepa(context='concepts'):
    torch.manual_seed(0)
    net = lib.JEPA(lib.JEPAConfig(400, 2, 2, 32, predictor_layer=2, context=context)).eval()
    for block in (*net.encoder.blocks, *net.predictor.blocks):  # away from the start, where branches are zero
        torch.nn.init.normal_(block.proj.weight, std=0.08)
        torch.nn.init.normal_(block.down.weight, std=0.05)
    net.target.load_state_dict(net.encoder.state_dict())
    return net

def decoder():
    torch.manual_seed(3)
    net = lib.Decoder(lib.DecoderConfig(400, 32, eos=399, n_layer=2, n_head=2, n_embd=32)).eval()
    torch.nn.init.normal_(net.embedding.weight, std=0.5)
    torch.nn.init.normal_(net.direct.weight, std=0.1)
    torch.nn.init.uniform_(net.token_weight)
    return net

def tensors(rows):
    return [torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document')]

def causal(group, path='mask'):
    return lib.build_mask(group, causal=True, path=path)

def loss_of(net, tokens, sentence, document):
    """The training loss, as train_encoder.py makes it."""
    own, mask = net.masks(sentence, document)
    z = net.targets(tokens, sentence, document, own)
    return net(tokens, sentence, document, z, net.whitening(z, document >= 0), mask)

def nats(net, tokens, sentence, concepts, mask):
    """Nats of each position that counts, 0 elsewhere, by way of all logits."""
    with torch.no_grad():
        x, target, counted = net.states(tokens, sentence, concepts, mask)
        return F.cross_entropy((x @ net.embedding.weight.T).mT, target, reduction='none') * counted

@pytest.fixture(scope='module')
def corpus(corpus_dir):
    return Corpus(corpus_dir, 'train')

@pytest.fixture
def batch(corpus):
    """Three rows, with padding, and documents that begin and end in a row."""
    tokens, sentence, document = tensors(corpus.batch(0, 0, 1, 3, 128, 12))
    assert ((document[:, :-1] != document[:, 1:]) & (document[:, 1:] >= 0)).any()
    assert (sentence[:, -1] < 0).any()
    return tokens, sentence, document

@pytest.mark.parametrize('view', ['sentence', 'context', 'causal', 'document'])
def test_masks_against_brute_force(batch, view):
    _, sentence, document = batch
    own, context = jepa('tokens').masks(sentence, document)
    mask = {'sentence': own, 'context': context, 'causal': causal(sentence),
            'document': causal(lib.document_of(sentence, document))}[view]
    for b, (s, d) in enumerate(zip(sentence.tolist(), document.tolist())):
        for q, k in np.ndindex(128, 128):
            i, j = s[q], s[k]
            seen = {'sentence': i == j, 'context': d[i] == d[j] and j <= i, 'causal': i == j and k <= q,
                    'document': d[i] == d[j] and k <= q}[view]
            assert mask[b, 0, q, k] == (seen if min(i, j) >= 0 else q == k)  # padding sees itself alone

@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_flex_attention_sees_what_the_masks_say(batch, context, monkeypatch):
    monkeypatch.setattr(lib, 'compiled_block_mask', torch.compile(create_block_mask, backend='eager'))
    tokens, sentence, document = batch
    net, writer, concepts = jepa(context), decoder(), torch.randn(*document.shape, 32)
    with torch.no_grad():
        for masks in zip(net.masks(sentence, document, 'flex'), net.masks(sentence, document)):
            assert torch.allclose(*(net.encoder(tokens, mask) for mask in masks), atol=1e-5)
        masks = causal(sentence, 'flex'), causal(sentence)
        states = (writer.states(tokens, sentence, concepts, mask)[0] for mask in masks)
        assert torch.allclose(*states, atol=1e-4)

@pytest.mark.parametrize('forward', [False, True])
def test_spans_equal_a_mask(batch, forward):
    """Forward and backward, through two blocks; padding gives no gradient."""
    sentence = batch[1][:, :100].clone()
    sentence[0, 60:], sentence[1] = -1, 0  # one is cut short, and one is long: its width is the row's
    block, rope = lib.Block(decoder().config, 2), lib.rotary(torch.arange(100), 16)
    used = (sentence >= 0)[..., None]
    x, weight, found = torch.randn(3, 100, 32), torch.randn(3, 100, 32) * used, []
    for path in ('mask', 'spans'):
        mask, leaf = lib.build_mask(sentence, forward, path=path), x.clone().requires_grad_()
        out = block(block(leaf, rope, mask), rope, mask)
        found.append((out * used, *torch.autograd.grad((out * weight).sum(), [leaf, *block.parameters()])))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*found))
    assert (found[1][1] * ~used).abs().sum() == 0

@pytest.mark.parametrize(('context', 'path'), [('concepts', 'mask'), ('concepts', 'spans'),
                                                 ('tokens', 'mask')])
def test_no_later_sentence_moves_a_prediction(batch, context, path):
    """By either input that the predictor is given; nor does any other sentence move a target."""
    tokens, sentence, document = batch
    net = jepa(context)
    own, mask = net.masks(sentence, document, path)

    def look(changed):
        x = torch.where(changed, (tokens + 7) % 400, tokens)
        z = net.targets(x, sentence, document, own)
        return (z, net.predict(x, sentence, document, mask), net.predictor(net.whitening(z), document),
                net.expected(x, sentence, document, z)[:, 1:])
    with torch.no_grad():
        before = look(sentence < -1)
        assert not before[3][~lib.pairs(document)].any(), 'of a first sentence nothing is expected'
        for i in (0, 2, 5):
            for a, b in zip(before[1:], look(sentence > i)[1:]):
                assert torch.equal(a[:, :i + 1], b[:, :i + 1])
                assert not torch.equal(a[:, i + 1], b[:, i + 1])
            z = look(sentence != i)[0]
            assert torch.equal(before[0][:, i], z[:, i])
            assert not torch.equal(before[0][:, i + 1], z[:, i + 1])

@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_the_loss_by_hand(batch, context):
    """Each prediction from the sentences up to it alone; either context's inputs; pairs of one document."""
    tokens, sentence, document = batch
    net, expected = jepa(context), []
    own, mask = net.masks(sentence, document)
    with torch.no_grad():
        z = net.targets(tokens, sentence, document, own)
        net.whitening.fit([(z, document >= 0)])
        online = lib.sentence_mean(net.encoder(tokens, mask), net.token_weight[tokens], sentence, 12)
        concepts = net.whitening(z, document >= 0)
        read = [net.whitening(online), net.whitening(z)][:1 + (context == 'concepts')]
        for b, i in np.ndindex(3, 11):
            if document[b, i] == document[b, i + 1] >= 0:
                p = [net.predictor(x[b:b + 1, :i + 1], document[b:b + 1, :i + 1])[0, i] for x in read]
                expected += [np.mean([1 - torch.cosine_similarity(q, concepts[b, i + 1], 0) for q in p])]
        assert lib.pairs(document).sum() == len(expected) > 9
        assert loss_of(net, *batch).item() == pytest.approx(sum(expected), rel=1e-4)

def test_one_step_changes_everything_trainable(batch):
    net = jepa().train()
    loss_of(net, *batch).backward()
    trainable = {id(p): p for p in net.parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())
    before = [p.clone() for p in net.target.parameters()]
    for p in net.encoder.parameters():
        p.data += 1
    net.update_target(0.75)
    assert all(torch.allclose(a + 0.25, b, atol=1e-6) for a, b in zip(before, net.target.parameters()))
    groups = lib.optimizer_groups(net, embedding_scale=50.0, predictor_scale=0.1)
    found = {id(p): (g['scale'], g['decays']) for g in groups for p in g['params']}
    assert found.keys() == trainable.keys()
    assert len(found) == sum(len(g['params']) for g in groups), 'once each'
    for p, scale, decays in ((net.encoder.embedding.weight, 50, False), (net.encoder.norm.weight, 1, False),
                             (net.encoder.blocks[0].up.weight, 1, True), (net.predictor.slope, 0.1, False),
                             (net.predictor.blocks[0].up.weight, 0.1, True)):
        assert found[id(p)] == (scale, decays)

def test_the_model_starts_as_a_fading_mean_of_embeddings(batch):
    tokens, sentence, document = batch
    net = lib.JEPA(lib.JEPAConfig(400, n_layer=2, n_head=2, n_embd=32)).eval()
    h = net.encoder(tokens, net.masks(sentence, document)[1])
    assert torch.allclose(h, net.encoder.norm(net.encoder.embedding(tokens)))
    c, i = lib.unit(torch.randn(2, 9, 32)), torch.arange(9.)
    p = lib.unit(net.predictor(c, torch.zeros(2, 9, dtype=torch.long)))
    share = torch.exp(-0.4 * (i[:, None] - i)).tril()
    assert torch.allclose(p, lib.unit(c + 8 * (share / share.sum(1, keepdim=True)) @ c), atol=0.1)
    assert torch.allclose(p[:, 0], c[:, 0], atol=1e-5)

def test_start_of_embeddings_against_brute_force(batch):
    """Two passes of neighbour_embeddings over one batch, sentence by sentence."""
    tokens, sentence, document = batch
    weight = torch.rand(400) + 0.5
    torch.manual_seed(0)
    found = lib.neighbour_embeddings(lambda: [batch], weight, 8, 2)
    torch.manual_seed(0)
    random = F.normalize(torch.randn(400, 8).double(), dim=-1)
    table = random * 8 ** 0.5
    rows = [(document[b, s], tokens[b][sentence[b] == s]) for b, s in (document >= 0).nonzero()]
    for _ in range(2):
        means = torch.stack([(table[ids] * weight[ids, None]).mean(0) for _, ids in rows])
        centred = means - means.mean(0)
        value, vector = torch.linalg.eigh(centred.T @ centred / len(rows))
        z = F.normalize(centred @ (vector * value.clamp(min=0.01 * value.mean()).rsqrt()) @ vector.T, dim=-1)
        new = torch.zeros_like(table)
        for i, ((d, ids), (e, after)) in enumerate(pairwise(rows)):  # no two rows share a document
            if d == e:
                new.index_add_(0, ids, z[i + 1].expand(len(ids), -1) / len(ids))
                new.index_add_(0, after, z[i].expand(len(after), -1) / len(after))
        table = F.normalize(0.7 * F.normalize(new, dim=-1) + 0.3 * random, dim=-1) * 8 ** 0.5
    assert 0 < (new.abs().sum(1) > 0).sum() < 400  # some tokens do not come: they stay random
    assert torch.allclose(found, table.float(), atol=1e-3)

def test_a_sentence_is_the_weighted_mean_of_its_tokens(batch):
    tokens, sentence, _ = batch
    counts = torch.bincount(tokens.flatten(), minlength=400)
    frequency = counts / counts.sum()
    weights, expected = lib.sif_weights(counts, a=1e-2), 1e-2 / (1e-2 + frequency)
    assert torch.allclose(weights, expected / (expected * frequency).sum())
    h = torch.randn(*tokens.shape, 8)
    found = lib.sentence_mean(h, weights[tokens], sentence, 12)
    for b, s in np.ndindex(3, 12):
        here = sentence[b] == s
        mean = (h[b] * weights[tokens[b], None])[here].mean(0) if here.any() else torch.zeros(8)
        assert torch.allclose(found[b, s], mean, atol=1e-5)

def test_whitening_against_numpy():
    """Moments of batches and ranks add up; rows not used do not count; both centres; under autocast."""
    rng, w = np.random.default_rng(1), lib.Whitening(8, rate=0.9, mean_rate=0.9, floor=1e-6)
    z = (rng.standard_normal((6, 500, 8)) @ rng.standard_normal((8, 8)) + 5).astype(np.float32)
    used = rng.random((6, 500)) < 0.8
    parts = [(torch.from_numpy(z[i:i + 2]), torch.from_numpy(used[i:i + 2])) for i in (0, 2, 4)]
    w.mean += 3  # moments are taken about the running mean
    w.update(sum(w.moments(*part) for part in parts), share=1.0)
    w.refresh()
    mean, cov = z[used].astype(float).mean(0), np.cov(z[used].T.astype(float), bias=True)
    assert np.allclose(w.mean, mean, atol=1e-4)
    assert np.allclose(w.cov, cov, rtol=1e-3, atol=1e-4)
    value, vector = np.linalg.eigh(cov)
    for centre, how in ((mean, ()), (z[:2][used[:2]].mean(0), parts[0][1:])):
        expected = (z[:2] - centre) @ (vector / np.sqrt(value) @ vector.T)
        for low in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=low):
                assert np.allclose(w(parts[0][0], *how), lib.unit(torch.from_numpy(expected)), atol=1e-3)
    for told, share in ((0.5, 0.5), (None, 0.1)):
        before, own = w.cov.clone(), np.cov(z[0].T, bias=True)
        w.update(w.moments(parts[0][0][:1], torch.ones(1, 500)), told)
        assert np.allclose(w.cov, (1 - share) * before.numpy() + share * own, atol=1e-3)

def test_the_loss_cannot_be_lowered_by_collapse():
    """Of sentences that share a direction, or lie on a line: a constant predicts them only unwhitened."""
    z, used, direction = torch.randn(40, 50, 16), torch.ones(40, 50).bool(), lib.unit(torch.randn(16))

    def best_constant(concepts):
        p = lib.unit(concepts.mean((0, 1))).expand_as(concepts)
        return lib.pair_loss(p, concepts, used, 'cosine').mean()
    for collapsed in (z, z + 10 * direction, z + 1000 * direction, (1e-3 * z[..., :1] + 1) * direction):
        w = lib.Whitening(16)
        w.fit([(collapsed, used)])
        assert best_constant(w(collapsed, used)) > 0.95
        assert w(torch.stack((w.mean, 1e6 * w.mean))[None]).isfinite().all()
    assert best_constant(lib.unit(collapsed)) < 1e-3

def test_infonce_equals_brute_force():
    """Negatives are the batch's other sentences but those that were read: of the document, up to the last."""
    document = torch.tensor([[0] * 12 + [1, 1, -1, -1], [2, 4, 4, 4] + [5] * 12, [3, 3, 3] + [-1] * 13])
    p, z = torch.randn(3, 16, 6, requires_grad=True), lib.unit(torch.randn(3, 16, 6))
    found, counted = lib.pair_loss(p, z, document, 'infonce'), lib.pairs(document)
    (found * counted).sum().backward()
    assert p.grad.isfinite().all()
    for b, i in counted.nonzero().tolist():
        read = [(b, j) for j in range(i + 1) if document[b, j] == document[b, i]]
        score = {(c, j): (lib.unit(p[b, i]) @ z[c, j]).item() / 0.1
                 for c, j in (document >= 0).nonzero().tolist() if (c, j) not in read}
        expected = np.log(sum(map(np.exp, score.values()))) - score[b, i + 1]
        assert found[b, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)

@pytest.mark.parametrize('switch', [{'loss': 'mse'}, {'loss': 'infonce'}, {'target': 'shared'},
                                    {'reg': 'vicreg'}, {'reg': 'sigreg'}], ids=str)
def test_each_switch_teaches_something_else(batch, switch, monkeypatch):
    """A target's words get a gradient only where it is shared or regularised; a step waits for nothing."""
    tokens, sentence, document = batch
    words = torch.where(sentence == 1, tokens % 100, 100 + tokens % 100)  # those of the second are its own
    two, taught = torch.where(sentence < 2, sentence, -1), []
    for chosen in ({}, switch):
        net = jepa().train()
        net.objective = lib.Objective(**chosen)
        loss_of(net, words, two, torch.tensor([[0, 0], [1, 1], [2, 2]])).backward()
        taught.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
        moved = net.encoder.embedding.weight.grad.abs().sum(1) > 0
        assert moved[words[two == 0]].all()
        assert (moved[words[two == 1]] == ('target' in chosen or 'reg' in chosen)).all()
    assert torch.cosine_similarity(*taught, dim=0) < 0.99
    # on the device 'meta' there are no values to wait for, and what comes from the CPU is refused
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: contextlib.nullcontext())  # unknown there
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: False)
    tokens, sentence, document = (x.to('meta') for x in batch)
    net, writer = net.to('meta'), decoder().to('meta')
    loss_of(net, tokens, sentence, document).backward()
    z = net.targets(tokens, sentence, document, net.masks(sentence, document)[0])
    net.whitening.update(net.whitening.moments(z, document >= 0))
    net.whitening.refresh()
    net.update_target(0.9)
    writer(tokens, sentence, net.whitening(z), causal(sentence)).backward()
    net.token_weight = torch.ones(400)
    with pytest.raises(RuntimeError, match='device'):
        loss_of(net, tokens, sentence, document)

def test_regularisers_by_hand():
    x, used = 0.4 * torch.randn(60, 6), torch.rand(60) < 0.7
    cov = torch.cov(x[used].double().T)
    off = (cov - cov.diag().diag()).square().sum() / 6 / 25
    expected = (1 - (cov.diag() + 1e-4).sqrt()).clamp(min=0).mean() + off
    assert lib.vicreg(x, used).item() == pytest.approx(expected.item(), rel=1e-4)
    torch.manual_seed(0)
    found = lib.sigreg(x, used)
    torch.manual_seed(0)
    along, t = x[used].double() @ F.normalize(torch.randn(6, 256), dim=0).double(), torch.linspace(-5, 5, 17)
    wave = torch.exp(1j * along[..., None] * t).mean(0)  # (directions, t): the characteristic function
    gap = (wave - torch.exp(-t ** 2 / 2)).abs().square() * torch.exp(-t ** 2 / 2)
    area = ((gap[:, 1:] + gap[:, :-1]) / 2 * (t[1] - t[0])).sum(1).mean()
    assert found.item() == pytest.approx((used.sum() * area).item(), rel=1e-4)

def test_measures_against_references():
    p, z = torch.randn(2, 40, 6)
    expected = np.linalg.lstsq(p.numpy().reshape(-1, 1), z.numpy().ravel(), rcond=None)[0].item()
    assert lib.fit_scale(p, z).item() == pytest.approx(expected, rel=1e-4)
    assert lib.fit_scale(p.numpy(), z.numpy()) == pytest.approx(expected, rel=1e-4)
    share = np.linalg.svd(z.numpy(), compute_uv=False)
    share /= share.sum()
    assert lib.rank_me(z) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    found = [half_cosine(i, 8, 1.0, 3.0) for i in (0, 2, 4, 8, 100)]
    assert found == pytest.approx([1, 2 - math.cos(math.pi / 4), 2, 3, 3])
    # a constant model scores nothing
    same, z = lib.unit(torch.ones(40, 6)), lib.unit(z)
    assert lib.skill(same, same, same.mean(0)) == 0 >= lib.skill(lib.fit_scale(same, z) * same, z, z.mean(0))
    assert lib.rank_me(same - same.mean(0)) == pytest.approx(1, abs=1e-3)
    x, index = p.view(8, 5, 6), torch.randint(5, (8, 7))
    assert torch.equal(lib.at_positions(x, index), torch.stack([x[b, index[b]] for b in range(8)]))

@pytest.mark.parametrize('width', [16, 32, 48])
def test_a_decoder_starts_with_the_words_of_a_concept(corpus, width):
    encoder = lib.SentenceEncoder(jepa(), None)
    net = lib.Decoder(lib.DecoderConfig(400, 32, eos=399, n_layer=1, n_head=1, n_embd=width))
    net.start_from(torch.from_numpy(encoder.encode_tokens([[i] for i in range(400)])), torch.ones(400))
    sentences = [s for i in range(40) for s in corpus.document(i)][:200]
    writer, concepts = lib.ConceptDecoder(net, None), encoder.encode_tokens(sentences)
    given, another = (writer.nll(sentences, c) for c in (concepts, np.roll(concepts, 100, 0)))
    assert (given < another).mean() > 0.7

@pytest.mark.parametrize(('temperature', 'size'), [(0.0, 0), (0.0, 1), (0.0, 2), (1.0, 3)])
def test_generation_with_a_cache_equals_reading_it_all_again(temperature, size):
    net, concepts, how = decoder(), lib.unit(torch.randn(5, 32)), (temperature, 50, 0.9)
    found = net.generate(concepts, 20, *how, torch.Generator().manual_seed(4), size)
    ids, generator = torch.zeros(5, 0, dtype=torch.long), torch.Generator().manual_seed(4)
    for _ in range(found.shape[1]):
        tokens = F.pad(ids, (net.config.n_prefix, 0))
        sentence = torch.zeros_like(tokens)
        with torch.no_grad():
            x = net.states(tokens, sentence, concepts[:, None], causal(sentence))[0][:, -1]
        logits = (x @ net.embedding.weight.T).detach()
        for row, written in zip(logits, ids.tolist()):
            for i in range(len(written) - size + 1 if size else 0):  # what would repeat the n-gram from i on
                if written[i:i + size - 1] == written[len(written) - size + 1:]:
                    row[written[i + size - 1]] = -torch.inf
        ids = torch.cat((ids, lib.sample(logits, *how, generator)[:, None]), 1)
    assert torch.equal(found, ids)
    assert found.unique().numel() > 3

@pytest.mark.parametrize(('temperature', 'top_k', 'top_p', 'kept'), [
    (1, 0, 1, 5), (0.5, 0, 1, 5), (1, 3, 1, 3), (1, 99, 1, 5), (1, 0, 0.8, 2), (1, 0, 1e-9, 1),
    (1e-3, 0, 1, 1), (0, 0, 1, 1), (0.5, 3, 0.9, 2)])
def test_sampling(temperature, top_k, top_p, kept):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])  # the likeliest has .64, .87 at half the temperature
    expected = F.pad((logits[:kept] / max(temperature, 1e-3)).softmax(-1), (0, 5 - kept))
    drawn = lib.sample(logits.repeat(20_000, 1), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(drawn, minlength=5) / 20_000, expected, atol=0.015)

def test_nll_of_packed_and_single_sentences(corpus):
    """In a row among others, alone, and by hand, for concepts of any length, which is how sure they are."""
    net, (tokens, sentence, document) = decoder(), tensors(corpus.batch(0, 0, 1, 2, 128, 8, prefix=2))
    E, writer = net.embedding.weight, lib.ConceptDecoder(net, None)
    concepts = lib.unit(torch.randn(2, 8, 32)) * torch.tensor([0, 0.3, 1, 3]).repeat(4).view(2, 8, 1)
    packed = nats(net, tokens, sentence, concepts, causal(sentence))
    total = net(tokens, sentence, concepts, causal(sentence)).item()
    assert total == pytest.approx(packed.sum().item(), rel=1e-5)
    for b, s in (document >= 0).nonzero().tolist():
        ids, given = tokens[b][sentence[b] == s][2:], concepts[b, s]
        n = len(ids)
        with torch.no_grad():
            sure, c = given.norm().clamp(max=1), lib.unit(given) * 32 ** 0.5
            prefix = sure * net.prefix.weight @ c + (1 - sure) * net.no_concept
            x = torch.cat((prefix.view(2, 32), E[ids]))[None]
            for block in net.blocks:
                x = block(x, lib.rotary(torch.arange(n + 2), 16), causal(torch.zeros(1, n + 2)))
            sums = torch.stack([(E[ids[:i]] * net.token_weight[ids[:i], None]).sum(0) for i in range(n + 1)])
            said = net.direct.weight @ c - net.emitted_gain * sums
            logits = (net.norm(x)[0, 1:] + sure * said) @ E.T
        by_hand = F.cross_entropy(logits, F.pad(ids, (0, 1), value=399), reduction='sum').item()
        assert packed[b][sentence[b] == s].sum().item() == pytest.approx(by_hand, rel=1e-4)
        assert writer.nll([ids.numpy()], given[None].numpy())[0] == pytest.approx(by_hand, rel=1e-4)

def test_a_language_model_reads_the_sentences_before():
    """Its nll in context is that of the packed row of training, where a token sees its document so far."""
    net, own, contexts = decoder(), [[1, 2], [8], [4, 4, 4]], [[[5, 9, 2], [7]], [[3] * 9], []]
    expected = []
    for before, ids in zip(contexts, own):
        parts = [torch.tensor([0] * net.config.n_prefix + s) for s in (*before, ids)]
        sentence = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])[None]
        none, mask = torch.zeros(1, len(parts), 32), causal(torch.zeros_like(sentence))
        row = nats(net, torch.cat(parts)[None], sentence, none, mask)
        expected.append(row[sentence == len(before)].sum().item())
    writer = lib.ConceptDecoder(net, None)
    assert writer.nll(own, contexts=contexts) == pytest.approx(expected, rel=1e-4)
    assert (np.abs(writer.nll(own) - expected)[:2] > 1e-3).all()

@pytest.mark.parametrize(('vocab', 'compiled'), [(50, False), (64, False), (65, False), (65, True)])
def test_chunked_cross_entropy_equals_all_at_once(vocab, compiled):
    x, head = torch.randn(2500, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    target, counted = torch.randint(0, vocab, (2500,)), torch.rand(2500) < 0.7
    expected = (F.cross_entropy(x @ head.T, target, reduction='none') * counted).sum() / 3

    def loss(x, head):
        return lib.HeadCrossEntropy.apply(x, head, target, counted, torch.is_grad_enabled()) / 3
    found = (torch.compile(loss, backend='aot_eager') if compiled else loss)(x, head)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(found, (x, head)), torch.autograd.grad(expected, (x, head))):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert loss(x, head).item() == pytest.approx(expected.item(), rel=2e-2)

def test_a_run_is_compiled_once(corpus):
    """Other batches, and evaluation, neither compile again nor break a graph; the loss is the plain one."""
    net, writer, graphs, counters = jepa().train(), decoder().train(), [], torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    steps = [(torch.compile(f, backend='eager'), f) for f in (net, writer)]
    for i in range(4):
        tokens, sentence, document = tensors(corpus.batch(i, 0, 1, 2, 128, 16, prefix=2))
        concepts = lib.unit(torch.randn(2, 16, 32)) * (i != 3)
        mask = net.masks(sentence, document)[1]
        given = (document, concepts, concepts, mask), (concepts, causal(sentence))
        for more, (fast, plain) in zip(given, steps):
            with torch.set_grad_enabled(i % 2 == 0):
                loss = fast(tokens, sentence, *more)
            assert loss.item() == pytest.approx(plain(tokens, sentence, *more).item(), rel=1e-5)
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs == [2, 4, 4, 4]  # each with gradients, then without
    assert not counters['graph_break']

@pytest.fixture(scope='module')
def encoder(corpus):
    net = jepa()
    net.whitening.mean.fill_(0.1)  # a space that has been measured: the empty sentence has a place in it too
    return lib.SentenceEncoder(net, corpus.tokenizer)

def test_encode_keeps_the_order_and_the_batch_does_not_matter(encoder):
    z, order = encoder.encode(SENTENCES, batch_size=2), [3, 0, 2, 1]
    assert z.dtype == np.float32
    assert np.allclose((z ** 2).sum(1), 1, atol=1e-5)
    shuffled = encoder.encode([SENTENCES[i] for i in order], batch_size=3, show_progress_bar=True)
    assert np.allclose(shuffled, z[order], atol=1e-5)
    for s, row in zip(SENTENCES, z):
        for same in (s, f'\ufeff {s}\r\n'.replace(' ', ' \u00a0 ')):
            assert np.allclose(encoder.encode(same), row, atol=1e-5)
    assert np.allclose(encoder.encode(SENTENCES, convert_to_tensor=True).numpy(), z, atol=1e-5)
    assert np.allclose(encoder.similarity(z, 3 * z), z @ z.T, atol=1e-5)
    assert np.allclose(encoder.similarity_pairwise(z, z), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)
    assert np.allclose(pickle.loads(pickle.dumps(encoder)).encode(SENTENCES), z, atol=1e-5)

@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_windows_equal_packed_rows(corpus, context):
    net = jepa(context)
    net.prediction_scale.fill_(0.5)
    encoder = lib.SentenceEncoder(net, corpus.tokenizer)
    sentences = max((corpus.document(i) for i in range(corpus.n_documents)), key=len)
    number = torch.from_numpy(np.repeat(np.arange(len(sentences)), list(map(len, sentences))))[None]
    ids, document = torch.from_numpy(np.concatenate(sentences)).long()[None], 0 * number.unique()[None]
    with torch.no_grad():
        packed = 0.5 * net.predict(ids, number, document, net.masks(number, document)[1])[0]
    windows, text = [(0, n) for n in range(1, len(packed) + 1)], list(map(corpus.tokenizer.decode, sentences))
    assert np.allclose(encoder.predict_windows(sentences, windows, batch_size=2), packed, atol=1e-5)
    assert np.allclose(encoder.predict_next(text), packed[-1], atol=1e-4)
    assert np.allclose(encoder.predict_next(iter([text[:2], tuple(text)])), packed[[1, -1]], atol=1e-4)
    assert np.isfinite(encoder.predict_next([text[0], ''])).all()
    z = encoder.encode_tokens(sentences)
    with contextlib.nullcontext() if context == 'concepts' else pytest.raises(UserError, match='tokens'):
        assert np.allclose(encoder.roll(3 * z, windows, batch_size=3), packed, atol=1e-5)

@pytest.mark.parametrize('kind', [
    tuple, iter, np.array, lambda x: np.array(x, object), lambda x: dict.fromkeys(x).keys(),
    lambda x: pd.Series(x, index=range(9, 13)), lambda x: {'text': x}, lambda x: [{'text': s} for s in x],
    lambda x: iter([{'text': x[:3]}, {'text': np.array(x[3:])}])])
def test_texts_come_in_any_sequence(encoder, kind):
    for read in (encoder.encode, encoder.predict_next):
        assert np.allclose(read(kind(SENTENCES)), read(SENTENCES), atol=1e-6)

@pytest.mark.parametrize(('wrong', 'place'), [
    (None, 'NoneType'), (3, 'int'), (b'He.', 'bytes'), (pd.DataFrame({'text': ['He went.']}), 'DataFrame'),
    (['a', None], r'\[1\]'), (['a', math.nan], r'\[1\]'), ([b'He.'], r'\[0\]'), (['a', ['b']], r'\[1\]'),
    ([['a'], 'b'], r'\[0\]'), ({'label': ['a']}, 'dict'), ({'text': ['a', 1]}, r"\['text'\]\[1\]"),
    ([{'text': None}], r"\[0\]\['text'\]"), (np.zeros((2, 3)), r'\[0\]'), (np.array('He.'), 'ndarray'),
    (torch.zeros(2), r'\[0\]'), ([np.zeros((2, 2))], r'\[0\]')], ids=lambda x: repr(x)[:20])
def test_what_is_no_text_is_refused_by_its_place(encoder, wrong, place):
    for read in (encoder.encode, encoder.predict_next):
        with pytest.raises(UserError, match=f'^sentences.*{place}.*str$'):
            read(wrong)

@settings(max_examples=150 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(), max_size=30), wrong=st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.binary(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.just('text') | st.text(max_size=2), x)))
def test_any_input_is_encoded_or_refused(encoder, text, wrong):
    z = encoder.encode([text, f' {text}\n'])
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-4)
    assert np.allclose(z[0], z[1], atol=1e-5)
    for read in (encoder.encode, encoder.predict_next):
        with contextlib.suppress(UserError):
            assert read(wrong).shape[-1] == 32

def test_arguments_that_mean_nothing_are_refused(encoder):
    writer, c = lib.ConceptDecoder(decoder(), encoder.tokenizer), encoder.encode(SENTENCES)
    refused = [(encoder.encode, (SENTENCES, size), 'batch_size') for size in (0, -1)]
    refused += [(encoder.predict_next, (nothing,), 'at least one') for nothing in ([], [[]], [['a'], []])]
    wrong = c[:, :31], c[None], np.full((2, 32), np.nan), [['a'] * 32], [[10**400] * 32], 'He went.', None
    wrong += (torch.from_numpy(c).requires_grad_(),)
    refused += [(writer.generate, (concepts,), 'concepts') for concepts in wrong]
    refused += [(writer.generate, (c, *how), 'expected') for how in (
        (-1,), (math.nan,), (1, -1), (1, 0, 0), (1, 0, 1.5), (1, 0, 1, 0), (1, 0, 1, -3), (1, 0, 1, 9, 0))]
    for call, values, says in refused:
        with pytest.raises(UserError, match=says):
            call(*values)
    with pytest.raises(ValueError, match='could not convert'):
        writer.generate('He went.')
    with pytest.raises(TypeError):
        encoder.encode(SENTENCES, batchsize=3)
    texts = writer.generate(c, max_tokens=5)
    for same in (torch.from_numpy(c), c.tolist(), list(c), c.astype(float)):
        assert writer.generate(same, max_tokens=5, batch_size=3) == texts
    hot = [writer.generate(c, 1.0, max_tokens=5, seed=s) for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert (writer.generate(c[0], max_tokens=5), writer.generate(c[:0])) == (texts[:1], [])

@pytest.fixture
def saved(corpus, tmp_path):
    """An out_dir with an encoder, a decoder and a language model."""
    for kind, net in (('encoder', jepa()), ('decoder', decoder()), ('language_model', decoder())):
        save_checkpoint(str(tmp_path / f'{kind}.pt'), {
            'kind': kind, 'config': vars(net.config), 'model': net.state_dict(), 'settings': {'seed': 1},
            'step': 7, 'tokenizer': corpus.meta['tokenizer'], 'fingerprint': 3.0 * (kind != 'encoder')})
    return tmp_path

def test_loading(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved))
    for path in (saved, str(saved / 'encoder.pt'), '~/encoder.pt'):
        loaded = lib.load_encoder(path, device=None)
        assert (loaded.step, loaded.settings, loaded.fingerprint) == (7, {'seed': 1}, jepa().fingerprint())
    for kind in ('decoder', 'language_model'):
        writer = lib.load_decoder(saved, kind=kind)
        assert (writer.step, writer.settings, writer.fingerprint) == (7, {'seed': 1}, 3.0)
    low = lib.load_encoder(saved, dtype='bfloat16').encode(SENTENCES)
    assert np.allclose(low, loaded.encode(SENTENCES), atol=0.05)
    for wrong in ('float16', 'bf16', torch.float16):
        with pytest.raises(UserError, match='dtype'):
            lib.load_encoder(saved, dtype=wrong).encode('a')

def test_what_cannot_be_loaded_is_told_apart(saved, monkeypatch):
    """A good file is never called damaged: not without a GPU or memory. Code in a file is not run."""
    class Code:
        def __reduce__(self):
            return open, (str(saved / 'ran'), 'w')

    def assert_says(says, load, *given):
        with pytest.raises(UserError, match=says):
            load(*given)
    path = saved / 'encoder.pt'
    content = path.read_bytes()
    for device in ('cuda', 'cuda:1', 'mps', 'gpu'):
        assert_says(f'device={device}((?!damage).)*$', lib.load_encoder, saved, device)
    assert_says('no encoder', lib.load_encoder, saved / 'decoder.pt')
    assert_says('no decoder', lib.load_decoder, path)
    assert_says('train_encoder.py', lib.load_encoder, saved / 'nowhere')
    assert_says('train_decoder.py', lib.load_decoder, saved / 'nowhere')
    torch.save({'kind': 'encoder', 'format': 8, 'run': Code()}, saved / 'code.pt')
    wrong = [content[:n] for n in (0, 1, 200, len(content) // 2, len(content) - 1)]
    for data in (*wrong, b'text', b'\x80', pickle.dumps({'kind': print}), (saved / 'code.pt').read_bytes()):
        path.write_bytes(data)
        assert_says('damaged', lib.load_encoder, saved)
    assert not (saved / 'ran').exists()
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(torch, 'load', lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        assert_says('(?i)memory((?!damage).)*$', lib.load_encoder, saved)
