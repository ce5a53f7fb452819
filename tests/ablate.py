"""Train the encoder with one thing changed at a time, evaluate each on the same items, and write one table.

    python tests/ablate.py config/encoder_openstax.py --max_iters=300 --sts=<file of score, s1, s2>

Arguments are those of train_encoder.py, but for --sts= (evaluate.py's), --seeds=N and --to= (a csv beside
tests/results/ablation.csv). Losses do not compare across rows; retrieval, skill, STS and rank do.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = {
    'as it is': [],
    'plain mean over tokens': ['--pooling=mean'],
    'embeddings at the common rate': ['--embedding_lr_scale=1'],
    'predictor at the common rate': ['--predictor_lr_scale=1'],
    'half as wide': ['--n_embd=256', '--n_head=4'],
    'two layers': ['--n_layer=2'],
    'context from tokens': ['--context=tokens'],
}


def row(variant, seed, folder):
    """What evaluate.py and train_encoder.py say of the run in `folder`."""
    with open(os.path.join(folder, 'metrics.json'), encoding='utf-8') as f:
        m = json.load(f)['metrics']
    with open(os.path.join(folder, 'metrics.csv'), encoding='utf-8') as f:
        log = list(csv.DictReader(f))
    inside, corpus, similarity = m['retrieval in document'], m['retrieval corpus'], m['feature similarity']
    out = {'variant': variant, 'seed': seed, 'million tokens': int(log[-1]['tokens']) / 1e6,
           'seconds': max(float(r['seconds'] or 0) for r in log),
           'skill': similarity['model']['skill'], 'skill, copy-last': similarity['copy-last']['skill'],
           'in document': inside['model']['MRR']}
    for name in ('model', 'copy-last', 'context mean', 'random encoder', 'TF-IDF of the window'):
        out[f'corpus MRR, {name}' if name != 'model' else 'corpus MRR'] = corpus[name]['MRR']
    out['half interval'] = (corpus['model']['MRR_high'] - corpus['model']['MRR_low']) / 2
    out['rank / d'] = m['geometry']['model']['rank_centred'] / m['geometry']['model']['dimensions']
    for name, scores in m.get('STS, Spearman x 100', {}).items():
        if name in ('model', 'random encoder', 'random token mean, idf'):
            out[f'STS, {name}'] = next(iter(scores.values()))
    return {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in out.items()}


def main():
    own = {a.split('=')[0][2:]: a.split('=', 1)[1] for a in sys.argv[1:] if a.startswith(('--sts=', '--seeds=', '--to='))}
    given = [a for a in sys.argv[1:] if a.split('=')[0][2:] not in own]
    if not given or '--help' in given:
        raise SystemExit(__doc__)
    to = own.get('to', os.path.join(HERE, 'results', 'ablation.csv'))
    rows = []
    for seed in range(int(own.get('seeds', 1))):
        for variant, flags in VARIANTS.items():
            with tempfile.TemporaryDirectory() as folder:
                common = [f'--out_dir={folder}', f'--seed={seed}']
                subprocess.run([sys.executable, 'train_encoder.py', *given, *flags, *common], cwd=os.path.dirname(HERE), check=True)
                subprocess.run([sys.executable, 'evaluate.py', f'--out_dir={folder}', '--max_pairs=3000', f"--sts={own.get('sts', '')}"],
                               cwd=os.path.dirname(HERE), check=True, stdout=subprocess.DEVNULL)
                rows.append(row(variant, seed, folder))
            print(rows[-1], flush=True)
            with open(to, 'w', newline='', encoding='utf-8') as f:  # after each: a table that was cut short is one all the same
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == '__main__':
    main()
