"""The repository's root on the path, scripts run as a user runs them, and small prepared corpora to share."""

import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['OMP_NUM_THREADS'] = '1'  # models this small gain nothing from two
MORE = int(os.environ.get('MORE', 1))  # so many times the kills and the made-up inputs
WORDS = ['river', 'stone', 'cloud', 'garden', 'letter', 'winter', 'market', 'window', 'shadow', 'bridge',
         'copper', 'lantern', 'harbour', 'thistle']

def run(script, *args, check=True, **environment):
    """Run one of the scripts to its end in a process of its own: returncode, stdout, stderr."""
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, **environment})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done

FORKS = multiprocessing.get_context('forkserver')  # a process that has imported torch and forks
FORKS.set_forkserver_preload(['conftest', 'model'])

def script_main(script, args, output, environment, before):
    """Be the script, in a process of FORKS."""
    for i, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), i)
    sys.stdout, sys.stderr = (open(i, 'w', buffering=1, closefd=False) for i in (1, 2))
    os.environ.update(environment)
    if before:
        before()
    os.chdir(ROOT)
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name='__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(1)

def start(script, *args, before=None, **environment):
    """As `run`, without 3 s of imports: .process, .output() of both streams, .end() as run returns."""
    os.environ['PYTHONPATH'] = f'{ROOT}{os.pathsep}{ROOT}/tests'  # of the process that forks
    folder = tempfile.mkdtemp()
    paths = [os.path.join(folder, name) for name in ('stdout', 'stderr')]
    given = script, list(map(str, args)), paths, environment, before
    process = FORKS.Process(target=script_main, args=given)
    process.start()

    def output():
        return [open(path).read() if os.path.exists(path) else '' for path in paths]

    def end(check=True):
        process.join(200)
        assert process.exitcode is not None, f'{script} {args} does not end: {output()}'
        assert not check or process.exitcode == 0, f'{process.exitcode}: {output()}'
        return SimpleNamespace(**dict(zip(('stdout', 'stderr'), output())), returncode=process.exitcode)
    return SimpleNamespace(process=process, output=output, end=end)

def jsonl(texts):
    return ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()

def prepared(folder, name, content, *arguments, check=True, **environment):
    """Run prepare.py on a file of this content, to folder/out."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return run('prepare.py', f'--dataset={folder / name}', f'--data_dir={folder}/out', '--tokenizer=bpe:300',
               '--num_proc=1', *arguments, check=check, **environment)

def refused(done, *says, alone=True):
    """It ended with a line that says so, without a traceback; `alone`: and with no other line."""
    assert done.returncode == 1, done
    *before, last = done.stderr.splitlines()
    assert all(part in last for part in says), done
    assert 'Traceback' not in done.stderr
    assert not (before and alone), done

def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='session')
def texts():
    """200 documents of 3 to 12 sentences, each about words of its own."""
    out = []
    for d in range(200):
        a, b = WORDS[d % 14], WORDS[(d * 5 + 3) % 14]
        out.append(' '.join(f'The {a} number {d} of part {s} stood near the {b} for {s * d % 17} long days.'
                            for s in range(3 + d % 10)))
    return out

@pytest.fixture(scope='session')
def corpus_dir(tmp_path_factory, texts):
    """The texts as prepare.py writes them, in several shards."""
    folder = tmp_path_factory.mktemp('corpus')
    prepared(folder, 'docs.jsonl', jsonl(texts), '--tokenizer=bpe:400', '--val_fraction=0.2',
             '--shard_tokens=2000')
    return str(folder / 'out')

@pytest.fixture(scope='session')
def turns_dir(tmp_path_factory):
    """Prepared data in which sentences take turns with those of other words: the next one is to be learned.

    A document has one of 12 topics; its even and its odd sentences draw from different words of the topic.
    """
    rng = random.Random(0)
    letters = 'bdfgklmnprstvz', 'aeiou'
    words = [''.join(rng.choice(x) for x in 3 * letters) for _ in range(240)]
    folder, lines = tmp_path_factory.mktemp('turns'), []
    for _ in range(400):
        first = 20 * rng.randrange(12)
        halves = words[first:first + 10], words[first + 10:first + 20]
        sentences = [rng.choices(halves[i % 2], k=6) for i in range(12)]
        lines.append(' '.join(' '.join(s).capitalize() + '.' for s in sentences))
    prepared(folder, 'text.txt', '\n'.join(lines).encode(), '--tokenizer=bpe:600', '--val_fraction=0.2')
    return str(folder / 'out')
