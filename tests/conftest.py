"""The repository's root on the path, and a small prepared corpus that the tests share."""

import json
import os
import random
import socket
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORDS = ['river', 'stone', 'cloud', 'garden', 'letter', 'winter', 'market', 'window', 'shadow', 'bridge', 'copper', 'lantern', 'harbour', 'thistle']


def run(script, *args, check=True, **environment):
    """Run one of the scripts as a user would, in one thread: models this small gain nothing from two."""
    done = subprocess.run([sys.executable, script, *args], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


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
    source = folder / 'docs.jsonl'
    source.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    run('prepare.py', f'--dataset={source}', f'--data_dir={folder}/data', '--tokenizer=bpe:400', '--val_fraction=0.2',
        '--shard_tokens=2000', '--num_proc=1')
    return str(folder / 'data')


@pytest.fixture(scope='session')
def turns_dir(tmp_path_factory):
    """Prepared data in which each sentence takes turns with one of other words: what comes next has to be learned.

    A document has one of 12 topics; its even and its odd sentences draw from different words of the topic.
    """
    rng = random.Random(0)
    words = [''.join(rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(3)) for _ in range(240)]
    folder = tmp_path_factory.mktemp('turns')
    with open(folder / 'text.txt', 'w') as f:
        for _ in range(400):
            topic = 20 * rng.randrange(12)
            f.write(' '.join(' '.join(rng.choices(words[topic + 10 * (i % 2):topic + 10 * (i % 2) + 10], k=6)).capitalize() + '.'
                             for i in range(12)) + '\n')
    run('prepare.py', f'--dataset={folder}/text.txt', f'--data_dir={folder}/data', '--tokenizer=bpe:600', '--val_fraction=0.2')
    return str(folder / 'data')
