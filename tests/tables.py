"""The tables of README.md and tests/results/README.md, from the metrics.json of each run under tests/results.

    python tests/tables.py    puts them in their places, between <!-- name --> and <!-- end -->
"""

import glob
import json
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PLACES = 'README.md', 'tests/results/README.md'
LESS = 'model less this'
HEADLINE = {  # section: the baselines beside the model
    'information of a prediction': ('copy-last', 'window mean', 'step 0'),
    'information of a reconstruction': (), 'feature similarity': ('copy-last', 'window mean', 'step 0'),
    'retrieval in document': ('copy-last', 'TF-IDF of the window', 'step 0', 'chance'),
    'retrieval corpus': ('copy-last', 'TF-IDF of the window', 'step 0'),
    'text, reconstruct, up to 32 tokens': ('shuffled concept',),
    'STS, Spearman x 100': ('random token mean, idf', 'step 0')}

def runs():
    """{name: its sections}, of every run."""
    out = {}
    for path in sorted(glob.glob(os.path.join(ROOT, 'tests', 'results', '*', 'metrics.json'))):
        with open(path, encoding='utf-8') as f:
            out[os.path.basename(os.path.dirname(path))] = json.load(f)['metrics']
    return out

def cell(value):
    """A value with half of its interval; nothing where it was not measured."""
    if not isinstance(value, list):
        return '' if value is None else f'{value:.3g}'
    digits = 3 if abs(value[0]) < 10 else 1
    return f'{value[0]:.{digits}f} ± {(value[2] - value[1]) / 2:.{digits}f}'

def table(found, rows_of):
    """Markdown: the model's headline in each section of rows_of, and how far ahead of each row it is."""
    lines = [f'| | {" | ".join(found)} |', '|---|' + '---:|' * len(found)]
    for title, names in rows_of.items():
        sections = [run.get(title, {'model': {}}) for run in found.values()]
        first = next((c for s in sections for c in s['model']), '')
        rows = {f'**{title}**, {first}': [s['model'].get(first) for s in sections]} | {
            f'… less {name}': [s.get(name, {}).get(LESS) for s in sections] for name in names}
        lines += [f'| {name} | {" | ".join(map(cell, row))} |' for name, row in rows.items()]
    return lines

def tables():
    """{name: its lines}."""
    found, rows_of = runs(), {}
    for run in found.values():
        for title, rows in run.items():
            names = [name for name, row in rows.items() if LESS in row]
            rows_of[title] = list(dict.fromkeys([*rows_of.get(title, []), *names]))
    return {'headline': table(found, HEADLINE), 'results': table(found, rows_of)}

def filled(text, found):
    """`text` with the tables `found` between their marks."""
    for name, lines in found.items():
        new = '\n'.join(lines) + '\n'
        text = re.sub(rf'(<!-- {name} -->\n).*?(<!-- end -->)', lambda m, new=new: m[1] + new + m[2], text,
                      flags=re.DOTALL)
    return text

if __name__ == '__main__':
    for place in PLACES:
        text = filled(open(os.path.join(ROOT, place), encoding='utf-8').read(), tables())
        open(os.path.join(ROOT, place), 'w', encoding='utf-8').write(text)
