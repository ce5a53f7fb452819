"""--hypotheses: several predicted concepts from training to the report."""

import numpy as np
import torch
from conftest import run
from test_train import ENCODER

import evaluate
from prepare import Corpus


def test_several_hypotheses_from_training_to_the_report(corpus_dir, tmp_path):
    out = tmp_path / 'out'
    encoder = ['train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={out}', *ENCODER]
    run(*encoder, '--hypotheses=3', '--max_iters=4')
    refused = run(*encoder, '--init_from=resume', check=False)
    assert refused.returncode == 1
    assert 'hypotheses=3, not 1' in refused.stderr
    run(*encoder, '--hypotheses=3', '--max_iters=8', '--init_from=resume')
    said = run('evaluate.py', f'--out_dir={out}', '--max_pairs=40').stdout
    assert '| hypotheses |' in said.split('### best of several')[1]


def test_a_checkpoint_from_before_a_setting_goes_on(corpus_dir, tmp_path):
    encoder = ['train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}', *ENCODER]
    run(*encoder, '--max_iters=2')
    state = torch.load(tmp_path / 'encoder.pt', weights_only=True)
    del state['config']['hypotheses'], state['settings']['hypotheses']
    torch.save(state, tmp_path / 'encoder.pt')
    run(*encoder, '--max_iters=3', '--init_from=resume')


def test_the_best_of_several_is_told_from_any_others(corpus_dir):
    """Hypotheses of which one is the truth, and which one that is; controls as wide as they are get less."""
    rng = np.random.default_rng(0)
    items, train = (evaluate.Items(Corpus(corpus_dir, split), rng, 100) for split in ('val', 'train'))
    z_all, z_train_all = (evaluate.unit(rng.standard_normal((len(x.sentences), 16))) for x in (items, train))

    class Knows:
        @staticmethod
        def roll(concepts, windows, each):
            ends = np.array([end for _, end in windows])
            found = evaluate.unit(rng.standard_normal((len(ends), 3, 16)))
            found[np.arange(len(ends)), (ends % 4 == 0) * 1] = concepts[ends]  # never the third
            return found
    p_train, p = (evaluate.unit(rng.standard_normal((len(x.target), 16))) for x in (train, items))
    rows = evaluate.best_of_k(Knows, train, items, z_train_all, z_all, p_train, p, np.zeros(16), items.candidates(rng, 8), rng)
    best, *others = rows['hypotheses'], rows['around the prediction, at random'], rows['towards targets of training']
    assert best['skill'] > 0.99
    assert best['MRR in document'] == best['MRR'] == 1
    share = (items.target % 4 == 0).mean()
    assert np.allclose([best[f'best {i}'] for i in (1, 2, 3)], [1 - share, share, 0])
    assert np.isclose(best['used'], np.exp(-share * np.log(share) - (1 - share) * np.log(1 - share)))
    for row in others:
        assert rows['the prediction']['skill'] < row['skill'] < 0.6
        assert row['MRR'] < 0.6
        assert np.isclose(row['cosine with their mean'], best['cosine with their mean'], atol=0.01)
