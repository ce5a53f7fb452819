"""One switch at a time: train, evaluate and compare, over the same text, steps and seeds.

    python tests/ablate.py --data_dir=data/openstax --work=out/ablate --sts=<STS-B dev>
    python tests/ablate.py --data_dir=data/demo --work=out/ablate --rows=default,loss=mse --seeds=2

A run that is finished is not run again: the same command goes on where it stopped, and several machines can
share the rows (--seeds=1 --first_seed=2, --rows=…, all with one --work). The table has means over seeds and,
in brackets, how far they are from the first row's, seed by seed, ± half of the 95 % interval (Student's t,
over seeds alone, not corrected for the number of rows). Writes tests/results/ablation.csv.
"""

import argparse
import csv
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
from scipy.stats import t

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

ROWS = [  # what a row changes of train_encoder.py's settings, or by a name of NAMED; ' + ' between them
    'default', 'untrained', 'untrained + start_passes=0', 'n_layer=0', 'n_layer=2', 'freeze_encoder=True',
    'predictor_lr_scale=0.1', 'predictor_lr_scale=1', 'start_passes=0', 'loss=mse', 'loss=infonce',
    'target=stopgrad', 'target=shared', 'whiten=False', 'reg=vicreg', 'reg=sigreg', 'context=tokens',
    'target=shared + whiten=False + reg=vicreg', 'target=shared + whiten=False + reg=sigreg',
    'predictor_layer=1', 'predictor_layer=4', 'pooling=mean', "seed project's recipe"]
NAMED = {'default': '', 'untrained': '--learning_rate=0 --max_iters=1',
         'reg=sigreg': '--reg=sigreg --reg_weight=0.02',
         "seed project's recipe": '--loss=mse --whiten=False --context=tokens --pooling=mean '
                                  '--start_passes=0 --embedding_lr_scale=1 --predictor_lr_scale=1 '
                                  '--max_sentences=9 --block_size=288 --batch_size=14'}
COLUMNS = {  # section, row and column of evaluate.py's metrics.json; no column: the first one
    'information': ('information of a prediction', 'model', 'information'),
    'nats given the concept': ('information of a reconstruction', 'model', 'nats per token'),
    'skill': ('feature similarity', 'model', 'skill'),
    'skill, step 0': ('feature similarity', 'step 0', 'skill'),
    "skill less the window mean's": ('feature similarity', 'model', "skill less the window mean's"),
    'corpus MRR': ('retrieval corpus', 'model', 'MRR'),
    'corpus MRR, step 0': ('retrieval corpus', 'step 0', 'MRR'),
    'in-document MRR': ('retrieval in document', 'model', 'MRR'),
    'STS': ('STS, Spearman x 100', 'model', ''),
    'rank': ('geometry', 'model', 'RankMe before whitening'),
    'unrelated cosine': ('geometry', 'model', 'cosine of random pairs'),
    'order sensitivity': ('geometry', 'model', 'order sensitivity')}

def measured(folder):
    """{column: number} of a run."""
    with open(os.path.join(folder, 'metrics.json')) as f:
        sections, out = json.load(f)['metrics'], {}
    for name, (section, row, column) in COLUMNS.items():
        if row in sections.get(section, ()):
            cell = sections[section][row][column or next(iter(sections[section][row]))]
            out[name] = cell[0] if isinstance(cell, list) else cell  # value, and ends of its interval
    return out

def settings(row):
    """The arguments that a row gives train_encoder.py."""
    return ' '.join(NAMED.get(part, f'--{part}') for part in row.split(' + '))

def one(name, seed, a):
    """Folder of one row and seed, trained and evaluated unless that is done."""
    folder = os.path.join(a.work, f'{name}_{seed}'.replace(' ', '_').replace("'", ''))
    shared, commands = [f'--data_dir={a.data_dir}', f'--out_dir={folder}'], []
    for kind, options, steps, row in (('encoder', a.encoder, a.iters, settings(name)),
                                      ('decoder', a.decoder, a.decoder_iters, '')):
        loop = f'--seed={seed} --max_iters={steps} --warmup_iters={steps // 8} --eval_interval={steps} {row}'
        commands += [[f'train_{kind}.py', *options.split(), *shared, *loop.split()]] if steps else []
    commands.append(['evaluate.py', *shared, f'--max_pairs={a.max_pairs}', f'--sts={a.sts}'])
    path = os.path.join(folder, 'commands.json')  # the mark that it is done
    if os.path.exists(path):
        with open(path) as f:
            assert json.load(f) == commands, f'{folder} was run with other settings: take another --work'
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # one that was stopped halfway
    for command in commands:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for file in glob.glob(f'{glob.escape(folder)}/*.pt'):
        os.unlink(file)
    with open(path, 'w') as f:
        json.dump(commands, f)
    return folder

def interval(values):
    """(mean, half of its 95 % interval) of a few numbers; Student's t."""
    n = len(values)
    return np.mean(values), t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5 if n > 1 else np.nan

def compared(found):
    """{row: {column: (mean, half of its interval, mean difference from the first row, half of its)}}.

    found: {row: [{column: number} of each seed]}. A seed draws the same start for every row (but where the
    predictor has another number of weights): differences seed by seed are told apart where means are not.
    """
    first = next(iter(found.values()))
    return {name: {c: (*interval([r[c] for r in runs]), *interval([r[c] - f[c] for r, f in zip(runs, first)]))
                   for c in runs[0]} for name, runs in found.items()}

def write(table, seeds, iters, folder):
    """Print the table and keep it as ablation.csv."""
    columns, first = list(next(iter(table.values()))), next(iter(table))
    print('\n| |' + ' | '.join(columns) + ' |\n|---|' + '---:|' * len(columns))
    for name, row in table.items():
        cells = ('{:.4g} ({:+.2g} ± {:.2g})'.format(row[c][0], *row[c][2:]) for c in columns)
        print(f'| {name} | ' + ' | '.join(cells) + ' |')
    with open(os.path.join(folder, 'ablation.csv'), 'w', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        names = ('', ', half of 95 % interval', f', from {first}', f', from {first}, half of 95 % interval')
        writer.writerow(['row', 'settings', 'seeds', 'steps', *(c + x for c in columns for x in names)])
        writer.writerows([name, settings(name), seeds, iters, *(f'{x:.5f}' for c in columns for x in row[c])]
                         for name, row in table.items())

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    small = '--n_embd=192 --n_head=3'
    for name, default in {  # no decoder_iters: no decoder
            'data_dir': 'data/openstax', 'work': 'out/ablate', 'sts': '', 'rows': ','.join(ROWS),
            'seeds': 3, 'first_seed': 1, 'encoder': f'config/encoder_openstax.py {small}', 'iters': 150,
            'decoder': f'config/decoder_openstax.py {small}', 'decoder_iters': 0, 'max_pairs': 600,
            'results': os.path.join(HERE, 'results')}.items():
        parser.add_argument(f'--{name}', type=type(default), default=default)
    a = parser.parse_args()
    a.data_dir, a.work, a.sts = (path and os.path.abspath(path) for path in (a.data_dir, a.work, a.sts))
    found = {name: [] for name in a.rows.split(',')}
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for name in found:
            found[name].append(measured(one(name, seed, a)))
            print(f'{name}, seed {seed}:', *(f'{k} {v:.3f},' for k, v in found[name][-1].items()), flush=True)
    write(compared(found), a.seeds, a.iters, a.results)

if __name__ == '__main__':
    main()
