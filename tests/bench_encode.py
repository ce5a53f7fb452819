"""Sentences a second of encode, tokens a second of generate, of trained models; in one or two checkouts.

    python tests/bench_encode.py . out/demo
    python tests/bench_encode.py . out/demo <another checkout> <what it trained>

Writes tests/results/encode.csv. bench_train.py --other measures the same.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))

def in_turn(functions, repeats, warm_up=1):
    """{name: (repeats,) of what each function returned}; they take turns, every other time in reverse."""
    found = {name: [] for name in functions}
    for r in range(warm_up + repeats):
        for name in list(functions)[::1 - 2 * (r % 2)]:
            found[name].append(functions[name]())
    return {name: np.array(values[warm_up:]) for name, values in found.items()}

def interval(rates):
    """Medians of {name: rates}; of two, also of their ratio, and its 95 % interval by bootstrap."""
    row = {name: round(np.median(r)) for name, r in rates.items()}
    if len(row) == 2:
        ratio = np.divide(*rates.values())
        drawn = np.median(np.random.default_rng(0).choice(ratio, (2000, len(ratio))), 1)
        ends = np.quantile(drawn, (0.025, 0.975)).round(3)
        row |= {'ratio': round(np.median(ratio), 3), 'from': ends[0], 'to': ends[1]}
    return row

def worker(root, out_dir, path, device):
    """A process that answers each line of standard input with how much encode and generate did a second."""
    sys.path.insert(0, root)
    import model as lib
    encoder, decoder = lib.load_encoder(out_dir, device=device), lib.load_decoder(out_dir, device=device)
    decoder.model.config.eos = -1  # nothing ends before 64 tokens
    texts = json.load(open(path))
    z = encoder.encode(texts[:64])
    for _ in sys.stdin:
        times = [time.perf_counter()]
        for f in (lambda: encoder.encode(texts), lambda: decoder.generate(z, max_tokens=64)):
            f()
            times.append(time.perf_counter())
        print(*np.array([len(texts), 64 * len(z)]) / np.diff(times), flush=True)

def compare(roots, outs, path, repeats, device):
    """{what: {name: rates}} of checkouts {name: folder}, models {name: out_dir}, on the texts in a json."""
    workers = {}
    for name, root in roots.items():
        command = [sys.executable, __file__, '--worker', root, outs[name], path, device]
        workers[name] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(process):
        print(file=process.stdin, flush=True)
        return list(map(float, process.stdout.readline().split()))
    found = in_turn({name: lambda p=process: ask(p) for name, process in workers.items()}, repeats)
    for process in workers.values():
        process.communicate()
    return {what: {name: rates[:, i] for name, rates in found.items()}
            for i, what in enumerate(('encode, sentences', 'generate, tokens'))}

def show(rows, path):
    """Print rows as a table and keep them as csv."""
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print(' '.join(f'{v!s:>{max(len(k), 8)}}' for k, v in row.items()), flush=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folders', nargs='+', help='a checkout and its out_dir, or two')
    parser.add_argument('--sentences', type=int, default=1000)
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--results', default=os.path.join(HERE, 'results'))
    a = parser.parse_args()
    folders = [os.path.abspath(folder) for folder in a.folders]
    sys.path.insert(0, folders[0])
    from prepare import read_bible, split_sentences
    with tempfile.NamedTemporaryFile('w', suffix='.json') as f:
        json.dump([s for text in read_bible() for s in split_sentences(text)][:a.sentences], f)
        f.flush()
        roots, outs = (dict(zip(('this', 'other'), part)) for part in (folders[::2], folders[1::2]))
        found = compare(roots, outs, f.name, a.repeats, a.device)
    show([{'a second': what, **interval(rates)} for what, rates in found.items()], f'{a.results}/encode.csv')

if __name__ == '__main__':
    worker(*sys.argv[2:]) if sys.argv[1:2] == ['--worker'] else main()
