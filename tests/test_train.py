"""train_encoder.py and train_decoder.py as a user runs them: resume, ranks, signals, mistakes, learning."""

import csv
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, MORE, free_port, prepared, refused, run, start

import model as lib
from config.run import load_checkpoint
from prepare import Corpus

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=2', '--block_size=128', '--eval_iters=2',
         '--warmup_iters=5', '--max_iters=40', '--eval_interval=10', '--log_interval=5', '--dropout=0.1',
         '--gradient_accumulation_steps=2', '--dtype=float32']
LEARN = ['--eval_iters=8', '--dropout=0', '--predictor_lr_scale=1', '--embedding_lr_scale=1',
         '--learning_rate=3e-3']

def encoder(data, out, *more):
    return ['train_encoder.py', *SMALL, '--predictor_layer=1', '--whiten_interval=3', f'--data_dir={data}',
            f'--out_dir={out}', *more]

def decoder(out, *more):
    return ['train_decoder.py', *SMALL, f'--out_dir={out}', *more]

def both(data, out, straight):
    """(Kind, metrics, command) of the encoder and of the decoder, whose encoder is the one in `straight`."""
    return [('encoder', out / 'metrics.csv', encoder(data, out)),
            ('decoder', out / 'metrics_decoder.csv', decoder(out, f'--encoder_path={straight}'))]

def rows(path):
    """metrics.csv without its clocks."""
    with open(path) as f:
        return [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_s')}
                for row in csv.DictReader(f)]

def evaluations(path):
    """The evaluations of a run: {column: number}, first to last."""
    return [{k: float(v) for k, v in r.items() if v} for r in rows(path) if r['val_loss']]

def assert_equal(a, b, atol=0.0):
    """Two checkpoints, bit for bit or nearly: weights, moving average, whitening, optimizer's state."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a['step'] == b['step']
    for key, value in a['model'].items():
        far = 10 * atol if key == 'prediction_scale' else atol  # measured on more rows by more ranks
        assert torch.allclose(value.double(), b['model'][key].double(), rtol=0, atol=far), key
    if 'optimizer' in a and not atol:
        for i, state in a['optimizer']['state'].items():
            assert all(torch.equal(value, b['optimizer']['state'][i][name]) for name, value in state.items())

def assert_same_run(straight, kind, log):
    """The run with metrics in `log` ended as the one in `straight`: checkpoints bit for bit, and its rows."""
    for name in (f'{kind}.pt', f'{kind}_best.pt'):
        assert_equal(straight / name, log.parent / name)
    found, expected = rows(log), rows(straight / log.name)
    assert [r for r in found if int(r['step']) % 5 == 0] == expected
    assert len(found) <= len(expected) + 1  # a stop has a row of its own

def signalled(number, log, step, started):
    """What it says when the signal comes as soon as the metrics in `log` show `step`."""
    while started.process.is_alive():
        if os.path.exists(log) and any(int(r['step'] or 0) >= step for r in rows(log)):
            os.kill(started.process.pid, signal.Signals[number])
            break
        time.sleep(0.005)
    return started.end(check=False)

def two_ranks(*command):
    """The command on two ranks, without torchrun."""
    port = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    return [start(*command, RANK=r, LOCAL_RANK=r, **port) for r in '01']

@pytest.fixture(scope='module')
def straight(corpus_dir, tmp_path_factory):
    """40 steps of the encoder, then of the decoder, without a break, in a folder with an unusual name."""
    out = tmp_path_factory.mktemp('straight') / 'a rün'
    for _, _, command in both(corpus_dir, out, out):
        start(*command).end()
    return out

@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / 'out')

@pytest.mark.parametrize(('number', 'code'), [('SIGTERM', 143), ('SIGINT', 130)])
def test_resume_is_exact(straight, corpus_dir, tmp_path, number, code):
    for kind, log, command in both(corpus_dir, tmp_path, straight):
        done = signalled(number, log, 13, start(*command))
        assert (done.returncode, 'the same command goes on' in done.stdout) == (code, True), done
        assert 13 <= load_checkpoint(tmp_path, kind)['step'] < 40
        assert 'going on from step' in start(*command).end().stdout
        assert_same_run(straight, kind, log)
        seconds = [float(r['seconds']) for r in csv.DictReader(open(log))]
        assert seconds == sorted(seconds)
        assert load_checkpoint(tmp_path, kind)['seconds'] >= seconds[-1] - 0.01 > 0

@pytest.mark.parametrize('seed', range(MORE))
def test_kills_at_any_moment(straight, corpus_dir, tmp_path, seed):
    """Until a run ends; a checkpoint is whole at every moment."""
    rng, kills = random.Random(seed), 0
    for kind, log, command in both(corpus_dir, tmp_path, straight):
        patience = 0.2
        while True:
            running = start(*command).process
            running.join(rng.uniform(0, patience))
            if running.exitcode is not None:
                break
            running.kill()
            running.join()
            kills, patience = kills + 1, 1.15 * patience  # lest a busy machine never ends it
            if os.path.exists(tmp_path / f'{kind}.pt'):
                load_checkpoint(tmp_path, kind)
        assert running.exitcode == 0
        assert_same_run(straight, kind, log)
    assert kills > 2

@pytest.mark.parametrize('switches', [
    '--reg=sigreg', '--context=tokens --loss=infonce --reg=vicreg', '--target=shared',
    '--whiten=False --target=stopgrad --pooling=mean --loss=mse', '--freeze_encoder=True'])
def test_resume_is_exact_with_every_switch(corpus_dir, tmp_path, switches):
    switches = [*switches.split(), '--lr_decay_iters=6', '--ema_start=0.9', '--ema_end=0.9']
    start(*encoder(corpus_dir, tmp_path / 'one', *switches, '--max_iters=6')).end()
    start(*encoder(corpus_dir, tmp_path / 'two', *switches, '--max_iters=3')).end()
    start(*encoder(corpus_dir, tmp_path / 'two', *switches, '--max_iters=6', '--init_from=resume')).end()
    assert_equal(tmp_path / 'one' / 'encoder.pt', tmp_path / 'two' / 'encoder.pt')

def test_changed_settings_are_told_and_taken(copied, corpus_dir):
    before = [(p, p.stat().st_mtime_ns) for p in copied.glob('*.pt')]
    assert 'has 40 steps' in start(*encoder(corpus_dir, copied)).end().stdout  # the same command again
    for argument in ('n_layer=2', 'n_embd=64', 'pooling=mean', 'whiten=0', 'context=tokens', 'n_prefix=3'):
        command = decoder(copied) if 'prefix' in argument else encoder(corpus_dir, copied)
        done = start(*command, '--max_iters=42', f'--{argument}').end(check=False)
        refused(done, argument.split('=')[0] + '=')
    assert [(p, p.stat().st_mtime_ns) for p in copied.glob('*.pt')] == before, 'nothing is overwritten'
    more = '--max_iters=42', '--embedding_lr_scale=7', '--beta1=0.8', '--seed=7', '--dropout=0.2'
    said = start(*encoder(corpus_dir, copied, *more)).end().stdout
    for words in ('embedding_lr_scale is now 7.0, was 10.0', 'seed is now 7', 'beta1 is now 0.8'):
        assert words in said
    assert 'batch_size' not in said
    state = load_checkpoint(copied, 'encoder')
    groups = state['optimizer']['param_groups']
    assert {(g['scale'], *g['betas']) for g in groups} == {(scale, 0.8, 0.95) for scale in (7.0, 1.0, 0.3)}
    assert (state['settings']['seed'], state['step'], state['config']['dropout']) == (7, 42, 0.2)

def test_the_weights_of_step_0_are_kept(corpus_dir, tmp_path):
    """encoder_init.pt is the model before its first step; its decoder has a name of its own."""
    start(*encoder(corpus_dir, tmp_path, '--max_iters=2', '--learning_rate=0', '--dropout=0')).end()
    first, last = (torch.load(tmp_path / f'{n}.pt', weights_only=True) for n in ('encoder_init', 'encoder'))
    assert (first['step'], last['step']) == (0, 2)
    learned = [k for k in first['model'] if k.startswith(('encoder.', 'predictor.', 'target.'))]
    assert len(learned) > 10
    assert all(torch.equal(first['model'][k], last['model'][k]) for k in learned)
    assert first['model']['whitening.mean'].any(), 'its space has been measured'
    start(*decoder(tmp_path, f'--encoder_path={tmp_path}/encoder_init.pt', '--max_iters=1')).end()
    writer = lib.load_decoder(tmp_path / 'decoder_init.pt')
    assert writer.fingerprint == lib.load_encoder(tmp_path / 'encoder_init.pt').fingerprint
    assert writer.fingerprint != lib.load_encoder(tmp_path).fingerprint
    assert evaluations(tmp_path / 'metrics_decoder_init.csv')
    start(*decoder(tmp_path, '--language_model=True', '--max_iters=1')).end()
    assert lib.load_decoder(tmp_path, kind='language_model').step == 1
    assert not (tmp_path / 'decoder.pt').exists()

def test_an_early_signal_is_quiet_and_a_second_one_stops_at_once(corpus_dir, tmp_path):
    for more, seen, says in (('--start_passes=100000', 'embeddings start', 'train_encoder.py: interrupted\n'),
                             ('--max_iters=100000', 'step 0', '')):
        started = start(*encoder(corpus_dir, tmp_path, more, '--eval_interval=100000'))
        while seen not in started.output()[0] and started.process.is_alive():
            time.sleep(0.005)
        for _ in range(2 - bool(says)):
            os.kill(started.process.pid, signal.SIGINT)
            time.sleep(0.002)
        done = started.end(check=False)
        assert (done.returncode, done.stderr) == (130, says)

def test_two_ranks_are_one_process(corpus_dir, tmp_path):
    # Adam makes a step of a gradient's rounding where that is all there is: embeddings at their rate move far
    same = ['--dropout=0', '--embedding_lr_scale=1', '--max_iters=20']
    start(*encoder(corpus_dir, tmp_path / 'one', *same)).end()
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}',
        *encoder(corpus_dir, tmp_path / 'two', *same))
    assert_equal(tmp_path / 'one' / 'encoder.pt', tmp_path / 'two' / 'encoder.pt', atol=2e-4)
    for a, b in zip(*(rows(tmp_path / n / 'metrics.csv') for n in ('one', 'two'))):
        assert float(a['loss'] or 0) == pytest.approx(float(b['loss'] or 0), rel=1e-3)
    command = encoder(corpus_dir, tmp_path / 'stopped', *same)  # one rank is told to stop, and both do
    first, second = two_ranks(*command)
    assert signalled('SIGTERM', tmp_path / 'stopped' / 'metrics.csv', 5, first).returncode == 143
    assert second.end(check=False).returncode == 143
    assert 5 <= load_checkpoint(tmp_path / 'stopped', 'encoder')['step'] < 20
    assert ['going on' in each.end().stdout for each in two_ranks(*command)] == [True, False]
    assert_equal(tmp_path / 'two' / 'encoder.pt', tmp_path / 'stopped' / 'encoder.pt')
    same = ['--dropout=0', '--max_iters=9', '--predicted_share=0', '--concept_dropout=0', '--concept_noise=0']
    start(*decoder(tmp_path / 'one', *same)).end()
    command = decoder(tmp_path / 'two', *same, f'--encoder_path={tmp_path}/one')
    first, second = [each.end() for each in two_ranks(*command)]
    assert_equal(tmp_path / 'one' / 'decoder.pt', tmp_path / 'two' / 'decoder.pt', atol=2e-4)
    assert ('step 9' in first.stdout, second.stdout) == (True, '')

def gradients(x, rank=None, meeting=''):
    """Of each regulariser by the rows x; on a rank, of two, these are its share of 50 rows."""
    if rank is not None:
        dist.init_process_group('gloo', init_method=f'file://{meeting}', rank=rank, world_size=2)
    found = []
    for reg in (lib.vicreg, lib.sigreg):
        leaf = torch.from_numpy(x).requires_grad_()
        torch.manual_seed(0)
        (reg(leaf, torch.ones(len(x)).bool()) * len(x) / 50).backward()  # a share of the loss, as in training
        found.append(leaf.grad.numpy())
    if rank is not None:
        dist.destroy_process_group()
    return found

def test_regularisers_see_the_rows_of_all_ranks(tmp_path):
    x = np.random.default_rng(0).normal(0, 0.4, (50, 6)).astype(np.float32)
    with FORKS.Pool(2) as pool:
        shares = (x[:20], 0, tmp_path / 'a'), (x[20:], 1, tmp_path / 'a')
        ranks = pool.starmap_async(gradients, shares, chunksize=1).get(60)
    for expected, *parts in zip(gradients(x), *ranks):
        assert np.allclose(np.concatenate(parts), expected, atol=1e-6)

def test_training_learns_and_does_not_collapse(turns_dir, tmp_path):
    """Where sentences take turns, training adds what neither the start nor a mean of what was read has."""
    said = start(*encoder(turns_dir, tmp_path, *LEARN, '--max_iters=100', '--eval_interval=50')).end().stdout
    first, *_, last = evaluations(tmp_path / 'metrics.csv')
    assert last['val_loss'] < first['val_loss'] - 0.2
    assert last['val_skill'] > max(first['val_skill'], last['val_copy_skill'], last['val_window_skill']) + 0.1
    assert last['val_rank'] > 0.7 * 32
    assert last['val_cos_unrelated'] < 0.2
    assert 'looks like collapse' not in said
    start(*encoder(turns_dir, tmp_path / 'random', *LEARN, '--start_passes=0', '--max_iters=1')).end()
    random = evaluations(tmp_path / 'random' / 'metrics.csv')[0]
    assert random['val_skill'] < first['val_skill'] - 0.02, 'the start helps'

def test_a_frozen_encoder_stands_still_while_its_predictor_learns(turns_dir, tmp_path):
    start(*encoder(turns_dir, tmp_path, *LEARN, '--freeze_encoder=True', '--batch_size=6')).end()
    first, *_, last = evaluations(tmp_path / 'metrics.csv')
    assert last['val_skill'] > first['val_skill'] + 0.02
    kept, now = (lib.load_encoder(tmp_path / f'{name}.pt') for name in ('encoder_init', 'encoder'))
    words = ['The river was wide .', 'A door .']
    assert (kept.encode(words) == now.encode(words)).all()
    assert abs(kept.predict_next(words) - now.predict_next(words)).max() > 1e-3
    corpus, (path,) = Corpus(turns_dir, 'val'), Path(turns_dir).glob('means_*.val')
    whole = path.read_bytes()
    path.write_bytes(whole[:333])  # as a run that was stopped left it
    now.keep_means(corpus)
    assert path.read_bytes() == whole
    tokens, sentence, document, means = map(torch.from_numpy, corpus.batch(0, 0, 1, 2, 64, 8).values())
    z, used = now.model.targets(tokens, sentence, document, lib.build_mask(sentence)), document >= 0
    assert torch.allclose(means[used], z[used], atol=2e-3)

def test_collapse_is_told(turns_dir, tmp_path):
    """The published recipe without whitening goes the way it is known to go."""
    said = start(*encoder(turns_dir, tmp_path, '--whiten=False', '--start_passes=0', '--pooling=mean',
                          '--max_iters=60', '--learning_rate=1e-2', '--eval_interval=20')).end().stdout
    assert 'this looks like collapse: ' in said
    assert 'unrelated sentences too' in said

def test_the_concept_tells_the_decoder_something(straight):
    first, *_, last = evaluations(straight / 'metrics_decoder.csv')
    assert last['val_loss'] < min(first['val_loss'], last['val_shuffled'])
    assert last['val_information'] == pytest.approx(last['val_unconditional'] - last['val_loss'], abs=1e-4)

@pytest.mark.parametrize(('arguments', 'says'), [
    ('--data_dir=nowhere', 'nowhere'), ('--init_from=resum', 'scratch'), ('--init_from=resume', 'no enc'),
    ('--n_head=5', 'n_head'), ('--n_head=0', 'above 0'), ('--dropout=2', 'below 1'), ('--context=x', 'token'),
    ('--dtype=float8', 'bfloat16'), ('--learning_rat=1', 'learning_rate'), ('--block_size=8', 'block_size=8'),
    ('--device=cuda', 'device=cuda'), ('--device=gpu', 'device=gpu'), ('--device=mps', 'device=mps'),
    ('--pooling=max', 'sif'), ('--loss=l2', 'infonce'), ('--target=shared --context=tokens', 'concepts'),
    ('--max_iters=0', 'above 0'), ('--learning_rate=inf', 'learning_rate=inf'), ('--compile=2', 'auto'),
    ('--max_sentences=1', 'sentences'), ('--out_dir=/dev/null/x', 'cannot write'), ('--n_prefix=0', 'above'),
    ('config/decoder_demo.py', 'preset of'), ('--predicted_share=0.8 --concept_dropout=0.5', 'no sentence'),
    ('--encoder_path=nowhere --n_prefix=2', 'train_encoder.py'), ('RANK=0', 'WORLD_SIZE'),
    ('WORLD_SIZE=4', 'RANK'), ('WORLD_SIZE=4 --n_prefix=2', 'RANK')])
def test_mistakes_are_one_line(arguments, says, corpus_dir, tmp_path):
    """Arguments that only train_decoder.py has go there."""
    words, out = arguments.split(), tmp_path / 'new'
    given, environment = ([w for w in words if (w[0] in 'RW') == ranks] for ranks in (False, True))
    only = 'concept' in arguments or 'n_prefix' in arguments
    script, *command = decoder(out, *given) if only else encoder(corpus_dir, out, *given)
    done = start(script, *command, **dict(w.split('=') for w in environment)).end(check=False)
    refused(done, f'{script}: ', says)
    assert not out.exists(), 'a refused run leaves no folder'

def test_documents_of_one_sentence_are_refused(tmp_path):
    lines = ''.join(f'Line {i} stands alone.\n' for i in range(200))
    prepared(tmp_path, 'lines.txt', lines.encode(), '--val_fraction=0.3')
    refused(start(*encoder(tmp_path / 'out', tmp_path / 'new')).end(check=False), '--doc_separator')

def test_ruined_weights_are_not_saved(copied, corpus_dir):
    for kind, _, command in both(corpus_dir, copied, copied):
        ruined = '--max_iters=200', '--learning_rate=1e30', '--grad_clip=0'
        refused(start(*command, *ruined).end(check=False), 'not finite')
        for path in copied.glob(f'{kind}*.pt'):
            assert all(v.isfinite().all() for v in load_checkpoint(path, kind)['model'].values())

@pytest.mark.parametrize('size', [3000, 20_000])
def test_a_full_disk_is_told_and_costs_nothing(copied, corpus_dir, size):
    before = {p.name: p.read_bytes() for p in copied.glob('*.pt')}
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    for command in (encoder(corpus_dir, copied), decoder(copied)):
        refused(start(*command, '--max_iters=60', before=full).end(check=False), 'cannot write')
        assert {p.name: p.read_bytes() for p in copied.glob('*.pt')} == before
        assert not list(copied.glob('*.tmp'))
