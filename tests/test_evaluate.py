"""evaluate.py: measures against their references, models that cheat, files with faults, and the whole on small data."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import run
from scipy.stats import spearmanr

import evaluate as ev
import model as lib
from prepare import Corpus


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 300), rng.standard_normal(300)
    assert ev.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert ev.spearman(a, a * 3 + 1) == pytest.approx(1)
    assert ev.spearman(np.ones(300), b) == 0


def test_ranks_are_the_worst_among_equals_and_match_brute_force():
    rng = np.random.default_rng(1)
    p, z = rng.standard_normal((50, 8)), rng.standard_normal((90, 8))
    candidates = np.array([[i, *(j for j in range(90) if j != i)][:40] for i in range(50)])
    candidates[:, -3:] = -1
    got, _ = ev.ranks(lambda at: torch.from_numpy(p[at] @ z.T), candidates)
    for i in range(50):
        score = z[candidates[i, :37]] @ p[i]
        assert got[i] == 1 + (score[1:] >= score[0]).sum()
    same, _ = ev.ranks(lambda at: torch.ones(len(at), 90), candidates)
    assert (same == 37).all()


def test_chance_is_what_a_draw_by_lot_gets():
    rng = np.random.default_rng(2)
    candidates = np.tile(np.arange(32), (4000, 1))
    got, _ = ev.ranks(lambda at: torch.from_numpy(rng.random((len(at), 32))), candidates)
    one, mrr = ev.chance(candidates)
    assert one == pytest.approx(1 / 32)
    assert mrr == pytest.approx((1 / got).mean(), abs=0.01)


def test_rank_of_a_known_spectrum():
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((500, 20)))[0]
    s = np.concatenate((np.ones(5), np.full(15, 1e-9)))
    assert lib.rank_me(torch.from_numpy((q * s) @ np.eye(20))) == pytest.approx(5, rel=1e-3)


def test_the_interval_covers_and_narrows_with_documents():
    rng = np.random.default_rng(4)
    documents = np.repeat(np.arange(400), 5)
    values = rng.standard_normal(400)[documents] + 3
    mean, low, high = ev.bootstrap(values, documents)
    assert low < mean < high
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values[::5].std() / 20, rel=0.15)
    few = ev.bootstrap(values[:500], documents[:500])
    assert few[2] - few[1] > 1.5 * (high - low)


def test_ridge_finds_a_linear_map():
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2000, 6)), rng.standard_normal((6, 3))
    got, offset = ev.ridge(x, x @ w + 2, penalty=1e-6)
    assert np.allclose(got, w, atol=1e-3)
    assert np.allclose(offset, 2, atol=1e-3)


def test_tfidf_is_nearest_to_itself():
    sentences = [np.array(s) for s in ([1, 2, 3], [4, 5], [1, 2, 9, 9], [7], [])]
    matrix, vector = ev.tfidf(sentences, sentences)
    dense = matrix.to_dense().numpy()
    assert np.allclose(np.linalg.norm(dense, axis=1), [1, 1, 1, 1, 0], atol=1e-6)
    index, value = vector(np.array([1, 2, 3]))
    assert (dense[:, index] @ value).argmax() == 0
    assert (dense[:, index] @ value)[1] == 0


def test_rollouts_read_what_was_predicted(corpus_dir):
    """A predictor that says where it looked: the last thing read, one step further along its first axis."""
    items = ev.Items(Corpus(corpus_dir, 'train'), np.random.default_rng(8), 40)
    z = np.random.default_rng(9).standard_normal((len(items.document), 4)).astype(np.float32)
    lengths = []

    def predict(concepts, windows):
        lengths.append([b - a for a, b in windows])
        return np.stack([concepts[b - 1] + [1, 0, 0, 0] for a, b in windows]).astype(np.float32)
    starts = np.arange(0, 30, 3)
    found = ev.roll_out(items, z, starts, predict, lambda p: p, 8)
    for h in range(ev.HORIZON):
        assert np.allclose(found[h], z[items.target[starts] - 1] + np.array([h + 1, 0, 0, 0]), atol=1e-4)
    assert max(map(max, lengths)) == 8
    text = ev.roll_out(items, z, starts, predict, lambda p: 0 * p, 8)  # fed back as something else
    assert np.allclose(text[3], [1, 0, 0, 0])


def cheats(items, z, rng):
    """Predictions (n, d) of models that know nothing, only the topic, the last sentence, or the answer."""
    topic = np.stack([z[items.document == d].mean(0) for d in items.document[items.target]])
    return {'constant': np.ones((len(items.target), z.shape[1])), 'random': rng.standard_normal((len(items.target), z.shape[1])),
            'topic': topic, 'copy': z[items.target - 1], 'leak': z[items.target]}


def test_what_a_cheat_gets(corpus_dir):
    rng = np.random.default_rng(6)
    items = ev.Items(Corpus(corpus_dir, 'train'), rng, 600)
    subject = rng.standard_normal((items.document[-1] + 1, 16))
    z = ev.unit(subject[items.document] + rng.standard_normal((len(items.document), 16)))
    candidates = items.candidates(rng, 8)
    document, true = items.document[items.target], z[items.target]
    got = {}
    for name, p in cheats(items, z, rng).items():
        p = ev.unit(p)
        mrr = {k: (1 / ev.ranks(lambda at, p=p: torch.from_numpy(p[at] @ z.T), c)[0]).mean() for k, c in candidates.items()}
        scale = (p * true).sum() / (p * p).sum()
        got[name] = mrr, ev.skills(p, true, true.mean(0), scale, document)[0]
    (_, chance_a), (_, chance_corpus) = ev.chance(candidates['a']), ev.chance(candidates['corpus'])
    for name in ('constant', 'random'):
        assert got[name][0]['a'] < chance_a + 0.03
        assert got[name][0]['corpus'] < chance_corpus + 0.03
        assert got[name][1] < 0.01
    assert got['topic'][0]['corpus'] > 5 * chance_corpus, 'the topic tells documents apart'
    assert got['copy'][0]['corpus'] > 2 * chance_corpus
    assert got['leak'][0]['a'] == got['leak'][0]['corpus'] == 1
    assert got['leak'][1] == pytest.approx(1)


def test_a_constant_encoder_gets_chance_or_less():
    """The space in which all is one: cosine 1 with everything, and every measure says that it is worthless."""
    rng = np.random.default_rng(7)
    z = np.repeat(ev.unit(rng.standard_normal((1, 16))), 100, 0)
    candidates = np.stack([np.roll(np.arange(100), -i)[:32] for i in range(100)])
    got, _ = ev.ranks(lambda at: torch.from_numpy(z[at] @ z.T), candidates)
    assert (got == 32).all()
    assert ev.skills(z, z, z.mean(0), 1.0, np.arange(100))[0] == 0
    shape = ev.geometry(z, rng)
    assert shape['cos_random'] == pytest.approx(1, abs=1e-5)
    assert shape['rank_centred'] <= 1.01


def test_ridge_takes_the_penalty_that_predicts():
    """Where there is nothing to learn, the largest; where all is linear, the smallest."""
    rng = np.random.default_rng(8)
    x, document = rng.standard_normal((300, 40)), np.arange(300)
    w = rng.standard_normal((40, 5))
    (linear, _), scale = ev.fit_ridge(x, x @ w, document)
    assert np.abs(scale * linear - w).max() < 0.2
    (nothing, _), scale = ev.fit_ridge(x, rng.standard_normal((300, 5)), document)
    assert np.abs(scale * nothing).max() < 0.05


def test_skill_over_another_prediction():
    rng = np.random.default_rng(9)
    z = ev.unit(rng.standard_normal((200, 8)))
    p, q, document = ev.unit(z + rng.standard_normal(z.shape)), ev.unit(z + 2 * rng.standard_normal(z.shape)), np.arange(200)
    both = ev.skills(p, z, z.mean(0), 0.5, document)[0] - ev.skills(q, z, z.mean(0), 0.3, document)[0]
    assert ev.skills(p, z, z.mean(0), 0.5, document, 0.3 * q)[0] == pytest.approx(both)
    assert ev.skills(p, z, z.mean(0), 0.5, document, 0.5 * p) == pytest.approx((0, 0, 0))


def test_verdicts():
    def sections(skill, copy, inside, corpus, cos, rank):
        near = {'low': 0.01}
        gains = {'skill over copy-last': {'gain_low': skill - copy - 0.01}, 'MRR in document over the random encoder':
                 {'gain_low': inside - 0.13}, 'MRR in corpus over the random encoder': {'gain_low': corpus - 0.02}}
        return {'feature similarity': {'model': {'skill': skill, 'skill_low': skill - near['low'], 'skill_high': skill + 0.01},
                                       'copy-last': {'skill': copy}},
                'what is learned': gains, 'geometry': {'model': {'rank_centred': rank, 'dimensions': 100, 'cos_random': cos}},
                'retrieval in document': {'model': {'MRR': inside, 'MRR_low': inside - 0.01}, 'chance': {'MRR': 0.12}},
                'retrieval corpus': {'model': {'MRR': corpus}, 'chance': {'MRR': 0.01}}}
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.0, 80))[0] == 'learns'
    assert ev.verdict(sections(0.1, 0.05, 0.12, 0.3, 0.0, 80))[0] == 'topic only'
    assert ev.verdict(sections(0.03, 0.05, 0.3, 0.3, 0.0, 80))[0] == 'topic only'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.9, 80))[0] == 'collapsed'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.0, 1))[0] == 'collapsed'
    assert ev.verdict(sections(-0.2, 0.05, 0.12, 0.01, 0.0, 80))[0] == 'collapsed'
    _, _, beaten = ev.verdict(sections(0.03, 0.05, 0.3, 0.3, 0.0, 80))
    assert beaten == ['copy-last on skill of feature similarity']


def test_sts_files_in_any_order(tmp_path):
    rows = [(3.0, 'A man, a plan.', 'A dog'), (0.5, 'x "y"', 'z')]
    (tmp_path / 'first.tsv').write_text('score\ts1\ts2\n3.0\tA man, a plan.\tA dog\n0.5\tx "y"\tz\n')
    (tmp_path / 'last.csv').write_text('"A man, a plan.",A dog,3.0\n"x ""y""",z,0.5\n')
    assert ev.read_sts(tmp_path / 'first.tsv') == rows
    assert ev.read_sts(tmp_path / 'last.csv') == rows


@pytest.mark.parametrize(('content', 'says'), [
    ('a,b,1\nc,d,high\n', 'line 2'), ('a,b,1\nc,2\n', 'line 2'), ('', 'no pair'), ('s1,s2,score\n', 'no pair'),
    ('s1,s2\nx,y\n', 'line 2')])
def test_sts_files_with_faults(tmp_path, content, says):
    (tmp_path / 'bad.csv').write_text(content)
    with pytest.raises(ev.Mistake, match=says):
        ev.read_sts(tmp_path / 'bad.csv')


def test_text_is_shown_as_it_is():
    assert ev.escape('<b>*x*</b>\n| y') == '\\<b\\>\\*x\\*\\</b\\> \\| y'
    assert ev.escape('שלום 🙂') == 'שלום 🙂'


@pytest.fixture(scope='module')
def trained(corpus_dir, tmp_path_factory):
    """A miniature encoder and decoder, by the scripts."""
    out = str(tmp_path_factory.mktemp('trained') / 'out')
    small = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=4', '--block_size=128', '--compile=False', '--eval_iters=2',
             '--warmup_iters=5', '--max_iters=30', '--eval_interval=30', f'--out_dir={out}']
    run('train_encoder.py', f'--data_dir={corpus_dir}', '--predictor_layer=1', *small)
    run('train_decoder.py', *small)
    run('train_decoder.py', *small, '--language_model=True')
    return out


def test_the_whole_evaluation(trained, tmp_path):
    (tmp_path / 'sts.csv').write_text('\n'.join(f'The river {i} stood,The stone {i * i % 7} stood,{i % 5}' for i in range(20)))
    arguments = [f'--out_dir={trained}', '--max_generated=20', '--max_scored=40', f'--sts={tmp_path}/sts.csv', '--n_samples=3']
    done = run('evaluate.py', *arguments)
    report = open(os.path.join(trained, 'report.md'), encoding='utf-8').read()
    metrics = json.load(open(os.path.join(trained, 'metrics.json'), encoding='utf-8'))
    assert metrics['verdict'] in ('learns', 'topic only', 'collapsed')
    assert metrics['verdict'] in done.stdout
    assert report.count('**context**') == 3
    for name in ('retrieval.png', 'spectrum.png', 'cosines.png', 'horizon.png', 'training.png'):
        assert os.path.getsize(os.path.join(trained, name)) > 5000
        assert f']({name})' in report
    ahead = metrics['metrics']['rollout, sentences ahead']
    assert len(ahead) == 3 * ev.HORIZON
    assert ahead['concepts, 1']['MRR'] > ahead['concepts, 1']['chance']
    assert 0 < ahead['text, 8']['distinct-2'] <= 1
    nats = metrics['metrics']['perplexity']
    assert nats['no concept']['information'] == 0
    assert nats['language model, reading the window']['nats per token'] > 0
    assert nats['D(z)']['perplexity'] == pytest.approx(np.exp(nats['D(z)']['nats per token']))
    run('evaluate.py', *arguments)
    assert open(os.path.join(trained, 'report.md'), encoding='utf-8').read() == report, 'the same seed, the same report'


def test_an_untrained_model_has_learned_nothing(corpus_dir, tmp_path):
    out = f'--out_dir={tmp_path}/out'
    run('train_encoder.py', f'--data_dir={corpus_dir}', out, '--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=4',
        '--block_size=128', '--compile=False', '--eval_iters=2', '--max_iters=1', '--learning_rate=1e-12',
        '--start_passes=0')
    run('evaluate.py', out)
    assert json.load(open(tmp_path / 'out' / 'metrics.json', encoding='utf-8'))['verdict'] != 'learns'


def test_data_of_another_tokenizer_are_refused(trained, tmp_path):
    run('prepare.py', '--dataset=web-bible', '--max_docs=40', '--tokenizer=bpe:400', f'--data_dir={tmp_path}/data', '--val_fraction=0.3')
    for script in ('evaluate.py', 'train_decoder.py'):
        done = run(script, f'--out_dir={trained}', f'--data_dir={tmp_path}/data', check=False)
        assert done.returncode == 1
        assert 'another tokenizer' in done.stderr


def test_perplexity_is_a_loop_over_single_sentences(trained):
    encoder, decoder = lib.load_encoder(trained), lib.load_decoder(trained)
    ids = encoder.tokenizer.encode_batch(['The river number 3 stood near.', 'A stone.', 'The winter of part 4 stood near the copper.'])
    z = encoder.encode_tokens(ids)
    together = decoder.nll(ids, z, batch_size=3)
    net, config = decoder.model, decoder.model.config
    for i, sentence in enumerate(ids):
        x = torch.cat((net.prefixes(torch.from_numpy(z[i:i + 1]), None), net.embedding(torch.tensor(sentence)[None])), 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        rope = lib.rotary(torch.arange(x.shape[1]), net.head_dim)
        for block in net.blocks:
            x = block(x, rope, mask)
        states = net.norm(x)[0, config.n_prefix - 1:] + net.direct(torch.from_numpy(z[i]) * len(z[i]) ** 0.5)
        for place, token in enumerate(sentence, 1):  # what is written is taken from all that follows
            states[place:] -= net.spent * net.token_weight[token] * net.embedding.weight[token]
        says = net.head(states).log_softmax(-1)
        truth = torch.tensor([*sentence, config.eos])
        assert together[i] == pytest.approx(-says[torch.arange(len(truth)), truth].sum().item(), rel=1e-4)


def test_a_language_model_reads_what_stands_before(trained):
    """nll_in_context against one row at a time, without padding; and it is the context that it reads."""
    encoder, writer = lib.load_encoder(trained), lib.load_decoder(trained, kind='language_model')
    ids = encoder.tokenizer.encode_batch(['The river number 3 stood near.', 'A stone.', 'The winter of part 4 stood near the copper.'])
    contexts = [[ids[1]], [ids[0], ids[2]], []]
    together = writer.nll_in_context(ids, contexts)
    for i, before in enumerate(contexts):
        parts = [np.concatenate((np.zeros(writer.model.config.n_prefix, int), s)) for s in (*before, ids[i])]
        tokens = torch.from_numpy(np.concatenate(parts))[None]
        sentence = torch.from_numpy(np.repeat(np.arange(len(parts)), [len(s) for s in parts]))[None]
        none = torch.zeros(1, len(parts), 32)
        with torch.no_grad():
            loss = writer.model.losses(tokens, sentence, none, torch.ones(len(tokens[0]), len(tokens[0])).tril().bool(), none[..., 0])
        assert together[i] == pytest.approx(loss[0, -len(parts[-1]):].sum().item(), rel=1e-4)
    assert writer.nll_in_context(ids[:1], [[ids[2]]])[0] != pytest.approx(together[0], rel=1e-4)
    assert writer.nll_in_context(ids[2:], [[]])[0] == pytest.approx(writer.nll(ids[2:])[0], rel=1e-4)


def test_a_prompt_is_answered(trained):
    done = run('evaluate.py', f'--out_dir={trained}', '--prompt=The river was wide. The stone was not.', '--steps=3')
    assert done.stdout.count('sentence: ') == 2
    assert done.stdout.count('next sentence, in words: ') == 3


@pytest.mark.parametrize(('argument', 'says'), [
    ('--out_dir=nowhere', 'train_encoder.py'), ('--prompt= ', 'no sentence'), ('--prompt=', 'no sentence'), ('--sts=nowhere.csv', 'nowhere.csv'),
    ('--max_pair=3', 'max_pairs'), ('--max_pairs=0', '1 or more'), ('--dtype=fp16', 'bfloat16'), ('--device=cuda:9', 'CUDA'), ('--device=True', 'cuda'), ('--top_p=0', 'top_p')])
def test_mistakes_are_one_line(trained, argument, says):
    done = run('evaluate.py', f'--out_dir={trained}', argument, check=False)
    assert done.returncode != 0
    assert says in done.stderr
    assert 'Traceback' not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
