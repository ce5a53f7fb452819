"""config.override: presets and --name=value, and what a mistake says."""

import ast
import contextlib
import os
import re
import tempfile

import hypothesis
import pytest
from conftest import MORE, ROOT, run
from hypothesis import strategies as st

from config import UserError, override

SCRIPT = '''"""What it does."""
from config import UserError, override
other = 3
# Settings: override them
rate = 0.1  # a share
steps = 10
name = 'a'  # or b
fast = True
compile = 'auto'  # or True
folder = 'out'
settings = override(globals(), positive=('steps',), shares=('rate',), choices={'name': ('a', 'b'),
                    'compile': ('auto', True, False)})
# ---------
last = 4
if name == 'b':
    raise UserError('a mistake\\nof two lines') if fast else RuntimeError('a bug')
if steps == 7:
    raise KeyboardInterrupt
'''
PATH = os.path.join(tempfile.mkdtemp(), 'script.py')
with open(PATH, 'w') as f:
    f.write(SCRIPT)

def names_of(script):
    """What a script assigns, constants alone, without running it; its file and name."""
    nodes = [n for n in ast.parse(open(script).read()).body if isinstance(n, ast.Assign)]
    values = {n.targets[0].id: n.value.value for n in nodes if isinstance(n.value, ast.Constant)}
    return values | {'__file__': script, '__name__': 'test', '__doc__': 'What it does.'}

def given(*argv):
    """The settings that SCRIPT would have with these arguments."""
    names = names_of(PATH)
    settings = override(names, list(map(str, argv)), ('steps',), ('rate',),
                        {'name': ('a', 'b'), 'compile': ('auto', True, False)})
    assert {k: names[k] for k in settings} == settings, 'the bare names are the settings'
    return settings

@pytest.mark.parametrize(('argument', 'value'), [
    ('--rate=0', 0.0), ('--steps=20', 20), ('--steps=1e3', 1000), ('--name=b', 'b'), ('--fast=false', False),
    ('--fast=0', False), ('--compile=True', True), ('--compile=auto', 'auto'), ('--rate=1e-2', 0.01),
    ('--folder=~/a b', os.path.expanduser('~/a b')), ('--folder=a~/b', 'a~/b')])
def test_values_keep_their_types(argument, value):
    found = given(argument)[argument[2:].split('=')[0]]
    assert (type(found), found) == (type(value), value)

def test_presets_and_flags_apply_in_order(tmp_path):
    preset = tmp_path / 'p.py'
    preset.write_text('import math\n_half = 4\nsteps = 2 * _half\nrate = 0\ncompile = False\n')
    expected = {'rate': 0.3, 'steps': 8, 'name': 'a', 'fast': True, 'compile': False, 'folder': 'out'}
    assert given(preset, '--rate=0.3') == expected
    assert given('--rate=0.3', preset) == expected | {'rate': 0.0}

@pytest.mark.parametrize(('argument', 'says'), [
    ('--stepz=1', "did you mean 'steps'"), ('--zzzzzzzz=1', '--help'), ('--other=1', 'unknown'),
    ('--last=1', 'unknown'), ('steps=1', 'cannot read'), ('x.py', 'No such file'), ('--fast=2', 'bool'),
    ('--steps=1.5', 'int'), ('--steps=1e-1', 'int'), ('--steps=inf', 'int'), ('--steps=0', 'above 0'),
    ('--rate=1', 'below 1'), ('--rate=inf', 'float'), ('--rate=1e999', 'below 1'), ('--rate=-0.1', 'below 1'),
    ('--name=c', 'one of a, b'), ('stepz = 1', "did you mean 'steps'"), ("steps = '1'", 'int'),
    ('steps = True', 'int'), ('steps = 1.5', 'int'), ('steps = 0', 'above 0'), ('name = None', 'one of'),
    ('1 +', 'not run'), ('raise OSError(2)', 'OSError'), (f'{ROOT}/config/run.py', 'not a preset')])
def test_mistakes_are_named(tmp_path, argument, says):
    if ' ' in argument:  # a preset is checked alike
        (tmp_path / 'p.py').write_text(argument + '\n')
        argument = tmp_path / 'p.py'
    with pytest.raises((UserError, SystemExit), match=re.escape(says)):
        given(argument)

VALUES = st.text() | st.integers().map(str) | st.floats().map(str) | st.just('9' * 5000)
NAMED = st.builds('--{}={}'.format, st.sampled_from(['rate', 'steps', 'name', 'fast', 'x']), VALUES)
OTHERS = st.sampled_from(['a.py', '--', '--=', '\0.py', '--a\nb=1', 'x'])

@hypothesis.settings(max_examples=300 * MORE, deadline=None)
@hypothesis.given(st.lists(NAMED | OTHERS, max_size=4))
def test_any_argument_is_taken_or_refused(arguments):
    with contextlib.suppress(UserError):
        found = given(*arguments)
        assert found['steps'] >= 1
        assert 0 <= found['rate'] < 1

@pytest.mark.parametrize(('arguments', 'code', 'says'), [
    (['--name=b'], 1, 'script.py: a mistake of two lines\n'), (['--steps=0'], 1, 'script.py: .*\n'),
    (['x\ny.py'], 1, 'script.py: .*\n'), (['--steps=7'], 130, 'script.py: interrupted\n'),
    (['--name=b', '--fast=0'], 1, 'Traceback[^$]*Error: a bug\n')])
def test_a_mistake_is_a_line_and_a_bug_a_traceback(arguments, code, says):
    done = run(PATH, *arguments, check=False, PYTHONPATH=ROOT)
    assert (done.returncode, done.stdout) == (code, '')
    assert re.fullmatch(says, done.stderr)

@pytest.mark.parametrize('script', ['prepare.py', 'train_encoder.py', 'train_decoder.py', 'evaluate.py'])
def test_presets_fit_their_stage_and_no_other_and_help_shows_every_setting(script, capsys):
    for preset in [f for f in os.listdir(f'{ROOT}/config') if re.fullmatch('[a-z]+_.*[.]py', f)]:
        scope, path = names_of(f'{ROOT}/{script}'), f'{ROOT}/config/{preset}'
        if preset.split('_')[0] in script:
            assert override(scope, [path]).get('n_embd', 0) % (2 * scope.get('n_head', 1)) == 0
        else:
            with pytest.raises(UserError, match='is a preset of|unknown setting'):
                override(scope, [path])
    with pytest.raises(SystemExit, match='^0$'):
        override(names_of(f'{ROOT}/{script}'), ['--help'])
    section = open(f'{ROOT}/{script}').read().partition('\n# Settings')[2].partition('\n# ---')[0]
    settings = [x for x in re.findall('^([a-z]\\w*) = ', section, re.M) if x != 'settings']
    assert re.findall('^  --(\\w+)=.+$', capsys.readouterr().out, re.M) == settings
