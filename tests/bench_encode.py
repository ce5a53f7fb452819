"""Sentences a second of SentenceEncoder.encode and tokens a second of ConceptDecoder.generate, of a trained model.

    python tests/bench_encode.py --out_dir=out/demo
    python tests/bench_encode.py --out_dir=out/demo --other=<another checkout> --other_out_dir=<what it trained>

Writes tests/results/encode.csv. bench_train.py --other measures the same, of models that it trains for a few steps.
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
    """{name: (repeats,) of what each function returned}; they take turns, and every other time in reverse."""
    found = {name: [] for name in functions}
    for r in range(warm_up + repeats):
        for name in list(functions)[::1 - 2 * (r % 2)]:
            found[name].append(functions[name]())
    return {name: np.array(values[warm_up:]) for name, values in found.items()}


def interval(rates):
    """Medians of {name: rates}; of two, the median of their ratio and its 95 % interval, by bootstrap, too."""
    row = {name: round(np.median(r)) for name, r in rates.items()}
    if len(row) == 2:
        ratio = np.divide(*rates.values())
        drawn = np.median(np.random.default_rng(0).choice(ratio, (2000, len(ratio))), 1)
        row |= {'ratio': round(np.median(ratio), 3), 'from': round(np.percentile(drawn, 2.5), 3),
                'to': round(np.percentile(drawn, 97.5), 3)}
    return row


def worker(root, out_dir, path, device):
    """A process that answers each line of standard input, 'encode' or 'generate', with how much it did a second."""
    sys.path.insert(0, root)
    import model as lib
    encoder, decoder = lib.load_encoder(out_dir, device=device), lib.load_decoder(out_dir, device=device)
    decoder.model.config.eos = -1  # nothing ends before 64 tokens
    texts = json.load(open(path))
    z = encoder.encode(texts[:64])
    functions = {'encode': (len(texts), lambda: encoder.encode(texts)),
                 'generate': (64 * len(z), lambda: decoder.generate(z, max_tokens=64))}
    for line in sys.stdin:
        n, f = functions[line.strip()]
        began = time.perf_counter()
        f()
        print(n / (time.perf_counter() - began), flush=True)


def compare(roots, outs, path, repeats, device):
    """{what: {name: rates}} of the checkouts `roots` {name: folder} with models `outs`, on the json of texts at path."""
    workers = {name: subprocess.Popen([sys.executable, __file__, '--worker', root, outs[name], path, device], text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name, root in roots.items()}

    def ask(name, what):
        print(what, file=workers[name].stdin, flush=True)
        return float(workers[name].stdout.readline())
    found = {title: in_turn({name: lambda n=name, w=what: ask(n, w) for name in roots}, repeats)
             for what, title in (('encode', 'encode, sentences'), ('generate', 'generate, tokens'))}
    for process in workers.values():
        process.communicate()
    return found


def show(rows, path):
    """Print rows as a table and keep them as csv."""
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print(' '.join(f'{v!s:>{max(len(k), 8)}}' for k, v in row.items()), flush=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {'out_dir': 'out/demo', 'other': '', 'other_out_dir': '', 'sentences': 10_000, 'repeats': 5,
                          'device': 'cpu', 'results': os.path.join(HERE, 'results')}.items():
        parser.add_argument(f'--{name}', type=type(default), default=default)
    a = parser.parse_args()
    sys.path.insert(0, os.path.dirname(HERE))
    import prepare
    texts = [s for text in prepare.read_bible() for s in prepare.split_sentences(text)][:a.sentences]
    roots, outs = {'this': os.path.dirname(HERE)}, {'this': a.out_dir}
    if a.other:
        roots, outs = roots | {'other': a.other}, outs | {'other': a.other_out_dir}
    with tempfile.NamedTemporaryFile('w', suffix='.json') as f:
        json.dump(texts, f)
        f.flush()
        found = compare(roots, outs, f.name, a.repeats, a.device)
    show([{'a second': what, **interval(rates)} for what, rates in found.items()], f'{a.results}/encode.csv')


if __name__ == '__main__':
    worker(*sys.argv[2:]) if sys.argv[1:2] == ['--worker'] else main()
