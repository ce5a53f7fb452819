"""One switch at a time: train, evaluate and compare, over the same text, tokens and seeds.

    python tests/ablate.py --data_dir=data/openstax --work=out/ablate --sts=<STS-B dev>
    python tests/ablate.py --data_dir=data/demo --work=out/ablate --rows=default,loss=mse --seeds=2

A run that is finished is not run again, so that the same command goes on where it stopped, and several machines or
cores can share the rows (--seeds=1 --first_seed=2, --rows=…, all with one --work, and in the end once more with all of them for
the table). It has means over seeds and, in brackets, how far they are from the first row's, seed by seed, ± half of the 95 %
interval (Student's t; over seeds alone, as all rows are measured on the same pairs; not corrected for the number of rows). A loss
cannot be compared across rows; retrieval, skill, STS-B, rank and what a decoder makes of the concepts can. Writes tests/results/ablation.csv and ablation.png.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
from scipy.stats import t

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

# the settings of train_encoder.py that a row changes
SEED_PROJECT = ['--loss=smooth_l1', '--whiten=False', '--context=tokens', '--pooling=mean', '--start_passes=0',
                '--embedding_lr_scale=1', '--predictor_lr_scale=1',
                '--max_sentences=9', '--block_size=288', '--batch_size=14']  # a window of 8 and the next one
ROWS = {
    'default': [],
    'untrained': ['--learning_rate=0', '--max_iters=1'],
    'untrained + start_passes=0': ['--learning_rate=0', '--max_iters=1', '--start_passes=0'],
    'start_passes=0': ['--start_passes=0'],
    'start_passes=0 + embedding_lr_scale=100': ['--start_passes=0', '--embedding_lr_scale=100'],
    'loss=mse': ['--loss=mse'],
    'loss=smooth_l1': ['--loss=smooth_l1'],
    'loss=infonce': ['--loss=infonce'],
    'target=stopgrad': ['--target=stopgrad'],
    'target=shared': ['--target=shared'],
    'whiten=False': ['--whiten=False'],
    'reg=vicreg': ['--reg=vicreg'],
    'reg=sigreg': ['--reg=sigreg', '--reg_weight=0.02'],
    'shared + sigreg + not whitened': ['--target=shared', '--reg=sigreg', '--reg_weight=0.02', '--whiten=False'],
    'shared + vicreg + not whitened': ['--target=shared', '--reg=vicreg', '--whiten=False'],
    'context=tokens': ['--context=tokens'],
    'predictor_layer=1': ['--predictor_layer=1'],
    'predictor_layer=4': ['--predictor_layer=4'],
    'pooling=mean': ['--pooling=mean'],
    'optimizer=muon': ['--optimizer=muon'],
    'optimizer=muon + learning_rate=3e-3': ['--optimizer=muon', '--learning_rate=3e-3', '--embedding_lr_scale=3.3'],
    'hypotheses=4': ['--hypotheses=4'],
    'ema .9': ['--ema_start=0.9', '--ema_end=0.9'],
    'ema .998': ['--ema_start=0.998', '--ema_end=0.998'],
    "seed project's recipe": SEED_PROJECT,
}
# (column, section, row, measure) of evaluate.py's metrics.json
COLUMNS = [('corpus MRR', 'retrieval corpus', 'model', 'MRR'), ('copy-last', 'retrieval corpus', 'copy-last', 'MRR'),
           ('in-document MRR', 'retrieval in document', 'model', 'MRR'),
           ('in-document R@1', 'retrieval in document', 'model', 'R@1'), ('skill', 'feature similarity', 'model', 'skill'),
           ('STS', 'STS, Spearman x 100', 'model', None), ('rank', 'geometry', 'model', 'RankMe, centred'),
           ('unrelated cosine', 'geometry', 'model', 'cosine of random pairs'),
           ('nats given the concept', 'perplexity', 'D(z)', 'nats per token'),
           *((f'best of k{name}: {column}', 'best of several', row, column) for column in ('skill', 'MRR') for name, row in
             (('', 'hypotheses'), (' at random', 'around the prediction, at random'), (' near training', 'towards targets of training'))),
           ('hypotheses used', 'best of several', 'hypotheses', 'used')]


def measured(folder):
    """{column: number} of a run."""
    with open(os.path.join(folder, 'metrics.json')) as f:
        sections = json.load(f)['metrics']
    out = {}
    for column, section, row, name in COLUMNS:
        if section in sections:
            values = sections[section][row]
            out[column] = values[name] if name else next(iter(values.values()))
    return out


def run(script, *arguments):
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f'ablate.py: {script} {" ".join(arguments)}: {(done.stderr.strip() or "killed").splitlines()[-1]}')


def one(name, seed, a):
    """Folder of one row and seed, trained and evaluated unless that is done."""
    folder = os.path.join(a.work, f'{name}_{seed}'.replace(' ', '_').replace("'", ''))
    shared = [f'--data_dir={a.data_dir}', f'--out_dir={folder}', f'--seed={seed}']
    commands = [['train_encoder.py', *a.encoder.split(), *shared, f'--max_iters={a.iters}', f'--warmup_iters={a.iters // 8}',
                 f'--eval_interval={a.iters}', *ROWS[name]]]
    if a.decoder_iters:
        commands.append(['train_decoder.py', *a.decoder.split(), *shared, f'--max_iters={a.decoder_iters}',
                         f'--warmup_iters={a.decoder_iters // 8}', f'--eval_interval={a.decoder_iters}'])
    commands.append(['evaluate.py', f'--out_dir={folder}', f'--max_pairs={a.max_pairs}', '--max_generated=50', '--dtype=bfloat16',
                     f'--max_train_sentences={8 * a.max_pairs}', f'--max_scored={a.max_pairs}', *([f'--sts={a.sts}'] if a.sts else [])])
    path = os.path.join(folder, 'commands.json')
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f) == commands:
                return folder
        raise SystemExit(f'ablate.py: {folder} was run with other settings: choose another --work, or remove it')
    shutil.rmtree(folder, ignore_errors=True)  # one that was stopped halfway
    for command in commands:
        run(*command)
    for file in os.listdir(folder):
        if file.endswith('.pt'):
            os.unlink(os.path.join(folder, file))
    with open(path, 'w') as f:  # the mark that it is done
        json.dump(commands, f)
    return folder


def interval(values):
    """(mean, half of its 95 % interval) of a few numbers; Student's t."""
    n = len(values)
    return np.mean(values), t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5 if n > 1 else np.nan


def compared(found):
    """{row: {column: (mean, half of its 95 % interval, mean difference from the first row's, half of its interval)}}.

    found: {row: [{column: number} of each seed]}. Differences are taken seed by seed: a seed draws the same start for every row
    (but where the predictor or hypotheses draw another number of weights before it), so that rows are told apart where the
    means' intervals overlap.
    """
    first = next(iter(found.values()))
    return {name: {c: (*interval([r[c] for r in runs]), *interval([r[c] - f.get(c, np.nan) for r, f in zip(runs, first)]))
                   for c in runs[0]} for name, runs in found.items()}


def write(table, seeds, iters, folder):
    """Print the table of so many seeds and steps; keep it as ablation.csv and, what retrieval and STS say, as ablation.png."""
    columns = [c for c, *_ in COLUMNS if any(c in row for row in table.values())]
    first = next(iter(table))
    print(f'\nIn brackets: from {first}, seed by seed, and half of the 95 % interval\n\n| |' + ' | '.join(columns) + ' |\n|---|' +
          '---:|' * len(columns))
    for name, row in table.items():
        cells = ('{:.{d}f} ({:+.{d}f} ± {:.{d}f})'.format(v[0], *v[2:], d=3 if abs(v[0]) < 10 else 1) if v else ''
                 for v in map(row.get, columns))
        print(f'| {name} | ' + ' | '.join(cells) + ' |')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'ablation.csv'), 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['row', 'settings', 'seeds', 'steps unless set', *(f'{c}{x}' for c in columns for x in (
            '', ', half of 95 % interval', f', from {first}', f', from {first}, half of 95 % interval'))])
        writer.writerows([name, ' '.join(ROWS[name]), seeds, iters, *('' if np.isnan(x) else f'{x:.5f}' for c in columns
                          for x in row.get(c, (np.nan,) * 4))] for name, row in table.items())
    picture(table, os.path.join(folder, 'ablation.png'))


def picture(table, path):
    """Differences of corpus MRR, in-document MRR and STS of each row from the first, with intervals."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    columns = [c for c in ('corpus MRR', 'in-document MRR', 'STS') if c in next(iter(table.values()))]
    y = np.arange(len(table))[::-1]
    _, axes = plt.subplots(1, len(columns), sharey=True, figsize=(3.2 * len(columns), 0.8 + 0.26 * len(table)), dpi=110)
    for axis, column in zip(np.atleast_1d(axes), columns):
        mean, half = np.array([row[column][2:] for row in table.values()]).T
        axis.errorbar(mean, y, xerr=np.nan_to_num(half), fmt='o', color='black', markersize=4, capsize=2)
        axis.axvline(0, color='0.6', linestyle=':')
        axis.set_xscale('symlog', linthresh=0.01 if column != 'STS' else 1)  # a collapse and a nuance in one picture
        axis.set(xlabel=f'{column}, from {next(iter(table))}', yticks=y, yticklabels=list(table))
        axis.grid(alpha=0.3)
    plt.savefig(path, bbox_inches='tight', metadata={'Software': None})
    plt.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='data/openstax')
    parser.add_argument('--work', default='out/ablate', help='folder of the runs')
    parser.add_argument('--results', default=os.path.join(HERE, 'results'))
    parser.add_argument('--rows', default='', help='comma-separated; none: all')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first_seed', type=int, default=1)
    parser.add_argument('--encoder', default='config/encoder_openstax.py --n_embd=192 --n_head=3', help='its arguments')
    parser.add_argument('--decoder', default='config/decoder_openstax.py --n_embd=192 --n_head=3', help='its arguments')
    parser.add_argument('--iters', type=int, default=150, help='steps of the encoder')
    parser.add_argument('--decoder_iters', type=int, default=0, help='steps of a decoder for each; 0: none')
    parser.add_argument('--max_pairs', type=int, default=600)
    parser.add_argument('--sts', default='')
    a = parser.parse_args()
    a.data_dir, a.work = (os.path.abspath(p) for p in (a.data_dir, a.work))
    a.sts = a.sts and os.path.abspath(a.sts)
    names = [n for n in ROWS if n in a.rows.split(',')] if a.rows else list(ROWS)
    if a.rows and len(names) < len(a.rows.split(',')):
        raise SystemExit(f"ablate.py: --rows={a.rows}: expected some of {', '.join(ROWS)}")
    seeds = range(a.first_seed, a.first_seed + a.seeds)
    found = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            found[name].append(measured(one(name, seed, a)))
            print(f"{name}, seed {seed}: " + ', '.join(f'{k} {v:.3f}' for k, v in found[name][-1].items()), flush=True)
    write(compared(found), len(seeds), a.iters, a.results)


if __name__ == '__main__':
    main()
