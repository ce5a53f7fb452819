"""Sentence splitters: MB/s on one core; boundary F1 on treebanks and golden rules held.

    python tests/bench_split.py --boundaries=<folder of .conllu files and golden rules> --text=<.jsonl.gz>

Without --text: the embedded Bible. Writes tests/results/split.csv.
"""

import argparse
import csv
import glob
import json
import os
import re
import statistics
import time

import sentencex
from conftest import ROOT

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

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--boundaries', default='/no')
    parser.add_argument('--text', default='')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--out', default=os.path.join(ROOT, 'tests', 'results', 'split.csv'))
    given = parser.parse_args()
    texts = prepare.read_file(given.text, 'text', '') if given.text else prepare.read_bible()
    texts = next(prepare.chunks(texts, 4_000_000))
    seconds, rows = {name: [] for name in SPLITTERS}, []
    for name in list(SPLITTERS) * given.repeats:  # in turn, so that a slow moment of the machine falls on all
        began = time.perf_counter()
        list(map(SPLITTERS[name], texts))
        seconds[name].append(time.perf_counter() - began)
    for name, split in SPLITTERS.items():
        speed = sum(len(text.encode()) for text in texts) / 1e6 / statistics.median(seconds[name])
        rows.append({'splitter': name, 'MB/s': round(speed, 1)})
        for path in sorted(glob.glob(f'{given.boundaries}/*')):
            rows[-1][os.path.basename(path)] = (f1 if path.endswith('.conllu') else golden)(split, path)
        print(rows[-1])
    with open(given.out, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__':
    main()
