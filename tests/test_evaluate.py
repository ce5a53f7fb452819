"""evaluate.py: measures against references, models that cheat, files with faults, the whole on small data."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused, start
from scipy.stats import rankdata, spearmanr

import evaluate as ev
import model as lib
from config import UserError
from prepare import Corpus

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=4', '--block_size=128', '--compile=False',
         '--eval_iters=2', '--warmup_iters=5', '--max_iters=30', '--eval_interval=15']

def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(600)
    b = np.round(2 * (a + rng.standard_normal(600)))  # with ties
    found = ev.spearman(a, b)
    assert found[0] == pytest.approx(100 * spearmanr(a, b).statistic)
    index = rng.integers(0, 600, (1000, 600))
    x, y = (rankdata(v[index], axis=1) - 300.5 for v in (a, b))
    again = 100 * (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    assert np.quantile(found[1:], (0.025, 0.975)) == pytest.approx(np.quantile(again, (0.025, 0.975)), abs=1)
    assert ev.spearman(a, a * 3 + 1)[0] == pytest.approx(100)
    assert ev.spearman(1 + 1e-8 * b, b)[0] == 0, 'noise of rounding is no order'

def test_text_scores_are_those_of_the_command_line(tmp_path):
    truth = ['The river stood near the stone.', 'A cloud, and 12 lanterns!', 'Nothing else was said.']
    wrote = ['The river stood by the stone.', 'A cloud and 13 lanterns.', 'Nobody said it. Nobody said so.']
    for name, lines in (('truth', truth), ('wrote', wrote)):
        (tmp_path / name).write_text('\n'.join(lines) + '\n')
    s = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(encode=lambda texts: np.eye(3))),
                        judge=lambda texts: np.eye(3) * len(texts[0]))
    got = ev.text_scores(s, np.array(wrote, object), np.array(truth, object), np.eye(3), np.arange(3))
    for name in ('BLEU', 'chrF'):
        command = ['sacrebleu', tmp_path / 'truth', '-i', tmp_path / 'wrote', '-m', name.lower(), '-b', '-w6']
        said = subprocess.run([sys.executable, '-m', *command], capture_output=True, check=True).stdout
        assert got[name] == pytest.approx(float(said), abs=1e-5)
    # by hand: 5 of 6 and 6 words in common, then 4 of 5 and 5, then 1 of 4 and 6
    assert got['ROUGE-1'][0] == pytest.approx(100 * (5 / 6 + 4 / 5 + 2 / 10) / 3)
    assert got['round trip'][0] == got['judge'][0] == 1
    assert got['repeated bigrams'][0] == pytest.approx(1 / (5 + 4 + 5)), '"nobody said", of all bigrams'

def test_retrieval_takes_the_worst_rank_among_equals_and_matches_brute_force():
    rng = np.random.default_rng(1)
    similar, target = rng.standard_normal((500, 90)), rng.integers(0, 88, 500)
    candidates = rng.integers(0, 90, (500, 40))
    candidates[:, -3:] = target[:, None]  # none
    ranks = np.array([1 + sum(similar[i, c] >= similar[i, t] for c in candidates[i] if c != t)
                      for i, t in enumerate(target)])
    got = ev.retrieved(lambda rows: similar[rows], target, candidates, np.arange(500))
    assert got['MRR'][0] == pytest.approx((1 / ranks).mean())
    assert got['R@10'][0] == pytest.approx((ranks <= 10).mean())
    got = ev.retrieved(lambda rows: np.ones((len(rows), 90)), target, target[:, None] + [[0, 1, 2]], target)
    assert got['MRR'][0] == pytest.approx(1 / 3), 'two others, which are as like'

def test_intervals_cover_narrow_with_documents_and_pair():
    rng = np.random.default_rng(4)
    documents = np.repeat(np.arange(400), 5)
    values = rng.standard_normal(400)[documents] + 3
    found = ev.draws(values, documents)
    low, high = np.quantile(found[1:], (0.025, 0.975))
    assert found[0] == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values[::5].std() / 20, rel=0.15)
    few = ev.draws(values[:500], documents[:500])
    assert few[1:].std() > 1.5 * found[1:].std()
    assert (ev.draws(values, documents, 0 * values) == 0).all(), 'not NaN'
    # a better model by the same small step on every pair, which unpaired intervals would not show
    assert found - ev.draws(values - 0.01, documents) == pytest.approx(0.01)

def test_skill_by_its_formula_and_ridge_by_what_it_predicts():
    rng = np.random.default_rng(9)
    z, document = ev.unit(rng.standard_normal((200, 8))), np.arange(200)
    mean, p = z.mean(0), 0.5 * ev.unit(z + rng.standard_normal(z.shape))
    by_hand = 1 - ((p - z) ** 2).sum() / ((mean - z) ** 2).sum()
    assert ev.skill(p, z, mean, document)[0] == pytest.approx(by_hand, abs=1e-5)
    assert lib.skill(*map(torch.from_numpy, (p, z, mean))) == pytest.approx(by_hand, abs=1e-5)
    assert ev.skill(np.tile(mean, (200, 1)), z, mean, document)[0] == pytest.approx(0, abs=1e-6)
    assert (ev.skill(z * 0 + 1, z * 0 + 1, mean * 0 + 1, document) == 0).all(), 'nothing to explain'
    x = rng.standard_normal((300, 40))
    y = x @ rng.standard_normal((40, 5))
    document = np.arange(300)
    assert np.abs(ev.fit_ridge(x, y, document)(x) - y).max() < 0.2 * np.abs(y).max()
    assert np.abs(ev.fit_ridge(x, rng.standard_normal((300, 5)), document)(x)).max() < 0.8, 'nothing to learn'

def test_pairs_windows_and_other_sentences(corpus_dir):
    rng = np.random.default_rng(8)
    x = ev.Pairs(Corpus(corpus_dir, 'train'), 300, rng, 5)
    assert (len(x.target), np.bincount(x.owner).max()) == (300, 5)
    assert (x.owner[x.partner] != x.owner).all(), 'another document'
    near = x.others(x.windows)
    for i, (a, b) in enumerate(x.windows):
        own = np.flatnonzero(x.document == x.owner[i])
        assert b == x.target[i] > a >= own[0], 'it ends before what is predicted'
        assert b - a == 8 or (b - a < 8 and a == own[0]), 'a shorter window begins its document'
        assert set(near[i]) - {b} == {j for j in own if j < a or j > b}, 'all of so few'
    assert set(ev.spread(range(100), 3)) == {0, 49, 99}
    assert list(ev.spread(range(5), 50)) == [0, 1, 2, 3, 4]

# ------------------------------------------------------------------------------------------------------------
# Models that cheat

CHEATS = {  # a sentence's concept, of a vector for its words and one for its document; guess after z[a:b]
    'constant': (lambda words, topic: np.ones(32), lambda z, a, b: z[a:b].mean(0)),
    'topic': (lambda words, topic: topic, lambda z, a, b: z[a:b].mean(0)),
    'copy': (np.add, lambda z, a, b: z[b - 1]),
    'oracle': (np.add, lambda z, a, b: z[min(b, len(z) - 1)]),
    'random': (np.add, lambda z, a, b: np.random.default_rng([a, b]).standard_normal(32))}

class Cheat(lib.SentenceEncoder):
    """An encoder in all but what it makes of a sentence and of a window."""

    def encode_tokens(self, sequences, batch_size=64, show_progress_bar=None):
        words = [np.random.default_rng([5, len(s), *map(int, s)]).standard_normal(32) for s in sequences]
        topics = [self.topic.get(tuple(s), 0 * w) for s, w in zip(sequences, words)]
        return ev.unit(np.stack([CHEATS[self.kind][0](*x) for x in zip(words, topics)]))

    def means(self, sequences, batch_size=64):
        yield np.arange(len(sequences)), torch.from_numpy(self.encode_tokens(sequences))[:, None]

    def roll(self, concepts, windows, batch_size=256):
        return np.stack([CHEATS[self.kind][1](concepts, *w) for w in windows]).astype(np.float32)

@pytest.fixture(scope='module')
def trained(corpus_dir, tmp_path_factory):
    """A miniature encoder, its decoders and language model, by the scripts."""
    out = str(tmp_path_factory.mktemp('trained') / 'out')
    start('train_encoder.py', *SMALL, f'--data_dir={corpus_dir}', f'--out_dir={out}').end()
    jobs = [start('train_decoder.py', *SMALL, f'--out_dir={out}', *more) for more in (
        [], ['--language_model=True'], [f'--encoder_path={out}/encoder_init.pt'])]
    assert [job.end().returncode for job in jobs] == [0, 0, 0]
    return out

def study(trained, corpus_dir, kind=None, **more):
    """A Study of the trained model, its encoder made a `kind` of cheat, or its configuration changed."""
    train, val = (Corpus(corpus_dir, split) for split in ('train', 'val'))
    models, language_model = ev.load(trained, trained)
    encoder, decoder = models['model']
    encoder.model.config = replace(encoder.model.config, **more)
    if kind:
        encoder.__class__, encoder.kind, encoder.topic, rng = Cheat, kind, {}, np.random.default_rng(1)
        for document in (c.document(d) for c in (train, val) for d in range(c.n_documents)):
            encoder.topic |= dict.fromkeys(map(tuple, document), rng.standard_normal(32))
    pairs = {'sts': [(i % 5, f'The river {i} stood.', f'The stone {i * i % 7} stood.') for i in range(40)]}
    return ev.Study({'model': (encoder, decoder)}, language_model, train, val, pairs, None)

@pytest.fixture(autouse=True)
def few(monkeypatch):
    for name in ('max_generated', 'max_scored', 'max_new_tokens', 'MAX_ROLLOUTS'):
        monkeypatch.setattr(ev, name, 20)

@pytest.mark.parametrize('kind', CHEATS)
def test_what_a_cheat_gets(trained, corpus_dir, kind):
    """No number flatters it, none is NaN, and the summary names the sign."""
    s, sections = study(trained, corpus_dir, kind), {}
    for part in ev.PARTS:
        sections |= part(s)
    signs = ev.compare(sections)[-1]
    got = {title: {name: {c: ev.interval(v) if isinstance(v, np.ndarray) else v for c, v in row.items()}
                   for name, row in rows.items()} for title, rows in sections.items()}
    cells = [cell for rows in got.values() for row in rows.values() for cell in row.values()]
    assert all(np.isfinite(cell).all() for cell in cells)
    a, b = (got[f'retrieval {where}'] for where in ('in document', 'corpus'))
    skill = got['feature similarity']['model']['skill']
    gained = got['information of a prediction']['model']['information']
    if kind in ('constant', 'random'):
        assert skill[0] < 0.02
        assert not signs.endswith(': none')
        assert gained[0] < 0.02
        assert a['model']['MRR'][0] < a['chance']['MRR'][0] + 0.05
        assert b['model']['MRR'][0] < b['chance']['MRR'][0] + 0.03
    if kind == 'constant':
        alone = (s.near == s.target[:, None]).all(1).mean()  # in its document, outside the window
        assert a['model']['R@1'][0] == pytest.approx(alone), 'all alike: the worst rank'
        assert b['model']['R@1'][0] == got['STS, Spearman x 100']['model']['sts'][0] == 0
        assert got['geometry']['model']['RankMe'] == pytest.approx(1, abs=1e-3)
        assert 'RankMe before whitening is below 5 %' in signs
        assert gained[2] < 1e-6, 'the mean concept is what it says'
    if kind == 'topic':
        assert b['model']['MRR'][0] > 0.9
        assert a['model']['MRR'][0] < a['chance']['MRR'][0], 'no sentence is told from its neighbours'
    if kind == 'oracle':
        assert a['model']['MRR'][0] == b['model']['MRR'][0] == 1
        assert skill == [pytest.approx(1)] * 3
        assert signs.endswith(': none')
    if kind == 'copy':
        assert [rows['copy-last'][ev.LESS] for title, rows in got.items() if 'of a prediction' in title
                or 'similarity' in title or 'retrieval' in title] == [pytest.approx([0, 0, 0], abs=1e-6)] * 4
    value, low, high = b['TF-IDF of the window'][ev.LESS]
    assert low <= value <= high
    assert value == pytest.approx(b['model']['MRR'][0] - b['TF-IDF of the window']['MRR'][0])

@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_predictions_do_not_change_with_what_comes_after(trained, corpus_dir, context):
    s = study(trained, corpus_dir, context=context)
    for a, b in s.windows[::20]:
        found = []
        for after in (s.sentences[b:b + 3], s.sentences[:2]):
            x = SimpleNamespace(sentences=[*s.sentences[a:b], *after], windows=[(0, b - a)],
                                target=np.array([b - a]), partner=[0])
            z = s.model.encoder.encode_tokens(x.sentences)
            found.append(ev.predictions(s.model.encoder, x, z)['model'])
        assert found[0] == pytest.approx(found[1], abs=1e-5)
    if context == 'tokens':
        assert ev.rollouts(s) == {}, 'it reads tokens, and there are none'

def test_rollouts_read_what_was_predicted(trained, corpus_dir, monkeypatch):
    """A predictor that answers with the last thing read, one step further along the first axis."""
    monkeypatch.setattr(ev, 'eval_context', 3)
    s, read = study(trained, corpus_dir), []

    def roll(concepts, windows):
        read.append(concepts.reshape(len(windows), 3, 32))
        return read[-1][:, -1] + np.eye(1, 32, dtype=np.float32)
    s.model.encoder.roll = roll
    rows = ev.rollouts(s)['rollout']
    assert read[-1][:, -1, 0] == pytest.approx(read[0][:, -1, 0] + 7)
    assert (len(read), next(iter(rows['model']))) == (8, 'skill, 8 ahead')
    assert list(rows['model']) == list(rows['copy-last'])
    assert rows['model']['skill, 8 ahead'][0] < rows['model']['skill, 1 ahead'][0], 'ever further away'

def test_information_is_against_the_best_that_knows_nothing(trained, corpus_dir):
    for rows in ev.information(study(trained, corpus_dir)).values():
        m, blind = rows['model'], ['no concept', 'mean concept', 'language model, reading nothing']
        best = min((rows[name] for name in blind), key=lambda row: row['nats per token'][0])
        assert (best['information'] == 0).all()
        assert all(rows[name]['information'][0] <= 0 for name in blind)
        assert m['information'] == pytest.approx(best['nats per token'] - m['nats per token'])
        assert m['perplexity'] == pytest.approx(np.exp(m['nats per token'][0]))

# ------------------------------------------------------------------------------------------------------------
# Files

ROWS = [(3.0, 'A man, a plan.', 'A dog'), (0.5, 'x "y"', 'z')]

@pytest.mark.parametrize('content', [
    '3.0\tA man, a plan.\tA dog\n0.5\tx "y"\tz\n', '\ufeff"A man, a plan.",A dog,3.0\n"x ""y""",z,0.5\n',
    's1,s2,score\r\n"A  man, a plan.",A dog,3.0\r\n"x ""y""",z,0.5\r\n',
    'score,s1,s2,year\n3.0,"A man, a plan.",A dog,2012\n0.5,"x ""y""",z,2014\n',
    'pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\n'
    '1\tA man, a plan.\tA dog\tNO\t3.0\n2\tx "y"\tz\tNO\t0.5\n',
    'main\tMSRvid\t2012\t0001\t3.0\tA man, a plan.\tA dog\nmain\tMSRvid\t2012\t0002\t0.5\tx "y"\tz\tsource\n',
    '3.0,"A man, a plan.",A dog\n0.5,"x ""y""",z\n'])
def test_sts_files(tmp_path, content):
    (tmp_path / 'a.csv').write_text(content, newline='')
    assert ev.read_sts(tmp_path / 'a.csv') == ROWS

@pytest.mark.parametrize(('content', 'says'), [
    ('a,b,1\nc,d,high\n', 'line 2'), ('a,b,1\nc,2\n', 'line 2'), ('s1,s2\nx,y\n', 'line 1'),
    ('', 'no pairs'), ('s1,s2,score\n', 'no pairs'), ('score,s1,s2\n1,a\n', 'line 2'),
    ('a,"b\nb",1\nc,d,nan\n', 'line 3'), ('1\ta\tb\n\tc\td\n', 'line 2'),
    ('1,Yes, said he.,b\n', 'quotes'), ('1,a,2\n3,b,4\n', 'score,sentence1,sentence2'),
    ('a,b,c,d,x,f,g\n', 'line 1')])
def test_sts_files_with_faults(tmp_path, content, says):
    (tmp_path / 'bad.csv').write_text(content)
    with pytest.raises(UserError, match=says):
        ev.read_sts(tmp_path / 'bad.csv')

def test_text_is_shown_without_control_bytes():
    assert ev.shown('\ufeffa\0b\x9f\x1b[31m\n c') == 'a\ufffdb\ufffd\ufffd[31m c'
    assert ev.shown('שלום 👩‍👩‍👧') == 'שלום 👩‍👩‍👧'

def test_the_summary_says_what_a_person_can_repeat():
    def cell(value):
        return value + np.arange(-64, 65) / 4096
    rows = {'model': 0.5, 'copy-last': 0.25, 'ridge': 0.75, 'step 0': 0.375}
    sections = {'feature similarity': {name: {'skill': cell(v), 'other': 1.0} for name, v in rows.items()},
                'retrieval corpus': {'model': {'MRR': cell(0.3)}, 'chance': {'MRR': cell(0.3)}},
                'geometry': {'model': {'RankMe before whitening': 1.0, 'dimensions': 100,
                                       'cosine of random pairs': 0.9}}}
    lines = ev.compare(sections)
    assert lines[0] == 'feature similarity: skill 0.484 ± 0.015; ahead of copy-last, step 0; behind ridge'
    assert lines[1].endswith('level with chance')
    assert lines[3] == 'Training added to step 0: feature similarity, skill 0.125 ± 0'
    assert lines[4].split('; ') == [
        'Signs of collapse: random pairs have a cosine above .5',
        'RankMe before whitening is below 5 % of the width']
    assert '| copy-last | 0.234 ± 0.015 | 1 | 0.25 ± 0 |' in ev.table(sections['feature similarity'])

# ------------------------------------------------------------------------------------------------------------
# The script

def test_the_whole_evaluation(trained, tmp_path):
    (tmp_path / 'sts.csv').write_text(''.join(f'The river {i} stood,The stone {i * i % 7} stood,{i % 5}\n'
                                              for i in range(20)))
    arguments = ['evaluate.py', f'--out_dir={trained}', '--max_generated=20', '--max_scored=40',
                 '--eval_context=3', f'--sts={tmp_path}/sts.csv']
    done = start(*arguments).end()
    report, metrics = (open(os.path.join(trained, name)).read() for name in ('report.md', 'metrics.json'))
    metrics, lines = json.loads(metrics), done.stdout.splitlines()
    tables, summary = metrics['metrics'], metrics['summary']
    assert len(tables) == 12
    assert os.path.getsize(os.path.join(trained, 'report.png')) > 5000
    for title in set(tables) - {'rollout', 'text, predict', 'text, reconstruct'}:
        assert 'step 0' in tables[title] or 'tokens' in title, title
    assert all(len(row.get(ev.LESS, 'yes')) == 3 for rows in tables.values() for row in rows.values())
    assert sum(line.startswith('sentence: ') for line in lines) == 3
    assert sum(line.startswith('predicted next: ') for line in lines) == 3
    assert report.count('- predicted next') == 12
    assert lines[-len(summary) - 1:-1] == summary
    assert '\n'.join(f'- {line}' for line in summary) in report
    assert 'Training added to step 0: information' in summary[-2]
    assert lines[-1].endswith('report.md has all tables and samples')
    assert f'{len(ev.PARTS)}/{len(ev.PARTS)}' in done.stderr, 'how far it is'
    start(*arguments).end()
    assert open(os.path.join(trained, 'report.md')).read() == report, 'the same seed, the same report'

def test_a_decoder_of_another_encoder_is_left_out(trained, tmp_path):
    shutil.copy(os.path.join(trained, 'encoder_init.pt'), tmp_path / 'encoder.pt')
    shutil.copy(os.path.join(trained, 'decoder.pt'), tmp_path)
    done = start('evaluate.py', f'--out_dir={tmp_path}').end()
    assert 'decoder.pt was trained on another encoder' in done.stderr
    assert 'Signs of collapse' in done.stdout
    assert 'information' not in done.stdout

def test_a_prompt_is_answered(trained):
    """And again, from the concepts that were kept, but where another encoder has made them."""
    prompt = '--prompt=The river was wide. The stone was not.'
    command = 'evaluate.py', f'--out_dir={trained}', prompt, '--steps=3', '--num_samples=2', '--temperature=1'
    path = os.path.join(trained, 'val.npz')
    done, kept = start(*command).end(), dict(np.load(path))
    np.savez(path, key=kept['key'] + 1, z=-kept['z'])
    assert start(*command).end().stdout == done.stdout
    assert dict(np.load(path))['z'] == pytest.approx(kept['z'])
    np.savez(path, key=kept['key'], z=-kept['z'])
    assert start(*command).end().stdout != done.stdout, 'they are read'
    shutil.copy(__file__, path)  # damaged
    assert start(*command).end().stdout == done.stdout
    os.unlink(path)
    assert done.stdout.count('sentence: ') == 2
    assert done.stdout.count('written: ') == 2 + 3 * 2
    assert done.stdout.count('near: ') == 3 * (2 + 3 * 2)

@pytest.mark.parametrize(('argument', 'says'), [
    ('--out_dir=nowhere', 'train_encoder.py'), ('--judge=no/such/folder', '--judge=no/such/folder'),
    ('--prompt= ', 'needs a sentence'), ('--sts=nowhere.csv', 'nowhere.csv'), ('--max_pair=3', 'max_pairs'),
    ('--max_pairs=0', 'above 0'), ('--max_pairs=1', 'max_pairs'), ('--device=cuda:9', 'device'),
    ('--top_p=0', 'top_p'), ('--data_dir=TURNS', 'another tokenizer')])
def test_mistakes_are_one_line(trained, turns_dir, argument, says):
    argument = argument.replace('TURNS', turns_dir)
    refused(start('evaluate.py', f'--out_dir={trained}', argument).end(check=False), says)
