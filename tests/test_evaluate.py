"""evaluate.py: measures against their references, models that cheat, files with faults, and the whole on small data."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from datasets import Dataset, DatasetDict
from scipy.stats import spearmanr

import evaluate as ev
import model as lib
from prepare import Corpus


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 300), rng.standard_normal(300)
    value, low, high = ev.spearman(a, b)
    assert value == pytest.approx(100 * spearmanr(a, b).statistic)
    draws = [rng.integers(0, 300, 300) for _ in range(400)]
    again = [100 * spearmanr(a[i], b[i]).statistic for i in draws]
    assert (low, high) == pytest.approx(np.quantile(again, (0.025, 0.975)), abs=2)
    assert ev.spearman(a, a * 3 + 1)[0] == pytest.approx(100)
    assert ev.spearman(1 + 1e-8 * b, b)[0] == 0, 'noise of rounding is no order'


def test_text_scores_are_those_of_the_command_line(tmp_path):
    truth = ['The river stood near the stone.', 'A cloud, and 12 lanterns!', 'Nothing else was said.']
    wrote = ['The river stood by the stone.', 'A cloud and 13 lanterns.', 'Nobody said it.']
    for name, lines in (('truth', truth), ('wrote', wrote)):
        (tmp_path / name).write_text('\n'.join(lines) + '\n')
    got = ev.text_scores(wrote, truth)
    for name, key in (('bleu', 'BLEU'), ('chrf', 'chrF')):
        said = subprocess.run([sys.executable, '-m', 'sacrebleu', tmp_path / 'truth', '-i', tmp_path / 'wrote', '-m', name, '-b', '-w', '6'],
                              capture_output=True, text=True, check=True).stdout
        assert got[key] == pytest.approx(float(said), abs=1e-5)
    # by hand: 5 of 6 and 6 words in common, then 4 of 5 and 5, then 1 of 3 and 4
    assert got['ROUGE-1'] == pytest.approx(100 * (5 / 6 + 4 / 5 + 2 / 7) / 3)


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


def test_tfidf_knows_what_the_split_never_had():
    """Unseen grams count, most of all: a name that only this document has is what tells it from the others."""
    vectors = ev.tfidf([[1, 2, 3], [1, 2], [1, 4, 5]])
    dense = vectors([[1, 2, 3], [4, 5], [1, 77], [7], []])
    assert np.allclose(np.sqrt(dense.multiply(dense).sum(1)).ravel(), [1, 1, 1, 1, 0])
    like = (vectors([[1, 2, 3], [1, 77, 8]]) @ dense.T).toarray()
    assert like[0].argmax() == 0
    assert like[0, 3] == 0
    assert like[1].argmax() == 2


def test_rollouts_read_what_was_predicted(corpus_dir):
    """A predictor that says where it looked: the last thing read, one step further along its first axis."""
    items = ev.Items(Corpus(corpus_dir, 'train'), np.random.default_rng(8), 40)
    z = np.random.default_rng(9).standard_normal((len(items.document), 4)).astype(np.float32)
    lengths = []

    def predict(concepts, windows):
        lengths.append([b - a for a, b in windows])
        return np.stack([concepts[int(b) - 1] + [1, 0, 0, 0] for a, b in windows]).astype(np.float32)
    starts = np.arange(0, 30, 3)
    windows = [z[items.start[i]:items.target[i]] for i in starts]
    found = ev.roll_out(windows, predict, lambda p: p, 8)
    for h in range(ev.HORIZON):
        assert np.allclose(found[h], z[items.target[starts] - 1] + np.array([h + 1, 0, 0, 0]), atol=1e-4)
    assert max(map(max, lengths)) == 8
    text = ev.roll_out(windows, predict, lambda p: 0 * p, 8)  # fed back as something else
    assert np.allclose(text[3], [1, 0, 0, 0])


class Cheat(lib.SentenceEncoder):
    """A SentenceEncoder in all but what it makes of a sentence and of a window; `topic` is {sentence: vector}."""

    def encode_tokens(self, sequences, batch_size=64, show_progress_bar=None):
        return np.stack([self.concept(s) for s in sequences])

    def roll(self, concepts, windows, batch_size=256):
        return np.stack([self.guess(concepts, a, b) for a, b in windows])

    def concept(self, ids):
        """Its words, each a vector of its own, and the topic of its document."""
        words = np.random.default_rng([5, len(ids), *map(int, ids)]).standard_normal(32)
        return ev.unit(words + self.topic.get(tuple(ids), 0))

    def guess(self, concepts, a, b):
        return concepts[a:b].mean(0)


class Constant(Cheat):
    def concept(self, ids):
        return ev.unit(np.ones(32))


class RankOne(Cheat):
    def concept(self, ids):
        return super().concept(ids)[0] / abs(super().concept(ids)[0]) * ev.unit(np.ones(32))


class Topic(Cheat):
    """Each sentence is its document's mean, and nothing of its own."""
    def concept(self, ids):
        return ev.unit(self.topic.get(tuple(ids), np.ones(32)))


class Copy(Cheat):
    def guess(self, concepts, a, b):
        return concepts[b - 1]


class Leak(Cheat):
    def guess(self, concepts, a, b):
        return concepts[min(b, len(concepts) - 1)]


class LeakyModel(Cheat):
    """Its predictor sees the sentence after; whoever gives it the window alone does not notice."""
    def guess(self, concepts, a, b):
        forward = self.model.predictor.forward
        if forward.__name__ != 'leaky':
            def leaky(c, document):
                return forward(c, document) + 5 * c.roll(-1, 1)
            self.model.predictor.forward = leaky
        return concepts[a:b].mean(0)


class Lot(Cheat):
    """Predictions by lot."""
    def guess(self, concepts, a, b):
        return ev.unit(np.random.default_rng([int(a), int(b)]).standard_normal(32))


@pytest.mark.parametrize(('kind', 'word'), [
    (Constant, 'collapsed'), (RankOne, 'collapsed'), (Topic, 'topic only'), (Copy, 'topic only'), (Leak, 'leaks'), (LeakyModel, 'leaks'), (Lot, 'collapsed'),
    (None, 'topic only')])
def test_what_a_cheat_gets(trained, corpus_dir, kind, word):
    """Each the verdict it deserves, and no number that flatters it. None: the same model with random weights."""
    corpora = [Corpus(corpus_dir, split) for split in ('train', 'val')]
    encoder = lib.load_encoder(trained)
    if kind:
        encoder.__class__, encoder.topic, rng = kind, {}, np.random.default_rng(1)
        for corpus in corpora:
            for d in range(corpus.n_documents):
                encoder.topic |= dict.fromkeys(map(tuple, corpus.document(d)), rng.standard_normal(32))
    else:
        encoder = ev.random_encoder(encoder, [s for d in range(20) for s in corpora[0].document(d)], 7)
    pairs = [(i % 5, f'The river {i} stood.', f'The stone {i * i % 7} stood.') for i in range(40)]
    s = ev.Study(encoder, None, *corpora, sts_pairs={'sts': pairs})
    got = ev.evaluate(s)
    assert ev.verdict(got)[0] == word
    (a, b), skill = (got[f'retrieval {where}'] for where in ('in document', 'corpus')), got['feature similarity']['model']['skill']
    if kind in (Constant, Lot):
        assert skill < 0.02
        assert a['model']['MRR'] < a['chance']['MRR'] + 0.05
        assert b['model']['MRR'] < b['chance']['MRR'] + 0.03
    if kind is Constant:
        alone = ((s.candidates['a'] >= 0).sum(1) == 1).mean()  # in its document, outside the window
        assert a['model']['R@1'] == pytest.approx(alone), 'all alike: the worst rank'
        assert b['model']['R@1'] == 0
        assert got['contrast']['model']['CA'] == 0
        assert got['STS, Spearman x 100']['model']['sts'] == 0
        assert got['geometry']['model']['RankMe, centred'] == pytest.approx(1, abs=1e-3)
        probes = got['probes']
        assert probes['model']['length, R²'] <= 0.01
        assert probes['model']['document, accuracy'] <= probes['guess']['document, accuracy'] + 0.02
    if kind is Topic:
        assert b['model']['MRR'] > 0.9
        assert a['model']['MRR'] < a['chance']['MRR'], 'no sentence of the document is told from another'
        assert got['probes']['model']['document, accuracy'] > 0.9
    if kind is Leak:
        assert a['model']['MRR'] == b['model']['MRR'] == 1
    if kind is Copy:
        assert got['model minus baseline']['copy-last'] == pytest.approx(dict.fromkeys(got['model minus baseline']['copy-last'], 0))
    less, tfidf = got['model minus baseline']['TF-IDF of the window'], 'TF-IDF of the window'
    assert less['in-document R@1'] == pytest.approx(a['model']['R@1'] - a[tfidf]['R@1'])
    assert less['corpus MRR'] == pytest.approx(b['model']['MRR'] - b[tfidf]['MRR'])
    assert less['corpus MRR_low'] <= less['corpus MRR'] <= less['corpus MRR_high']


def test_ridge_takes_the_penalty_that_predicts():
    """Where there is nothing to learn, the largest; where all is linear, the smallest."""
    rng = np.random.default_rng(8)
    x, document = rng.standard_normal((300, 40)), np.arange(300)
    y = x @ rng.standard_normal((40, 5))
    predict, scale = ev.fit_ridge(x, y, document)
    assert np.abs(scale * predict(x) - y).max() < 0.1 * np.abs(y).max()
    predict, scale = ev.fit_ridge(x, rng.standard_normal((300, 5)), document)
    assert np.abs(scale * predict(x)).max() < 0.3
    held_out = rng.integers(0, 3, 300)  # one offset a document, so that rows of it give each other away
    predict, scale = ev.fit_ridge(np.eye(3)[held_out], rng.standard_normal((3, 5))[held_out], held_out)
    assert abs(scale) < 1.5


def test_skill_over_another_prediction():
    rng = np.random.default_rng(9)
    z = ev.unit(rng.standard_normal((200, 8)))
    p, q, document = ev.unit(z + rng.standard_normal(z.shape)), ev.unit(z + 2 * rng.standard_normal(z.shape)), np.arange(200)
    both = ev.skills(p, z, z.mean(0), 0.5, document)[0] - ev.skills(q, z, z.mean(0), 0.3, document)[0]
    assert ev.skills(p, z, z.mean(0), 0.5, document, 0.3 * q)[0] == pytest.approx(both)
    assert ev.skills(p, z, z.mean(0), 0.5, document, 0.5 * p) == pytest.approx((0, 0, 0))


def test_verdicts():
    def sections(skill, copy, inside, corpus, cos, rank, leak=0.0):
        near = {'low': 0.01}
        less = {'copy-last': {'skill_low': skill - copy - 0.01},
                'random encoder': {'in-document MRR_low': inside - 0.13, 'corpus MRR_low': corpus - 0.02}}
        return {'feature similarity': {'model': {'skill': skill, 'skill_low': skill - near['low'], 'skill_high': skill + 0.01},
                                       'copy-last': {'skill': copy}},
                'model minus baseline': less, 'leak': {'model': {'distance': leak}},
                'geometry': {'model': {'RankMe, centred': rank, 'dimensions': 100, 'cosine of random pairs': cos}},
                'retrieval in document': {'model': {'MRR': inside, 'MRR_low': inside - 0.01}, 'chance': {'MRR': 0.12}},
                'retrieval corpus': {'model': {'MRR': corpus, 'MRR_low': corpus - 0.01}, 'chance': {'MRR': 0.01}}}
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.0, 80))[0] == 'learns'
    assert ev.verdict(sections(0.1, 0.05, 0.12, 0.3, 0.0, 80))[0] == 'topic only'
    assert ev.verdict(sections(0.03, 0.05, 0.3, 0.3, 0.0, 80))[0] == 'topic only'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.9, 80))[0] == 'collapsed'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.0, 1))[0] == 'collapsed'
    assert ev.verdict(sections(-0.2, 0.05, 0.12, 0.3, 0.0, 80))[0] == 'collapsed'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.01, 0.0, 80))[0] == 'collapsed', 'at chance'
    assert ev.verdict(sections(0.1, 0.05, 0.3, 0.3, 0.0, 80, leak=0.2))[0] == 'leaks'
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
    ('s1,s2\nx,y\n', 'line 2'), ('a,"b\nb",1\nc,d,nan\n', 'line 3'), ('1\ta\tb\n\tc\td\n', 'line 2'), ('1,Yes, said he.,b\n', 'quotes')])
def test_sts_files_with_faults(tmp_path, content, says):
    (tmp_path / 'bad.csv').write_text(content)
    with pytest.raises(ev.Mistake, match=says):
        ev.read_sts(tmp_path / 'bad.csv')


def test_text_is_shown_as_it_is():
    assert ev.escape('<b>*x*</b>\n| y') == '\\<b\\>\\*x\\*\\</b\\> \\| y'
    assert ev.escape('שלום 👩‍👩‍👧') == 'שלום 👩‍👩‍👧'
    assert ev.escape('a\0b\x9f') == 'a\ufffdb\ufffd'


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
    assert report.count('**context**') == report.count('**language model**') == 3
    assert report.startswith(f"# {metrics['verdict']}\n\nBaselines ahead of the model, by however little: ")
    assert report.rstrip().splitlines()[-1].startswith(f"**{metrics['verdict']}**: ")
    for name in ('retrieval', 'spectrum', 'cosines', 'horizon', 'training_encoder', 'training_decoder', 'map'):
        name += '.png'
        assert os.path.getsize(os.path.join(trained, name)) > 5000
        assert f']({name})' in report
    ahead = metrics['metrics']['rollout, sentences ahead']
    assert len(ahead) == 3 * ev.HORIZON
    assert ahead['concepts, 1']['MRR'] > ahead['concepts, 1']['chance']
    assert 0 < ahead['text, 8']['distinct-2'] <= 1
    nats = metrics['metrics']['perplexity']
    assert nats['no concept']['information'] == 0
    assert metrics['metrics']['text']['reconstruct, of 32 tokens at most']['sentences'] <= 20
    encoder = lib.load_encoder(trained)
    told = [np.linalg.norm(encoder.predict(['The river number 3 stood near.'] * n)) for n in (1, 2, 8, 20)]
    assert 0.1 < min(told) < max(told) < 0.9, 'a prediction is less sure than a sentence'
    assert nats['language model, reading the window']['nats per token'] > 0
    assert nats['D(z)']['perplexity'] == pytest.approx(np.exp(nats['D(z)']['nats per token']))
    run('evaluate.py', *arguments)
    assert open(os.path.join(trained, 'report.md'), encoding='utf-8').read() == report, 'the same seed, the same report'


def test_a_model_that_reads_tokens_is_rolled_out_as_text(trained, corpus_dir, monkeypatch):
    monkeypatch.setattr(ev, 'MAX_ROLLOUTS', 10)
    of_concepts, decoder = lib.load_encoder(trained), lib.load_decoder(trained)
    net = lib.JEPA(replace(of_concepts.model.config, context='tokens'))
    net.load_state_dict(of_concepts.model.state_dict())
    s = ev.Study(lib.SentenceEncoder(net, of_concepts.tokenizer), decoder, Corpus(corpus_dir, 'train'), Corpus(corpus_dir, 'val'))
    rows = ev.rollouts(s)['rollout, sentences ahead']
    assert {name.partition(',')[0] for name in rows} == {'text', 'copy-last'}
    assert len(rows) == 2 * ev.HORIZON
    assert 0 < rows['text, 8']['distinct-2'] <= 1


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
        x = torch.cat((net.prefixes(torch.from_numpy(z[i:i + 1])), net.embedding(torch.tensor(sentence)[None])), 1)
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
            loss = writer.model.losses(tokens, sentence, none, torch.ones(len(tokens[0]), len(tokens[0])).tril().bool())
        assert together[i] == pytest.approx(loss[0, -len(parts[-1]):].sum().item(), rel=1e-4)
    assert writer.nll_in_context(ids[:1], [[ids[2]]])[0] != pytest.approx(together[0], rel=1e-4)
    assert writer.nll_in_context(ids[2:], [[]])[0] == pytest.approx(writer.nll(ids[2:])[0], rel=1e-4)


def test_a_prompt_is_answered(trained):
    done = run('evaluate.py', f'--out_dir={trained}', '--prompt=The river was wide. The stone was not.', '--steps=3')
    assert done.stdout.count('sentence: ') == 2
    assert done.stdout.count('written: ') == 2 + 3


def test_answers_as_json(trained, tmp_path):
    """From a file, from standard input; neighbours from a file; several samples; what lies between two sentences."""
    (tmp_path / 'prompt.txt').write_text('The river was wide. The stone was not.')
    (tmp_path / 'texts.txt').write_text('The copper cloud stood near.\nA garden! A letter.\n')
    common = [f'--out_dir={trained}', '--json=True', f'--corpus={tmp_path}/texts.txt']
    found = json.loads(run('evaluate.py', *common, f'--prompt_file={tmp_path}/prompt.txt', '--steps=2', '--num_samples=3', '--temperature=1',
                           '--max_new_tokens=5').stdout)
    assert [s['sentence'] for s in found['sentences']] == ['The river was wide.', 'The stone was not.']
    assert {n['text'] for n in found['sentences'][0]['nearest']} == {'The copper cloud stood near.', 'A garden!', 'A letter.'}
    assert [(c['sample'], c['step']) for c in found['continuations']] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    piped = subprocess.run([sys.executable, 'evaluate.py', *common, '--prompt=-'], cwd=ROOT, text=True, capture_output=True,
                           input='The river was wide. The stone was not.')
    assert json.loads(piped.stdout)['sentences'][1]['sentence'] == 'The stone was not.'
    walk = json.loads(run('evaluate.py', *common, '--interpolate=The copper cloud stood near. || A letter.').stdout)['interpolation']
    assert len(walk) == 9
    assert walk[0]['nearest'][0] == {'text': 'The copper cloud stood near.', 'cosine': pytest.approx(1, abs=1e-4)}
    assert walk[-1]['nearest'][0]['text'] == 'A letter.'


def test_mteb_takes_the_encoder(trained, monkeypatch):
    """A task of a few pairs, without the hub, gives what this program's own Spearman gives.

    The README's namespace is what MTEB is given: an object with `predict` is a cross-encoder to it.
    """
    mteb = pytest.importorskip('mteb', reason='needs `pip install mteb`')
    from mteb.abstasks.sts import AbsTaskSTS
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    pairs = [(i % 5, f'The river {i} stood near the {"stone" if i % 3 else "cloud"}.', f'A stone number {i * i % 7}.') for i in range(30)]

    class Pairs(AbsTaskSTS):
        metadata = mteb.TaskMetadata(name='Pairs', description='a few pairs', type='STS', category='t2t', eval_splits=['test'],
                                     eval_langs=['eng-Latn'], main_score='cosine_spearman', reference=None, date=None, domains=None,
                                     task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
                                     bibtex_citation=None, dataset={'path': 'none', 'revision': 'none'})

        def load_data(self, **_):
            columns = dict(zip(('score', 'sentence1', 'sentence2'), map(list, zip(*pairs))))
            self.dataset, self.data_loaded = DatasetDict({'test': Dataset.from_dict(columns)}), True
    encoder = lib.load_encoder(trained)
    model = SimpleNamespace(encode=encoder.encode, similarity=encoder.similarity,
                            similarity_pairwise=encoder.similarity_pairwise, mteb_model_meta=None)
    result, = mteb.evaluate(model, Pairs(), cache=None, show_progress_bar=False).task_results
    a, b = (encoder.encode([p[i] for p in pairs]) for i in (1, 2))
    assert 100 * result.get_score() == pytest.approx(ev.spearman(encoder.similarity_pairwise(a, b), [p[0] for p in pairs])[0], abs=0.5)


@pytest.mark.parametrize(('argument', 'says'), [
    ('--out_dir=nowhere', 'train_encoder.py'), ('--prompt_file=nowhere.txt', 'nowhere.txt'), ('--interpolate=one sentence', '||'), ('--interpolate=a || b --prompt=c', 'not both'),
    ('--judge=no/such/folder', '--judge=no/such/folder'), ('--prompt= ', 'no sentence'), ('--prompt=', 'no sentence'), ('--sts=nowhere.csv', 'nowhere.csv'),
    ('--max_pair=3', 'max_pairs'), ('--max_pairs=0', '1 or more'), ('--dtype=fp16', 'bfloat16'), ('--device=cuda:9', 'CUDA'), ('--device=True', 'cuda'), ('--top_p=0', 'top_p')])
def test_mistakes_are_one_line(trained, argument, says):
    done = run('evaluate.py', f'--out_dir={trained}', *argument.replace(' --', '\n--').split('\n'), check=False)
    assert done.returncode != 0
    assert says in done.stderr
    assert 'Traceback' not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
