"""--hypotheses: several predicted concepts from training to the report."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from conftest import run
from test_train import ENCODER

import evaluate
import model as lib
from prepare import Corpus


def test_several_hypotheses_from_training_to_the_report(corpus_dir, tmp_path):
    encoder = ['train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}', *ENCODER, '--start_passes=0', '--max_iters=4']
    run(*encoder, '--hypotheses=3')
    refused = run(*encoder, '--init_from=resume', check=False)
    assert refused.returncode == 1
    assert 'hypotheses=3, not 1' in refused.stderr
    said = run('evaluate.py', f'--out_dir={tmp_path}', '--max_pairs=40', '--max_train_sentences=400').stdout
    assert '| hypotheses |' in said.split('### best of several')[1]


def test_a_checkpoint_from_before_a_setting_goes_on(corpus_dir, tmp_path):
    encoder = ['train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}', *ENCODER, '--start_passes=0']
    run(*encoder, '--max_iters=1')
    state = torch.load(tmp_path / 'encoder.pt', weights_only=True)
    del state['config']['hypotheses'], state['settings']['hypotheses']
    torch.save(state, tmp_path / 'encoder.pt')
    run(*encoder, '--max_iters=2', '--init_from=resume')


def test_the_best_of_several_is_told_from_any_others(corpus_dir):
    """Hypotheses of which one is the truth, and which one that is; the controls get less, and are as wide."""
    rng = np.random.default_rng(0)
    items, train = (evaluate.Items(Corpus(corpus_dir, split), rng, 100) for split in ('val', 'train'))
    z_all, z_train_all = (evaluate.unit(rng.standard_normal((len(x.sentences), 16))) for x in (items, train))
    train_p, p = (evaluate.unit(rng.standard_normal((len(x.target), 16))) for x in (train, items))

    def rows(roll, context='concepts'):
        model = SimpleNamespace(hypotheses=True, config=SimpleNamespace(context=context))
        return evaluate.several(SimpleNamespace(
            encoder=SimpleNamespace(model=model, roll=roll), items=items, train=train, z_all=z_all, z_train_all=z_train_all,
            train_p=train_p, p=p, z=z_all[items.target], mean=np.zeros(16), document=items.document[items.target],
            candidates=items.candidates(rng, 8))).get('best of several')

    def knows(concepts, windows, each):
        ends = np.array([end for _, end in windows])
        found = evaluate.unit(rng.standard_normal((len(ends), 3, 16)))
        found[np.arange(len(ends)), (ends % 4 == 0) * 1] = concepts[ends]  # never the third
        return found

    def guesses(concepts, windows, each):
        return evaluate.unit(1 + 0.3 * rng.standard_normal((len(windows), 3, 16)))
    found = rows(knows)
    best, *others = found['hypotheses'], found['around the prediction, at random'], found['towards targets of training']
    assert best['skill'] > 0.99
    assert best['MRR in document'] == best['MRR'] == 1
    share = (items.target % 4 == 0).mean()
    assert np.allclose([best[f'best {i}'] for i in (1, 2, 3)], [1 - share, share, 0])
    assert np.isclose(best['used'], np.exp(-share * np.log(share) - (1 - share) * np.log(1 - share)))
    for row in others:
        assert found['the prediction']['skill'] < row['skill'] < 0.6
        assert row['MRR'] < 0.6
    wide = [row['with their mean'] for name, row in rows(guesses).items() if name != 'the prediction']
    assert np.allclose(wide, wide[0], atol=1e-3), wide
    assert 0.9 < wide[0] < 0.99
    assert rows(knows, 'tokens') is None


def best_on_a_rank(rank, folder):
    """Save the gradient that a rank's share of `folder`/losses.pt gets."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    losses, counted = torch.load(f'{folder}/losses.pt')
    part, counted = (x[2 * rank:2 + 3 * rank] for x in (losses, counted))  # 2 rows and 3
    part.requires_grad_()
    lib.best_of(part, torch.zeros_like(part), counted)[counted].sum().backward()
    torch.save(part.grad, f'{folder}/gradient_{rank}.pt')
    dist.destroy_process_group()


def test_hypotheses_are_balanced_over_all_ranks(tmp_path):
    torch.manual_seed(1)
    losses, counted = torch.rand(5, 6, 3), torch.rand(5, 6) < 0.7
    torch.save((losses, counted), tmp_path / 'losses.pt')
    torch.multiprocessing.spawn(best_on_a_rank, (str(tmp_path),), nprocs=2)
    losses.requires_grad_()
    lib.best_of(losses, torch.zeros_like(losses), counted)[counted].sum().backward()
    found = torch.cat([torch.load(tmp_path / f'gradient_{rank}.pt') for rank in (0, 1)])
    assert torch.allclose(found, losses.grad, atol=1e-6)
