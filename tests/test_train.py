"""train_encoder.py and train_decoder.py as a user runs them: resume, several ranks, interruptions, mistakes."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, free_port, run

import model as lib

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=2', '--block_size=128', '--compile=False', '--eval_iters=2',
         '--warmup_iters=5', '--max_iters=20', '--eval_interval=10', '--log_interval=5', '--gradient_accumulation_steps=2',
         '--dropout=0.1']
ENCODER = [*SMALL, '--predictor_layer=1', '--whiten_interval=3']


def weights(path):
    return torch.load(path, weights_only=True)


def assert_equal(a, b, close=False):
    for key, value in a['model'].items():
        if close:
            far = 2e-3 if key == 'prediction_scale' else 2e-4  # evaluation measures it, on more rows by more ranks
            assert torch.allclose(value.float(), b['model'][key].float(), atol=far), key
        else:
            assert torch.equal(value, b['model'][key]), key


def rows(path):
    """metrics.csv without its clocks."""
    with open(path) as f:
        return [{k: v for k, v in r.items() if k not in ('seconds', 'tokens_per_s', 'predictions_per_s')}
                for r in csv.DictReader(f)]


def interrupt_after(step, script, *arguments):
    """Run a script and send it SIGTERM once metrics show `step`; returns the exit code and what it said."""
    out = next(a.split('=')[1] for a in arguments if a.startswith('--out_dir='))
    log = os.path.join(out, 'metrics.csv' if 'encoder' in script else 'metrics_decoder.csv')
    process = subprocess.Popen([sys.executable, script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, 'OMP_NUM_THREADS': '2'})
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        if os.path.exists(log) and any(int(r['step']) >= step for r in rows(log)):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture(scope='module')
def straight(corpus_dir, tmp_path_factory):
    """20 steps of the encoder, then of the decoder, without a break."""
    out = str(tmp_path_factory.mktemp('straight') / 'out')
    run('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={out}', *ENCODER)
    run('train_decoder.py', f'--out_dir={out}', *SMALL)
    return out


def test_resume_is_exact(straight, corpus_dir, tmp_path):
    out = str(tmp_path / 'out')
    encoder = [f'--data_dir={corpus_dir}', f'--out_dir={out}', *ENCODER]
    code, said = interrupt_after(5, os.path.join(ROOT, 'train_encoder.py'), *encoder)
    assert code == 143, said
    assert 'the same command goes on' in said
    assert 0 < lib.load_checkpoint(out, 'encoder')['step'] < 20
    assert 'going on from step' in run('train_encoder.py', *encoder).stdout
    a, b = weights(f'{straight}/encoder.pt'), weights(f'{out}/encoder.pt')
    assert_equal(a, b)
    for i, state in a['optimizers'][0]['state'].items():
        assert torch.equal(state['exp_avg_sq'], b['optimizers'][0]['state'][i]['exp_avg_sq'])
    assert rows(f'{straight}/metrics.csv') == rows(f'{out}/metrics.csv')

    decoder = [f'--out_dir={out}', *SMALL]
    code, said = interrupt_after(5, os.path.join(ROOT, 'train_decoder.py'), *decoder)
    assert code == 143, said
    assert 'going on from step' in run('train_decoder.py', *decoder).stdout
    assert rows(f'{straight}/metrics_decoder.csv') == rows(f'{out}/metrics_decoder.csv')
    assert_equal(weights(f'{straight}/decoder.pt'), weights(f'{out}/decoder.pt'))


def test_resume_is_exact_with_muon_and_random_directions(corpus_dir, tmp_path):
    one, two = ([f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/{name}', *ENCODER, '--optimizer=muon', '--reg=sigreg',
                 '--lr_decay_iters=6', '--ema_start=0.9', '--ema_end=0.9'] for name in ('one', 'two'))
    run('train_encoder.py', *one, '--max_iters=6')
    run('train_encoder.py', *two, '--max_iters=3')
    run('train_encoder.py', *two, '--max_iters=6', '--init_from=resume')
    assert_equal(weights(tmp_path / 'one' / 'encoder.pt'), weights(tmp_path / 'two' / 'encoder.pt'))


def test_a_stop_before_the_first_step_is_quiet(corpus_dir, tmp_path):
    process = subprocess.Popen([sys.executable, 'train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/out', *ENCODER],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert 'parameters' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in said


def torchrun(script, *arguments):
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}', script, *arguments,
        OMP_NUM_THREADS='1')


def test_two_ranks_are_one_process(corpus_dir, tmp_path):
    exact = ['--dropout=0', '--dtype=float32', '--concept_noise=0', '--concept_blur=0', '--concept_dropout=0']
    # Adam turns a gradient's rounding into a step where the gradient is near 0: embeddings at their own rate move far
    encoder = [f'--data_dir={corpus_dir}', *ENCODER, *exact[:2], '--embedding_lr_scale=1']
    run('train_encoder.py', *encoder, f'--out_dir={tmp_path}/one')
    torchrun('train_encoder.py', *encoder, f'--out_dir={tmp_path}/two')
    assert_equal(weights(tmp_path / 'one' / 'encoder.pt'), weights(tmp_path / 'two' / 'encoder.pt'), close=True)
    logs = [[r['loss'] for r in rows(tmp_path / name / 'metrics.csv') if r['loss']] for name in ('one', 'two')]
    assert [float(x) for x in logs[0]] == pytest.approx([float(x) for x in logs[1]], rel=1e-3)
    decoder = [f'--encoder_path={tmp_path}/one', *SMALL, *exact]
    run('train_decoder.py', *decoder, f'--out_dir={tmp_path}/three')
    torchrun('train_decoder.py', *decoder, f'--out_dir={tmp_path}/four')
    assert_equal(weights(tmp_path / 'three' / 'decoder.pt'), weights(tmp_path / 'four' / 'decoder.pt'), close=True)


def regularise_on_a_rank(rank, folder):
    """Save the gradients that a rank's rows of `folder`/x.pt get."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    for name, reg in (('vicreg', lib.vicreg), ('sigreg', lib.sigreg)):
        x = torch.load(f'{folder}/x.pt')[20 * rank:20 + 30 * rank].requires_grad_()  # 20 rows and 30
        torch.manual_seed(rank)
        (reg(x, torch.ones(len(x), dtype=torch.bool)) * len(x) / 50).backward()  # a share of the loss, as in training
        torch.save(x.grad, f'{folder}/{name}_{rank}.pt')
    dist.destroy_process_group()


def test_regularisers_see_the_rows_of_all_ranks(tmp_path):
    torch.manual_seed(3)
    torch.save(0.4 * torch.randn(50, 6), tmp_path / 'x.pt')
    torch.multiprocessing.spawn(regularise_on_a_rank, (str(tmp_path),), nprocs=2)
    for name, reg in (('vicreg', lib.vicreg), ('sigreg', lib.sigreg)):
        x = torch.load(tmp_path / 'x.pt').requires_grad_()
        torch.manual_seed(0)  # the directions are the first rank's
        reg(x, torch.ones(50, dtype=torch.bool)).backward()
        found = torch.cat([torch.load(tmp_path / f'{name}_{rank}.pt') for rank in (0, 1)])
        assert torch.allclose(found, x.grad, atol=1e-6), name


def learned(data_dir, out, *arguments):
    """The evaluations of a run: {column: number}, first to last."""
    run('train_encoder.py', f'--data_dir={data_dir}', f'--out_dir={out}', *ENCODER, '--dropout=0', '--dtype=float32', *arguments)
    return [{k: float(v) for k, v in r.items() if v} for r in rows(out / 'metrics.csv') if r['val_loss']]


def test_training_learns_and_does_not_collapse(turns_dir, tmp_path):
    """Where sentences take turns, loss falls, retrieval and skill rise, and unrelated pairs stay apart."""
    first, *_, last = learned(turns_dir, tmp_path / 'out', '--start_passes=0', '--max_iters=150', '--eval_interval=50',
                              '--learning_rate=1e-3', '--embedding_lr_scale=50')
    assert last['val_loss'] < first['val_loss'] - 0.05
    assert last['val_mrr'] > first['val_mrr'] + 0.05
    assert last['val_skill'] > first['val_skill'] + 0.05
    assert last['val_skill'] > last['val_copy_skill'] + 0.05
    assert last['val_rank'] > 0.3 * 32
    assert last['val_cos_unrelated'] < 0.3


def test_embeddings_that_start_from_their_neighbours_predict_at_once(turns_dir, tmp_path):
    skill = [learned(turns_dir, tmp_path / n, f'--start_passes={n}', '--max_iters=1')[0]['val_skill'] for n in ('0', '4')]
    assert skill[1] > skill[0] + 0.1


def test_the_concept_tells_the_decoder_something(straight):
    values = [r for r in rows(f'{straight}/metrics_decoder.csv') if r['val_loss']]
    assert float(values[-1]['val_loss']) < float(values[0]['val_loss'])
    assert float(values[-1]['val_shuffled']) > float(values[-1]['val_loss'])


def test_the_copies_of_the_glue_are_equal():
    """Functions that stand in both training scripts are to stay the same."""
    def functions(script):
        text = open(os.path.join(ROOT, script)).read()
        return [text[text.index(f'def {name}('):].split('\n\n\n')[0] for name in ('lr_at', 'on_signal', 'on_error', 'to_device', 'micro_batches', 'all_sum', 'not_finite')]
    assert functions('train_encoder.py') == functions('train_decoder.py')


@pytest.mark.parametrize(('script', 'arguments', 'says'), [
    ('train_encoder.py', ['--data_dir=nowhere'], 'prepare.py'),
    ('train_encoder.py', ['--init_from=resum'], 'scratch'),
    ('train_encoder.py', ['--n_head=5'], 'n_head'),
    ('train_encoder.py', ['--max_sentences=1'], '2 or more'),
    ('train_encoder.py', ['--max_sentences=-1'], '0 or more'),
    ('train_encoder.py', ['--dropout=2'], 'from 0 to 1'),
    ('train_encoder.py', ['--context=sentences'], 'tokens'),
    ('train_encoder.py', ['--dtype=float8'], 'bfloat16'),
    ('train_encoder.py', ['--learning_rat=1'], 'learning_rate'),
    ('train_encoder.py', ['--block_size=8'], 'block_size=8 is too small'),
    ('train_encoder.py', ['--device=gpu'], "'cuda'"),
    ('train_encoder.py', ['--n_head=0'], 'n_head=0'),
    ('train_encoder.py', ['--pooling=max'], 'sif'),
    ('train_encoder.py', ['--optimizer=sgd'], 'muon'),
    ('train_encoder.py', ['--loss=l2'], 'smooth_l1'),
    ('train_encoder.py', ['--target=shared', '--context=tokens'], 'concepts'),
    ('train_decoder.py', ['--eval_interval=0'], 'eval_interval=0'),
    ('train_decoder.py', ['--concept_blur=0.8', '--concept_dropout=0.5'], 'leave no sentence'),
    ('train_encoder.py', ['--device=True'], 'cuda'),
    ('train_encoder.py', ['--init_from=resume'], 'no encoder'),
    ('train_encoder.py', ['--init_from=resum'], "'scratch'"),
    ('train_decoder.py', ['--out_dir=nowhere'], 'train_encoder.py')])
def test_mistakes_are_one_line(script, arguments, says, corpus_dir, tmp_path):
    given = ENCODER if 'encoder' in script else SMALL
    place = [] if any('data_dir' in a for a in arguments) else [f'--data_dir={corpus_dir}']
    done = run(script, *given, f'--out_dir={tmp_path}/new', *place, *arguments, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert 'Traceback' not in done.stderr
    assert 'init_from' not in str(arguments) or not (tmp_path / 'new').exists()


def test_documents_of_one_sentence_are_refused(tmp_path):
    (tmp_path / 'lines.txt').write_text(''.join(f'Line {i} stands alone.\n' for i in range(200)))
    run('prepare.py', f'--dataset={tmp_path}/lines.txt', f'--data_dir={tmp_path}/data', '--tokenizer=bpe:300', '--val_fraction=0.3')
    done = run('train_encoder.py', f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', *ENCODER, check=False)
    assert done.returncode == 1
    assert '--doc_separator' in done.stderr


def test_a_resumed_run_keeps_its_pooling_and_takes_new_rates(straight, corpus_dir, tmp_path):
    import shutil
    shutil.copytree(straight, tmp_path / 'out')
    arguments = [f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/out', *ENCODER, '--init_from=resume', '--max_iters=22']
    done = run('train_encoder.py', *arguments, '--pooling=mean', check=False)
    assert done.returncode == 1
    assert "pooling='sif'" in done.stderr
    done = run('train_encoder.py', *arguments, '--embedding_lr_scale=7', '--beta1=0.8')
    assert 'embedding_lr_scale is now 7.0' in done.stdout
    groups = lib.load_checkpoint(f'{tmp_path}/out', 'encoder')['optimizers'][0]['param_groups']
    assert {g['scale'] for g in groups} == {7.0, 1.0, 0.1}
    assert all(g['betas'][0] == 0.8 for g in groups)


def test_the_best_checkpoint_serves_where_the_newest_is_gone(straight, corpus_dir, tmp_path):
    import shutil
    shutil.copytree(straight, tmp_path / 'out')
    for kind in ('encoder', 'decoder'):
        os.unlink(tmp_path / 'out' / f'{kind}.pt')
    best = lib.load_checkpoint(tmp_path / 'out' / 'encoder_best.pt', 'encoder')['step']
    said = run('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/out', *ENCODER, '--init_from=resume').stdout
    assert f'going on from step {best} of {tmp_path}/out/encoder_best.pt' in said
    said = run('train_decoder.py', f'--out_dir={tmp_path}/out', *SMALL, '--init_from=resume').stdout
    assert 'decoder_best.pt' in said
    for kind in ('encoder', 'decoder'):
        assert_equal(weights(f'{straight}/{kind}.pt'), weights(tmp_path / 'out' / f'{kind}.pt'))


def test_nothing_is_overwritten(straight, corpus_dir):
    before = weights(f'{straight}/encoder.pt')
    done = run('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={straight}', *ENCODER, '--seed=7', check=False)
    assert done.returncode == 1
    assert 'exists, of a run with other settings (seed)' in done.stderr
    done = run('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={straight}', *ENCODER, '--init_from=resume', '--n_layer=2',
               check=False)
    assert done.returncode == 1
    assert 'n_layer=1' in done.stderr
    assert_equal(before, weights(f'{straight}/encoder.pt'))


def test_ablation_in_miniature(corpus_dir, tmp_path):
    """The table has a row for each, and what is done is not done again."""
    small = ' '.join(a for a in SMALL if 'iters' not in a and 'interval' not in a)
    names = ['default', "seed project's recipe"]
    command = ['tests/ablate.py', f'--data_dir={corpus_dir}', f'--work={tmp_path}/runs', f'--results={tmp_path}', '--seeds=1',
               '--iters=3', '--max_pairs=20', f'--encoder={small} --eval_iters=2', f"--rows={','.join(names)}"]
    run(*command)
    table = rows(tmp_path / 'ablation.csv')
    assert [r['row'] for r in table] == names
    assert all(0 < float(r['corpus MRR']) <= 1 and 1 <= float(r['rank']) <= 32 for r in table)
    assert table[0]['skill'] != table[1]['skill']
    assert (tmp_path / 'ablation.png').stat().st_size > 1000
    done = tmp_path / 'runs' / 'default_1' / 'metrics.json'
    assert not list(done.parent.glob('*.pt'))
    before = done.stat().st_mtime
    run(*command)
    assert done.stat().st_mtime == before
    other = run(*[c.replace('iters=3', 'iters=4') for c in command], check=False)
    assert other.returncode == 1
    assert 'other settings' in other.stderr
