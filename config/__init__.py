"""Settings: a script's bare lower-case names, overridden by presets and by --name=value, in the order given.

    python train_encoder.py config/encoder_demo.py --learning_rate=1e-3

A preset is plain Python, run in a namespace of its own: it may compute, import and use names that start with
an underscore, but each setting that it leaves behind must be one the script has, and of the same type.
"""

import difflib
import errno
import math
import os
import re
import runpy
import sys

TYPES, BOOLS = (bool, int, float, str), {'true': True, 'false': False, '1': True, '0': False}
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG)
STAGES = {'prepare': 'prepare.py', 'encoder': 'train_encoder.py', 'decoder': 'train_decoder.py'}  # of presets

class UserError(ValueError):
    """A user's mistake: printed as one line, without a traceback."""

def override(names: dict, argv: list[str] | None = None, positive=(), shares=(), choices=None) -> dict:
    """Override the settings in `names` (a script's globals()) and return them all as a dict that json can
    write.

    Settings are the names that the script assigns under its heading "# Settings". `argv` defaults to
    sys.argv[1:]: paths of presets (*.py) and --name=value. --help prints every setting and exits with 0.
    Numbers must be finite, 0 or more, those in `positive` above 0, those in `shares` below 1; `choices` lists
    the values of a name. From here on the script prints a UserError as one line. Raises SystemExit, with one
    line, on a mistake.
    """
    script, argv = os.path.basename(names['__file__']), sys.argv[1:] if argv is None else argv
    with open(names['__file__'], encoding='utf-8') as f:
        section = f.read().partition('\n# Settings')[2].partition('\n# ---')[0]
    comments = dict(re.findall(r'^([a-z]\w*) = (?:[^#\n]*# *(.*))?', section, re.M))
    settings = {name: names[name] for name in comments if name in names}
    if any(a in ('-h', '--help') for a in argv):
        lines = [f'  --{k}={v!r}'.ljust(44) + f'  {comments[k]}'.rstrip() for k, v in settings.items()]
        print((names.get('__doc__') or '').strip(), '\n\nsettings:', *lines, sep='\n')
        raise SystemExit(0)
    try:
        for arg in argv:
            name, equals, text = arg.removeprefix('--').partition('=')
            if arg.startswith('--') and equals:
                settings[name] = from_text(name, text, known(name, settings), (choices or {}).get(name, ()))
            elif arg.endswith('.py'):
                stage = STAGES.get(os.path.basename(arg).split('_')[0])
                if stage and script in {*STAGES.values(), 'evaluate.py'} - {stage}:
                    raise UserError(f'{arg} is a preset of {stage}')
                settings |= from_preset(arg, settings)
            else:
                raise UserError(f"cannot read '{arg}': write --name=value, or the path of a preset (.py)")
        for name, value in settings.items():
            if value not in (allowed := (choices or {}).get(name, [value])):
                raise UserError(f"--{name}={value}: expected one of {', '.join(map(str, allowed))}")
            if type(value) in (int, float):
                least = value > 0 if name in positive else value >= 0
                if not (least and value < (1 if name in shares else math.inf)):  # nor NaN
                    span = 'above 0' if name in positive else 'from 0' + ' to below 1' * (name in shares)
                    raise UserError(f'--{name}={value}: expected a number {span}')
    except UserError as error:
        raise SystemExit(f"{script}: {' '.join(str(error).split())}") from None
    if names['__name__'] == '__main__':
        sys.excepthook = lambda *error: print_error(script, *error)
    names.update(settings)
    return settings

def print_error(script, kind, error, trace):
    """sys.excepthook of the scripts: a mistake, or a full disk, is one line; a bug shows its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f'{script}: interrupted', file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)
    if issubclass(kind, OSError) and error.errno in REFUSED:
        error = f"cannot write{f' to {error.filename}' if error.filename else ''}: {error.strerror}"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)

def known(name: str, settings: dict):
    """The value of setting `name`; UserError with the nearest known name where there is none."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else '--help lists them all'
        raise UserError(f"unknown setting '{name}': {hint}")
    return settings[name]

def from_text(name: str, text: str, default, choices=()):
    """What --name=text means, of the default's type, or True or False if `choices` has it; 1e3 is an int."""
    kind, low = type(default), text.lower()
    try:
        if kind is bool or (True in choices and low in BOOLS):
            return BOOLS[low]
        whole = kind is int and 'e' in low and float(text).is_integer()
        return int(float(text)) if whole else kind(text)
    except (KeyError, ValueError, OverflowError):
        expected = 'True or False' if kind is bool else kind.__name__
        raise UserError(f'--{name}={text}: expected {expected}') from None

def from_preset(path: str, settings: dict) -> dict:
    """The settings that the Python file at `path` assigns."""
    if not os.path.isfile(path):
        raise UserError(f"no preset at '{path}': presets are config/<stage>_<name>.py")
    try:
        values = runpy.run_path(path)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"preset '{path}' does not run: {type(error).__name__}: {error}") from None
    given = {}
    for name, value in values.items():
        if name[0] == '_' or not (type(value) in TYPES or name in settings or value is None):
            continue  # modules, functions and private helpers of the preset
        default = known(name, settings)
        given[name] = float(value) if type(default) is float and type(value) is int else value
        if type(given[name]) is not type(default) and not (default == 'auto' and type(value) is bool):
            raise UserError(f'{path}: {name} = {value!r}: expected {type(default).__name__}')
    return given

def ranks() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) that torchrun gave; (0, 1, 0) alone. UserError on half a
    set."""
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    missing = [name for name in names if name not in os.environ]
    if 0 < len(missing) < 3:
        raise UserError(f"of torchrun's variables {' and '.join(missing)} are not set: set all, or none")
    return (0, 1, 0) if missing else tuple(int(os.environ[name]) for name in names)

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
