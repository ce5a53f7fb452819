"""The scripts of this folder in miniature: benchmarks, the ablation."""

import argparse
import csv
import os
import subprocess
import sys

import ablate
import bench_train
import pytest
from conftest import ROOT, run
from test_train import SMALL
from torch.utils.flop_counter import FlopCounterMode

from prepare import Corpus


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))

def test_the_gpu_benchmark_rehearses_on_a_cpu(corpus_dir, tmp_path):
    environment = {**os.environ, 'PYTHON': sys.executable, 'DEVICE': 'cpu', 'OUT': str(tmp_path)}
    done = subprocess.run(['bash', 'tests/bench_cuda.sh', corpus_dir], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert 'time a FLOP' in done.stdout, done.stderr
    rows = table(tmp_path / 'train_cpu.csv')
    assert {r['workload'] for r in rows} == {'encoder', 'decoder', 'language model', 'generate, batch 1',
                                             'generate, batch 64'}
    assert all(float(r['tokens/s']) > 0 for r in rows)
    assert {'targets', 'backward'} <= {r['part'] for r in table(tmp_path / 'phases_cpu.csv')}

@pytest.mark.parametrize('kind', ['encoder', 'decoder', 'language model'])
def test_flops_are_those_of_the_products(corpus_dir, kind):
    """torch counts padding too, and not what a fused attention does."""
    a = argparse.Namespace(device='cpu', dtype='float32', compile=False, batch_size=2, block_size=256)
    a.warm_up, a.repeats = 1, 0
    bench = bench_train.Bench(Corpus(corpus_dir, 'train'), (64, 2, 2), a)
    step = bench.language_model() if kind == 'language model' else bench.training(kind)
    with FlopCounterMode(display=False) as counter:
        counts = step(0, lambda part: None)
    assert 0.7 < counter.get_total_flops() / float(counts()[1]) < 1.5

def test_two_checkouts_take_turns(corpus_dir, tmp_path):
    run('tests/bench_train.py', f'--other={ROOT}', f'--results={tmp_path}', '--size=32,1,2', '--batch_size=2',
        '--block_size=256', '--repeats=2', '--warm_up=1')
    rows = table(tmp_path / 'ratio_cpu.csv')
    what = ['encoder step, tokens', 'decoder step, tokens', 'encode, sentences', 'generate, tokens']
    assert [r['a second'] for r in rows] == what
    assert all(0 < float(r['from']) <= float(r['ratio']) <= float(r['to']) for r in rows)

def test_ablation(corpus_dir, tmp_path):
    tiny = [*SMALL, '--predictor_layer=1']
    run('tests/ablate.py', f'--data_dir={corpus_dir}', f'--work={tmp_path}/work', f'--results={tmp_path}',
        '--seeds=1', '--rows=default,untrained', '--iters=2', '--decoder_iters=2', '--max_pairs=40',
        f'--encoder={" ".join(tiny)}', f'--decoder={" ".join(SMALL)}')
    first, second = table(tmp_path / 'ablation.csv')
    apart = float(second['skill']) - float(first['skill'])
    assert float(second['skill, from default']) == pytest.approx(apart, abs=2e-5)
    assert {'information', 'corpus MRR, step 0', 'order sensitivity'} <= set(first)
    found = ablate.compared({'a': [{'x': 1.0}, {'x': 3.0}], 'b': [{'x': 2.0}, {'x': 4.0}]})
    assert found['b']['x'] == pytest.approx((3, 12.706, 1, 0), abs=1e-3)  # means apart by 1 whatever the seed
