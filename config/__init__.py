"""Settings: a script's bare lower-case names, overridden by presets and by --name=value, in the order given.

    python train_encoder.py config/encoder_demo.py --learning_rate=1e-3

A preset is plain Python, run in a namespace of its own: it may compute, import and use names that start with
an underscore, but each setting that it leaves behind must be one the script has, and of the same type.
"""

import ast
import contextlib
import difflib
import math
import os
import re
import runpy
import sys

STAGES = ('prepare', 'encoder', 'decoder')  # a preset of one is named config/<stage>_<name>.py

class UserError(ValueError):
    """A user's mistake: printed as one line, without a traceback."""

@contextlib.contextmanager
def as_user_error(action, advice):
    """Turn errors into a UserError: files, libraries and the hub's client raise dozens of kinds."""
    try:
        yield
    except (UserError, NameError, AttributeError):  # the last two are bugs, and show their traceback
        raise
    except Exception as error:
        raise UserError(f'cannot {action} ({type(error).__name__}: {str(error)[:300]}); {advice}') from error

def override(names: dict, argv: list[str] | None = None, positive=(), shares=(), choices=None) -> dict:
    """Override the settings in `names` (a script's globals()) and return them all as a dict that json can
    write.

    Settings are the names that the script assigns under its heading "# Settings". `argv` defaults to
    sys.argv[1:]: paths of presets (*.py) and --name=value. --help prints every setting and exits with 0.
    Numbers must be finite, 0 or more, those in `positive` above 0, those in `shares` below 1; `choices` lists
    the values of a name. Raises UserError on a mistake; from here on the script prints one as a line.
    """
    script, argv = os.path.basename(names['__file__']), sys.argv[1:] if argv is None else argv
    with open(names['__file__'], encoding='utf-8') as f:
        section = f.read().partition('\n# Settings')[2].partition('\n# ---')[0]
    comments = dict(re.findall(r'^([a-z]\w*) = (?:[^#\n]*# *(.*))?', section, re.M))
    settings = {name: names[name] for name in comments if name in names}
    if '--help' in argv or '-h' in argv:
        lines = [f'  --{k}={v!r}'.ljust(44) + f'  {comments[k]}'.rstrip() for k, v in settings.items()]
        print(names['__doc__'].strip(), '\n\nsettings:', *lines, sep='\n')
        raise SystemExit(0)
    if names['__name__'] == '__main__':
        sys.excepthook = lambda *error: print_error(script, *error)
    for arg in argv:
        name, equals, text = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and equals:
            given = {name: from_text(text, settings.get(name))}
        elif arg.endswith('.py'):
            given = from_preset(arg, script, settings)
        else:
            raise UserError(f"cannot read '{arg}': write --name=value, or the path of a preset (.py)")
        for name, value in given.items():
            settings[name] = checked(name, value, settings, positive, shares, choices or {})
    names.update(settings)
    return settings

def print_error(script, kind, error, trace):
    """sys.excepthook of the scripts: a mistake, or a full disk, is one line; a bug shows its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f'{script}: interrupted', file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)
    if issubclass(kind, OSError) and error.errno:  # what the system refused
        error = f'cannot write, or read: {error}'
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)

def from_text(text: str, default):
    """What --name=text means where the script has `default`: a Python value, or the text itself."""
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return text if isinstance(default, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

def from_preset(path: str, script: str, settings: dict) -> dict:
    """The settings that the Python file at `path` assigns."""
    stage = os.path.basename(path).split('_')[0]
    if stage in STAGES and stage not in script and any(other in script for other in STAGES):
        raise UserError(f'{path} is a preset of the {stage}')
    try:
        values = runpy.run_path(path)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"preset '{path}' does not run: {type(error).__name__}: {error}") from None
    return {name: value for name, value in values.items()  # but modules, functions and private helpers
            if name[0] != '_' and (name in settings or type(value) in (bool, int, float, str))}

def checked(name: str, value, settings: dict, positive, shares, choices: dict):
    """`value` in the type of the setting `name`. UserError where there is none, or it cannot be that."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else '--help lists them all'
        raise UserError(f"unknown setting '{name}': {hint}")
    kind, end = type(settings[name]), 1 if name in shares else math.inf
    if kind is not str and type(value) in (int, float) and value % 1 == 0 and kind(value) == value:
        value = kind(value)  # 1e3 as int, 0 as float or bool
    if name in choices and value not in choices[name]:
        expected = f"one of {', '.join(map(str, choices[name]))}"
    elif name not in choices and type(value) is not kind:
        expected = kind.__name__
    elif kind in (int, float) and not (0 <= value < end and (value or name not in positive)):
        expected = f"a number {'above' if name in positive else 'from'} 0{' to below 1' * (end == 1)}"
    else:
        return os.path.expanduser(value) if type(value) is str and value[:2] == '~/' else value
    raise UserError(f'--{name}={value}: expected {expected}')

def ranks() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) that torchrun gave; (0, 1, 0) alone. UserError on half a
    set."""
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    given = [int(os.environ[name]) for name in names if name in os.environ]
    if len(given) in (1, 2):
        raise UserError(f"some of torchrun's variables {', '.join(names)} are not set: set all, or none")
    return tuple(given) or (0, 1, 0)

def write_file(path: str, data):
    """Write str, bytes, or what the function data(file) writes, whole or not at all. Raises OSError."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as f:
            data(f) if callable(data) else f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
