"""Settings: a script's bare lower-case names, overridden by presets and by --name=value, in the order given.

    python train_encoder.py config/encoder_demo.py --learning_rate=1e-3

A preset is plain Python run in a namespace of its own: it may compute, import and use names that start with an
underscore, but each setting that it leaves behind must be one the script has, and of the same type. A setting that is
'auto' also takes True and False.
"""

import difflib
import math
import os
import re
import runpy
import sys

TYPES = (bool, int, float, str)
BOOLS = {'true': True, 'false': False, '1': True, '0': False}
SCRIPTS = {'prepare': 'prepare.py', 'encoder': 'train_encoder.py', 'decoder': 'train_decoder.py'}  # by stage


def override(names: dict, argv: list[str] | None = None, limits: dict | None = None) -> dict:
    """Override the settings in `names` (a script's globals()) and return them all as a dict that json can write.

    A setting is a name in lower case that holds a bool, int, float or str. `argv` defaults to sys.argv[1:]; each
    argument is the path of a preset (*.py) or --name=value. --help prints every setting and exits with 0. `limits`
    gives the least and the greatest value of some numbers.

    Raises SystemExit with one line on an unknown name, a wrong type or value, a missing or broken preset.
    """
    script = os.path.basename(names['__file__'])
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in names.items() if k == k.lower() and k[0] != '_' and type(v) in TYPES}
    if any(a in ('-h', '--help') for a in argv):
        print(describe(names, defaults), end='')
        raise SystemExit(0)
    settings = dict(defaults)
    try:
        for arg in argv:
            if arg.startswith('--') and '=' in arg:
                name, text = arg[2:].split('=', 1)
                settings[name] = from_text(name, text, defaults)
            elif arg.endswith('.py'):
                stage = SCRIPTS.get(os.path.basename(arg).split('_')[0])
                if stage and script in {*SCRIPTS.values(), 'evaluate.py'} - {stage}:
                    raise ValueError(f'{arg} is a preset of {stage}')
                settings.update(from_preset(arg, defaults))
            else:
                raise ValueError(f"cannot read the argument '{arg}': write --name=value, or the path of a preset (.py)")
        for name, (least, greatest) in (limits or {}).items():
            if not least <= settings[name] <= greatest:  # nor NaN
                span = f'{least} or more' if greatest == math.inf else f'from {least} to {greatest}'
                raise ValueError(f'--{name}={settings[name]}: expected {span}')
    except ValueError as error:
        raise SystemExit(f"{script}: {' '.join(str(error).split())}") from None  # one line, whatever was given
    names.update(settings)
    return settings


def known(name: str, defaults: dict):
    """The default of setting `name`; ValueError with the nearest known name where there is none."""
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else '--help lists them all'
        raise ValueError(f"unknown setting '{name}': {hint}")
    return defaults[name]


def from_text(name: str, text: str, defaults: dict):
    """The value that --name=text means, read as the type of the setting's default."""
    default = known(name, defaults)
    kind = type(default)
    if kind is str:
        return BOOLS.get(text.lower(), text) if default == 'auto' else text
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"--{name}={text}: expected {'True or False' if kind is bool else kind.__name__}") from None


def from_preset(path: str, defaults: dict) -> dict:
    """The settings that the Python file at `path` assigns."""
    if not os.path.isfile(path):
        raise ValueError(f"no preset at '{path}': presets are config/<stage>_<name>.py")
    try:
        values = runpy.run_path(path)
    except Exception as error:  # the user's own code: any error is theirs
        raise ValueError(f"preset '{path}' does not run: {type(error).__name__}: {error}") from None
    given = {}
    for name, value in values.items():
        if name[0] == '_' or not (type(value) in TYPES or name in defaults or value is None):
            continue  # modules, functions and private helpers of the preset
        default = known(name, defaults)
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default) and not (default == 'auto' and type(value) is bool):
            raise ValueError(f'{path}: {name} = {value!r}: expected {type(default).__name__}')
        given[name] = value
    return given


def describe(names: dict, defaults: dict) -> str:
    """The text of --help: each setting with its default and the comment beside it in the script."""
    comments = {}
    with open(names['__file__'], encoding='utf-8') as f:
        source = f.read()
    for name, comment in re.findall(r'^(\w+) *= *[^#\n]*?(?:# *(.*))?$', source, re.M):
        comments.setdefault(name, comment)
    lines = [(names.get('__doc__') or '').strip(), '', 'settings:']
    lines += [f'  --{k}={v!r}'.ljust(44) + (f'  {comments[k]}' if comments.get(k) else '') for k, v in defaults.items()]
    return '\n'.join(lines) + '\n'
