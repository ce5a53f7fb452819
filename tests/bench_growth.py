"""How a training step, and the corpus under it, grow: one picture and a few rows of a table each.

    python tests/bench_growth.py                          CPU, on the embedded Bible
    python tests/bench_growth.py --device=cuda --compile

Against block_size, at the same number of tokens a step, and against width: time of the encoder's step beside a language
model's (see bench_train.py). Against the corpus's size, on synthetic arrays: time to open it and to cut a batch, and memory.
Against ranks, on a CPU: predictions/s of train_encoder.py on 1 and 2 processes of one thread each.
--parts names some of these only. Writes tests/results/growth_<part>_<device>.csv and .png.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch
from bench_train import HERE, ROOT, SIZES, WORKLOADS, Bench, in_turn, warmed_up, write

import prepare

TOKENS = 8192  # a step, whatever the block_size
PARTS = ('block_size', 'width', 'corpus', 'ranks')


def time_of_a_step(corpus, size, a, block_size):
    """{workload: ms a step} of the encoder and the language model, medians of runs in turn."""
    shape = {'block_size': block_size, 'batch_size': TOKENS // block_size}
    bench = Bench(corpus, size, argparse.Namespace(**vars(a) | shape))
    steps = {name: warmed_up(WORKLOADS[name](bench), a) for name in ('encoder', 'language model')}
    return {name: 1000 * float(np.median(runs[:, 4])) / a.steps for name, runs in in_turn(steps, a).items()}


def synthetic(folder, millions, shard=100_000_000):
    """A set of so many million tokens in `folder`, as prepare.py lays it out; the tokens are zeros that take no disk."""
    os.makedirs(folder)
    rng, entries = np.random.default_rng(0), []
    for k, start in enumerate(range(0, millions * 1_000_000, shard)):
        n = min(shard, millions * 1_000_000 - start)
        ends = np.cumsum(rng.integers(5, 60, n // 25))
        sentences = np.concatenate(([0], ends[ends < n], [n]))
        sentences = sentences[np.diff(sentences, prepend=-1) > 0]
        documents = np.unique(np.append(np.arange(0, len(sentences) - 1, 30), len(sentences) - 1))
        with open(f'{folder}/train_{k:06d}.tokens', 'wb') as f:
            f.truncate(2 * n)
        for suffix, offsets in (('sentences', sentences), ('documents', documents)):
            offsets.astype(np.int64).tofile(f'{folder}/train_{k:06d}.{suffix}')
        names = [f'train_{k:06d}.{s}' for s in prepare.SUFFIXES]
        entries.append({'tokens': n, 'sentences': len(sentences) - 1, 'documents': len(documents) - 1, 'files': {
            m: {'bytes': os.path.getsize(f'{folder}/{m}'), 'crc32': prepare.checksum(f'{folder}/{m}')} for m in names}})
    whole = {k: sum(e[k] for e in entries) for k in ('tokens', 'sentences', 'documents')} | {'shards': entries}
    prepare.write_json(f'{folder}/meta.json', {'format': prepare.FORMAT, 'dtype': 'uint16', 'splits': {'train': whole},
                                               'tokenizer': {'name': 'gpt2', 'n_vocab': 50257, 'sha256': ''}})


def reading(folder, a):
    """Seconds to open, seconds to the first batch, ms a batch after it, and peak MB, in a process of its own."""
    code = f'''
import sys, time
sys.path.insert(0, {ROOT!r})
from prepare import Corpus
began = time.perf_counter()
corpus = Corpus({folder!r}, 'train')
opened = time.perf_counter()
corpus.batch(0, {TOKENS // a.block_size}, {a.block_size}, {a.block_size // 8})
first = time.perf_counter()
for i in range(1, 101):
    corpus.batch(i, {TOKENS // a.block_size}, {a.block_size}, {a.block_size // 8})
done = time.perf_counter()
peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1024
print(opened - began, first - opened, 10 * (done - first), peak)
'''
    runs = [list(map(float, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                           check=True).stdout.split())) for _ in range(a.repeats)]
    return [statistics.median(x) for x in zip(*runs)]


def predictions_of_ranks(n, folder, steps):
    """Predictions/s of train_encoder.py on n processes of one thread, each with rows of its own."""
    out = f'{folder}/ranks{n}'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}',
               f'{ROOT}/train_encoder.py', f'{ROOT}/config/encoder_demo.py', f'--data_dir={folder}/data',
               f'--out_dir={out}', f'--gradient_accumulation_steps={n}', '--log_interval=1', f'--max_iters={steps}',
               f'--eval_interval={steps}', '--eval_iters=1']
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, cwd=ROOT)
    with open(f'{out}/metrics.csv') as f:
        speeds = [float(r['predictions_per_s']) for r in csv.DictReader(f) if r['predictions_per_s']]
    return statistics.median(speeds[2:])  # the first ones warm up


def picture(name, device, xlabel, ylabel, lines, log=True):
    """Write tests/results/growth_<name>_<device>.png of lines {label: [(x, y)]}."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.figure(figsize=(5, 3.4), dpi=110)
    for (label, points), style in zip(lines.items(), ('o-', 's--', '^:')):
        plt.plot(*zip(*points), style, color='black', label=label)
    if log:
        plt.xscale('log')
    values = [y for p in lines.values() for _, y in p]
    if max(values) > 30 * min(values):
        plt.yscale('log')
    else:
        plt.ylim(0)
    ticks = sorted({x for p in lines.values() for x, _ in p})
    plt.xticks(ticks, [f'{t:,}' for t in ticks])
    plt.minorticks_off()
    plt.xlabel(xlabel)
    plt.ylabel(ylabel)
    plt.grid(alpha=0.3)
    plt.legend(frameon=False)
    plt.savefig(os.path.join(HERE, 'results', f'growth_{name}_{device}.png'), bbox_inches='tight', metadata={'Software': None})
    plt.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(PARTS))
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float32'])
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--steps', type=int, default=1, help='steps a round')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--warm_up', type=int, default=1)
    parser.add_argument('--block_size', type=int, default=1024, help='where another thing grows')
    parser.add_argument('--millions', default='1,10,100,1000', help='of tokens, of the synthetic corpora')
    a = parser.parse_args()
    torch.set_float32_matmul_precision('high')
    parts = a.parts.split(',')
    if set(parts) - set(PARTS):
        raise SystemExit(f"bench_growth.py: --parts={a.parts}: expected some of {', '.join(PARTS)}")
    rows = {part: [] for part in parts}

    def note(grows, x, **values):
        for what, value in values.items():
            rows[grows].append({'against': grows, 'at': x, 'what': what, 'value': round(value, 4)})
            print(f'{grows:12} {x:>6} {what:28} {value:.4g}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, f'{ROOT}/prepare.py', '--dataset=web-bible', f'--data_dir={folder}/data',
                        '--tokenizer=bpe:8192'], check=True, stdout=subprocess.DEVNULL)
        corpus = prepare.Corpus(f'{folder}/data', 'train')
        width, layers, heads = SIZES[a.device][0]
        if 'block_size' in parts:
            lines = {}
            for block_size in (512, 1024, 2048, 4096, 8192):
                took = time_of_a_step(corpus, (width, layers, heads), a, block_size)
                note('block_size', block_size, **{f'{k}, ms a step': v for k, v in took.items()})
                for k, v in took.items():
                    lines.setdefault(k, []).append((block_size, v))
            picture('block_size', a.device, f'block_size, tokens ({TOKENS:,} a step)', 'ms a step', lines)
        if 'width' in parts:
            lines = {}
            for w in (192, 384, 768):
                took = time_of_a_step(corpus, (w, layers, w // 64), a, a.block_size)
                note('width', w, **{f'{k}, ms a step': v for k, v in took.items()})
                for k, v in took.items():
                    lines.setdefault(k, []).append((w, v))
            picture('width', a.device, 'width', f'ms a step of {TOKENS:,} tokens', lines)
        if 'corpus' in parts:
            lines, step = {}, time_of_a_step(corpus, (width, layers, heads), a, a.block_size)['encoder']
            for millions in map(int, a.millions.split(',')):
                synthetic(f'{folder}/{millions}', millions)
                opened, first, batch, peak = reading(f'{folder}/{millions}', a)
                note('corpus', millions, **{'s to open': opened, 's to the first batch': first, 'ms a batch': batch,
                                            'peak MB': peak, 'batches while a step runs': step / batch})
                for k, v in (('ms a batch', batch), ('ms to open', 1000 * opened), ('peak MB', peak)):
                    lines.setdefault(k, []).append((millions, v))
            picture('corpus', a.device, 'million tokens of corpus', 'ms, MB', lines)
        if 'ranks' in parts and a.device == 'cpu':
            lines = {'measured': [], 'as many times one rank': []}
            for n in (1, 2):
                speed = predictions_of_ranks(n, folder, 12)
                note('ranks', n, **{'predictions/s': speed})
                lines['measured'].append((n, speed))
                lines['as many times one rank'].append((n, n * lines['measured'][0][1]))
            picture('ranks', a.device, 'ranks', 'predictions/s', lines, log=False)
    for part in parts:
        if rows[part]:
            write(f'growth_{part}_{a.device}', rows[part])


if __name__ == '__main__':
    main()
