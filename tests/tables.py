"""The tables of README.md and tests/results/README.md, from the files that they are of.

    python tests/tables.py            prints them
    python tests/tables.py --write    puts them in their places, between <!-- name --> and <!-- end -->

tests/test_readme.py sees that they are there as printed.
"""

import csv
import json
import os
import re
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'tests', 'results')
PLACES = 'README.md', 'tests/results/README.md'
RUNS = {'demo, seed 1337': 'demo_1337', 'demo, seed 1': 'demo_1', 'openstax': 'openstax', 'Wikipedia + openstax': 'wikipedia'}

# (row of the table, digits, each (section, row, column) of metrics.json; no column: the first). One has its interval with it,
# several stand side by side. Rows of HEADLINE go into README.md too.
INSIDE, CORPUS, SKILL, AHEAD = 'retrieval in document', 'retrieval corpus', 'feature similarity', 'rollout, sentences ahead'
LESS, STS, NATS, TFIDF = 'model minus baseline', 'STS, Spearman x 100', 'nats per token', 'TF-IDF of the window'
BASELINES = {**{row: row for row in ('copy-last', 'context mean', 'random encoder')}, 'TF-IDF': TFIDF}
ALL = [
    ('corpus MRR', 3, (CORPUS, 'model', 'MRR')),
    *((f'… {name}', 3, (CORPUS, row, 'MRR')) for name, row in BASELINES.items()),
    *((f'… less {name}', 3, (LESS, row, 'corpus MRR')) for name, row in BASELINES.items()),
    ('in-document MRR', 3, (INSIDE, 'model', 'MRR')),
    *((f'… {name}', 3, (INSIDE, row, 'MRR')) for name, row in BASELINES.items()),
    ('… chance', 3, (INSIDE, 'chance', 'MRR')),
    *((f'… less {name}', 3, (LESS, row, 'in-document MRR')) for name, row in BASELINES.items()),
    ('in-document R@1', 3, (INSIDE, 'model', 'R@1')),
    ('… less TF-IDF', 3, (LESS, TFIDF, 'in-document R@1')),
    ('copy rate', 3, (INSIDE, 'model', 'copy rate')),
    ('skill', 3, (SKILL, 'model', 'skill')),
    *((f'… {row}', 3, (SKILL, row, 'skill')) for row in ('copy-last', 'context mean', 'ridge')),
    *((f'… less {row}', 3, (LESS, row, 'skill')) for row in ('copy-last', 'context mean', 'ridge')),
    *((f'skill {h} sentences ahead{of}', 3, (AHEAD, f'{row}, {h}', 'skill')) for h in (2, 4, 8)
      for of, row in (('', 'concepts'), (', copy-last', 'copy-last'))),
    ('cosine of predictions with unrelated', 3, (SKILL, 'model', 'unrelated')),
    ('RankMe, centred; dimensions', 0, ('geometry', 'model', 'RankMe, centred'), ('geometry', 'model', 'dimensions')),
    ('nats per token: concept; shuffled; none', 2, *(('perplexity', row, NATS) for row in ('D(z)', 'D(z), shuffled', 'no concept'))),
    ('… of predictions; shuffled', 2, *(('perplexity', row, NATS) for row in ('D(p)', 'D(p), shuffled'))),
    ('… a language model that reads the window', 2, ('perplexity', 'language model, reading the window', NATS)),
    ('… saved by predictions, against none', 2, ('perplexity', 'D(p)', 'information')),
    ('reconstructions: BLEU; ROUGE-L', 1, ('text', 'reconstruct', 'BLEU'), ('text', 'reconstruct', 'ROUGE-L')),
    ('… shuffled concept', 1, *(('text', 'reconstruct, shuffled concept', c) for c in ('BLEU', 'ROUGE-L'))),
    ('BLEU of 32 tokens at most; shuffled concept', 1, *(('text', f'reconstruct{row}', 'BLEU') for row in (
        ', of 32 tokens at most', ', shuffled concept, of 32 tokens at most'))),
    ('a linear probe finds the document among 100; guess', 3, *(('probes', row, 'document, accuracy') for row in ('model', 'guess'))),
    ('… random encoder', 3, ('probes', 'random encoder', 'document, accuracy')),
    ('… length and place in the document, R²', 2, ('probes', 'model', 'length, R²'), ('probes', 'model', 'position, R²')),
    ('judge (MiniLM): reconstructions; predictions', 2, *(('judge', row, 'cosine') for row in ('reconstruct', 'predict'))),
    ('… shuffled concept; copy-last', 2, *(('judge', row, 'cosine') for row in ('reconstruct, shuffled concept', 'copy-last'))),
    ('STS-B dev', 1, (STS, 'model', None)),
    ('… random encoder', 1, (STS, 'random encoder', None)),
    ('… idf-weighted random vectors', 1, (STS, 'random token mean, idf', None))]
SHOWN = {*((CORPUS, row, 'MRR') for row in ('model', 'copy-last', 'context mean', TFIDF)), (LESS, TFIDF, 'corpus MRR'),
         *((INSIDE, row, 'MRR') for row in ('model', 'copy-last', 'context mean', TFIDF, 'chance')), (LESS, 'random encoder', 'in-document MRR'),
         *((SKILL, row, 'skill') for row in ('model', 'copy-last', 'context mean', 'ridge')), (SKILL, 'model', 'unrelated'),
         ('geometry', 'model', 'RankMe, centred'), ('perplexity', 'D(z)', NATS), ('text', 'reconstruct, of 32 tokens at most', 'BLEU'),
         (STS, 'model', None), (STS, 'random token mean, idf', None)}
HEADLINE = [row for row in ALL if row[2] in SHOWN]
MINILM = [row for row in ALL if row[2][0] not in ('perplexity', 'text', 'judge')]  # it has no decoder


def read(*path):
    """Rows of a csv file of tests/results, as dicts."""
    with open(os.path.join(RESULTS, *path), encoding='utf-8', newline='') as f:
        return list(csv.DictReader(f))


def cell(sections, digits, places):
    """What stands at each (section, row, column), side by side; one has its interval with it; '' where it was not measured."""
    found = []
    for section, row, column in places:
        values = sections.get(section, {}).get(row, {})
        column = column or next(iter(values), '')
        if column not in values:
            return ''
        found += [values[column + end] for end in ('', '_low', '_high')[:3 if len(places) == 1 and f'{column}_low' in values else 1]]
    text = [f'{v:.{digits}f}' for v in found]
    return f'{text[0]} ({text[1]} to {text[2]})' if len(places) == 1 and len(text) == 3 else '; '.join(text)


def table(head, rows):
    """Markdown, the first column to the left."""
    return [f'| {" | ".join(head)} |'.replace('|  |', '| |'), '|---|' + '---:|' * (len(head) - 1), *(f'| {" | ".join(r)} |' for r in rows)]


def of_runs(rows, files):
    """A column for each metrics.json of {heading: file}."""
    found = []
    for file in files.values():
        with open(os.path.join(RESULTS, file), encoding='utf-8') as f:
            found.append(json.load(f))
    lines = [[label, *(cell(m['metrics'], digits, places) for m in found)] for label, digits, *places in rows]
    return table(['', *files], [*lines, ['verdict', *(m['verdict'] for m in found)]])


def trained(file):
    """Minutes that a run took and its tokens/s, by its log."""
    rows = [r for r in file if r['seconds']]
    return f"{float(rows[-1]['seconds']) / 60:.0f}; {statistics.median(float(r['tokens_per_s']) for r in rows):,.0f}"


def results(rows):
    """The runs' table, and how long they took."""
    lines = of_runs(rows, {name: f'{folder}/metrics.json' for name, folder in RUNS.items()})
    times = [[f'{what}: minutes; tokens/s', *(trained(read(folder, file)) for folder in RUNS.values())]
             for what, file in (('encoder', 'metrics.csv'), ('decoder', 'metrics_decoder.csv'))]
    return [*lines, *(f'| {" | ".join(r)} |' for r in times)]


def signed(value, half, digits):
    """A difference and half of its interval; '' where there is none."""
    if not value:
        return ''
    text = f'{float(value):+.{digits}f}'
    if not float(text):
        text = text[1:]
    return re.sub(r'(?<!\d)0\.', '.', f'{text} ± {float(half):.{digits}f}')


def ablation():
    """Each row's differences from the first."""
    columns = [('corpus MRR', 3), ('in-document MRR', 3), ('skill', 3), ('STS', 1)]
    lines = []
    for i, r in enumerate(read('ablation.csv')):
        cells = [f'{float(r[c]):.{d}f}' if i == 0 else
                 signed(r[f'{c}, from default'], r[f'{c}, from default, half of 95 % interval'], d) for c, d in columns]
        lines.append([r['row'], *cells, f"{float(r['unrelated cosine']):.3f}"])
    return table(['', 'corpus MRR', 'in-document MRR', 'skill', 'STS-B dev', 'unrelated cosine'], lines)


def hypotheses():
    """What the best of four says, told from the truth, beside the best of others."""
    found = {r['row']: r for r in read('ablation.csv')}['hypotheses=4']
    half = ', half of 95 % interval'
    return table(['', 'skill', 'corpus MRR'], [
        [label, *(f'{float(found[c]):.3f} ± {float(found[c + half]):.3f}' for c in columns)] for label, *columns in (
            ('the prediction', 'skill', 'corpus MRR'),
            *((label, f'best of k{name}: skill', f'best of k{name}: MRR') for label, name in (
                ('hypotheses', ''), ('at random', ' at random'), ('towards targets of training', ' near training'))))])


def start():
    """Variants of the start: differences from the first."""
    columns = [('corpus MRR', 3), ('in-document MRR', 3), ('skill', 3), ('STS-B', 1)]
    return table(['', 'corpus MRR', 'in-document MRR', 'skill', 'STS-B dev'], [
        [r['variant'], *(f'{float(r[c]):.{d}f}' if i == 0 else signed(r[c], r[f'{c} ±'], d) for c, d in columns)]
        for i, r in enumerate(read('start.csv'))])


def tables():
    """{name: its lines}."""
    return {'headline': results(HEADLINE), 'results': results(ALL),
            'MiniLM': of_runs(MINILM, {'MiniLM': 'minilm/before.json', '… after 100 steps': 'minilm/after.json'}),
            'ablation': ablation(), 'hypotheses': hypotheses(), 'start': start()}


def filled(text, found):
    """`text` with the tables `found` between their marks."""
    for name, lines in found.items():
        text = re.sub(rf'(<!-- {name} -->\n).*?(<!-- end -->)', lambda m, lines=lines: m[1] + '\n'.join(lines) + '\n' + m[2], text,
                      flags=re.DOTALL)
    return text


if __name__ == '__main__':
    if sys.argv[1:] == ['--write']:
        for place in PLACES:
            path = os.path.join(ROOT, place)
            with open(path, encoding='utf-8') as f:
                text = f.read()
            with open(path, 'w', encoding='utf-8') as f:
                f.write(filled(text, tables()))
    else:
        for name, lines in tables().items():
            print(f'\n{name}\n', *lines, sep='\n')
