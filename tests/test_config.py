"""config.override: presets and --name=value, and what a mistake says."""

import ast
import contextlib
import os

import pytest
from conftest import ROOT, run

from config import override


def names():
    return {'rate': 0.1, 'steps': 10, 'name': 'a', 'fast': True, '_private': 1, '__file__': __file__, 'CONSTANT': 2}


def test_values_keep_their_types():
    given = override(names(), ['--rate=1', '--steps=20', '--name=x=y', '--fast=false'])
    assert given == {'rate': 1.0, 'steps': 20, 'name': 'x=y', 'fast': False}
    assert type(given['rate']) is float


def test_what_is_auto_may_also_be_true_or_false(tmp_path):
    preset = tmp_path / 'p.py'
    preset.write_text('compile = False\n')
    scope = {'compile': 'auto', 'name': 'a', '__file__': __file__}
    assert override(dict(scope), ['--compile=True'])['compile'] is True
    assert override(dict(scope), ['--compile=0'])['compile'] is False
    assert override(dict(scope), [str(preset)])['compile'] is False
    assert override(dict(scope), [str(preset), '--compile=auto'])['compile'] == 'auto'
    assert override(dict(scope), ['--name=True'])['name'] == 'True'


def test_presets_and_flags_apply_in_order(tmp_path):
    preset = tmp_path / 'p.py'
    preset.write_text('import math\n_half = 4\nsteps = 2 * _half\nrate = 1\n')
    scope = names()
    override(scope, [str(preset), '--rate=3'])
    assert (scope['steps'], scope['rate'], scope['_private']) == (8, 3.0, 1)
    assert override(names(), ['--rate=3', str(preset)])['rate'] == 1.0


@pytest.mark.parametrize(('argument', 'says'), [
    ('--stepz=1', "did you mean 'steps'"), ('--steps=1.5', 'expected int'), ('--fast=maybe', 'expected True or False'),
    ('steps=1', 'cannot read'), ('missing.py', 'no preset'), ('--zzzzzzzz=1', '--help')])
def test_mistakes_stop_with_one_line(argument, says):
    with pytest.raises(SystemExit) as stopped:
        override(names(), [argument])
    assert says in str(stopped.value)
    assert '\n' not in str(stopped.value)


@pytest.mark.parametrize(('argument', 'says'), [
    ('--steps=0', '--steps=0: expected 1 or more'), ('--rate=1.5', 'from 0 to 1'), ('--rate=nan', 'from 0 to 1'), ('--rate=1', '')])
def test_values_out_of_bounds_stop(argument, says):
    limits = {'steps': (1, float('inf')), 'rate': (0, 1)}
    if not says:
        assert override(names(), [argument], limits)['rate'] == 1
        return
    with pytest.raises(SystemExit, match=says):
        override(names(), [argument], limits)


@pytest.mark.parametrize(('line', 'says'), [('stepz = 1', "did you mean 'steps'"), ("steps = '1'", 'expected int'),
                                            ('1 +', 'does not run')])
def test_a_preset_is_checked_alike(tmp_path, line, says):
    preset = tmp_path / 'p.py'
    preset.write_text(line + '\n')
    with pytest.raises(SystemExit, match=says):
        override(names(), [str(preset)])


def test_a_preset_of_another_stage_is_refused():
    done = run('train_encoder.py', 'config/decoder_demo.py', check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == 'train_encoder.py: config/decoder_demo.py is a preset of train_decoder.py'


def defaults(script):
    """The settings of a script, read without running it."""
    values = {}
    for node in ast.parse(open(os.path.join(ROOT, script)).read()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return {**values, '__file__': os.path.join(ROOT, script)}


STAGES = {'prepare': 'prepare.py', 'encoder': 'train_encoder.py', 'decoder': 'train_decoder.py'}
PRESETS = sorted(f for f in os.listdir(os.path.join(ROOT, 'config')) if f.endswith('.py') and f != '__init__.py')


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_fits_its_stage(preset):
    scope = defaults(STAGES[preset.split('_')[0]])
    override(scope, [os.path.join(ROOT, 'config', preset)])
    if 'n_head' in scope:
        assert scope['n_embd'] % (2 * scope['n_head']) == 0
    assert scope['data_dir' if preset.startswith('prepare') else 'out_dir']


@pytest.mark.parametrize('script', [*STAGES.values(), 'evaluate.py'])
def test_help_shows_every_setting_and_what_it_means(script):
    done = run(script, '--help')
    shown = defaults(script)
    for name in (n for n in shown if n.islower() and not n.startswith('_')):
        if isinstance(shown[name], bool | int | float | str) and name not in ('step', 'first_step', 'interrupted', 'refused'):
            assert f'--{name}' in done.stdout, name
