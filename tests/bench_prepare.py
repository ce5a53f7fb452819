"""prepare.py: sentence splitters on one core; end to end beside tiktoken alone and an older checkout.

    python tests/bench_prepare.py --text=<.jsonl or .jsonl.gz> --other=<folder of an older checkout> \\
        --boundaries=<folder of .conllu files and golden rules>

All in turn, so that a slow moment of the machine falls on all. End to end, a speed is the difference of a
large and a small run: what a MB costs once Python is up and the tokenizer trained. Without --text: the
embedded Bible. Writes tests/results/split.csv (MB/s; boundary F1 on treebanks, golden rules held) and
prepare.csv.
"""

import argparse
import csv
import glob
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import sentencex
import tiktoken
from conftest import ROOT, jsonl

import prepare

SPLITTERS = {'split_sentences': prepare.split_sentences, 'sentencex': lambda t: sentencex.segment('en', t),
             'one-line regex': re.compile(r'(?<=[.!?])\s+(?=[A-Z])').split}

def f1(split, path):
    """Of the boundaries within the paragraphs of a .conllu file, counted in letters."""
    paragraphs, right, both = [], 0, 0
    for block in open(path, encoding='utf-8').read().split('\n\n'):
        if text := re.search(r'^# text = (.*)', block, re.M):
            if not paragraphs or re.search('^# new(par|doc)', block, re.M):
                paragraphs.append([])
            paragraphs[-1] += [text[1].strip(), '' if 'SpaceAfter=No' in block.split('\t')[-1] else ' ']
    for pieces in paragraphs:
        a, b = ({sum(len(re.sub(r'\s', '', s)) for s in sentences[:i]) for i in range(1, len(sentences))}
                for sentences in (pieces[::2], split(''.join(pieces[:-1]))))
        right, both = right + 2 * len(a & b), both + len(a) + len(b)
    return round(right / both, 4)

def golden(split, path):
    """How many of the golden rules in a .json file are held."""
    return sum([*map(prepare.clean, rule['sentences'])] == [*map(prepare.clean, split(rule['text']))]
               for rule in json.load(open(path)))

def splitters(texts, boundaries, repeats):
    """Rows of split.csv."""
    seconds, rows = {name: [] for name in SPLITTERS}, []
    size = sum(len(text.encode()) for text in texts) / 1e6
    for name in list(SPLITTERS) * repeats:
        began = time.perf_counter()
        list(map(SPLITTERS[name], texts))
        seconds[name].append(time.perf_counter() - began)
    for name, split in SPLITTERS.items():
        rows.append([name, round(size / statistics.median(seconds[name]), 1)])
        rows[-1] += [(f1 if path.endswith('.conllu') else golden)(split, path) for path in boundaries]
    return [['splitter', 'MB/s', *map(os.path.basename, boundaries)], *rows]

def start(spec):
    """Give the process tiktoken's own encoder, nothing of ours."""
    global _encode
    library = prepare.Tokenizer(spec)._library if 'merges' in spec else tiktoken.get_encoding(spec['name'])
    _encode = library.encode_ordinary

def tokenize(texts):
    return sum(len(_encode(text)) for text in texts)

def tiktoken_alone(texts, spec, n):
    """Seconds to tokenize whole documents in n processes that are already up: what cannot be avoided."""
    groups = [texts[i:i + 64] for i in range(0, len(texts), 64)]
    with multiprocessing.get_context('spawn').Pool(n, start, (spec,)) as pool:
        pool.map(tokenize, groups[:n])
        began = time.perf_counter()
        list(pool.imap_unordered(tokenize, groups))
        return time.perf_counter() - began

def run(root, source, folder, n, tokenizer):
    """Seconds that a checkout's prepare.py takes."""
    began = time.perf_counter()
    command = [sys.executable, 'prepare.py', f'--dataset={source}', f'--data_dir={folder}', f'--num_proc={n}',
               f'--tokenizer={tokenizer}']
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return time.perf_counter() - began

def main():
    parser = argparse.ArgumentParser()
    for name in ('--text', '--other', '--boundaries'):
        parser.add_argument(name, default='')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--num_proc', type=int, default=os.cpu_count())
    parser.add_argument('--tokenizer', default='bpe:8192')
    parser.add_argument('--megabytes', type=int, default=32, help='of text in the small run')
    parser.add_argument('--times', type=int, default=4, help='so much larger is the large run')
    parser.add_argument('--results', default=os.path.join(ROOT, 'tests', 'results'))
    given = parser.parse_args()
    texts = list(prepare.read_file(given.text, 'text', '') if given.text else prepare.read_bible()) * 4
    boundaries = sorted(glob.glob(f'{given.boundaries or "/no"}/*'))
    save(splitters(next(prepare.chunks(texts, 4_000_000)), boundaries, given.repeats), given, 'split')
    texts = next(prepare.chunks(texts, given.megabytes * 1_000_000))
    size = sum(len(text.encode()) for text in texts) / 1e6
    roots, rows = {'prepare.py': ROOT} | ({'the other checkout': given.other} if given.other else {}), []
    with tempfile.TemporaryDirectory() as folder:
        sources = [f'{folder}/{name}.jsonl' for name in ('small', 'large')]
        for source, times in zip(sources, (1, given.times)):
            with open(source, 'wb') as f:
                f.write(jsonl(texts) * times)
        run(ROOT, sources[0], f'{folder}/data', given.num_proc, given.tokenizer)
        spec = json.load(open(f'{folder}/data/meta.json'))['tokenizer']
        for n in sorted({1, given.num_proc}):
            speeds = {name: [] for name in ('tiktoken alone', *roots)}
            for i in range(given.repeats):
                speeds['tiktoken alone'].append(size / tiktoken_alone(texts, spec, n))
                for name, root in roots.items():
                    short, long = (run(root, source, f'{folder}/{name}_{n}_{i}_{k}', n, given.tokenizer)
                                   for k, source in enumerate(sources))
                    speeds[name].append(size * (given.times - 1) / (long - short))
            for name, values in speeds.items():
                rows.append((f'{n} processes: {name}, MB/s', f'{statistics.median(values):.1f}'))
                if name != 'prepare.py':
                    ratios = sorted(a / b for a, b in zip(speeds['prepare.py'], values))
                    rows.append((f'{n} processes: prepare.py / {name}, median (least to most)',
                                 f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'))
    rows.append((f'{given.tokenizer}; text, MB', f'{size:.0f} and {size * given.times:.0f}'))
    save([('what', 'value'), *rows], given, 'prepare')

def save(rows, given, name):
    """Print the rows and keep them as csv."""
    for row in rows:
        print(*row, sep=', ')
    with open(f'{given.results}/{name}.csv', 'w', newline='') as f:
        csv.writer(f).writerows(rows)

if __name__ == '__main__':
    main()
