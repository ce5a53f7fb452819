"""Break every stage as happens on machines that nobody watches, and see that nothing is lost.

    python tests/faults.py                                         all of it: an hour on one core
    python tests/faults.py --only=kills_prepare,disk --share=0.1   parts by name, a tenth of the repetitions

Keeps a row for each thing that was tried in tests/results/faults.csv; rows of parts that were not run stay.
tests/test_scripts.py runs it in miniature.
"""

import argparse
import csv
import glob
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from conftest import ROOT, start
from test_train import assert_equal, decoder, encoder, rows

import model as lib
import prepare
from config import UserError, override
from config.run import load_checkpoint

BIBLE = ['prepare.py', '--dataset=web-bible', '--tokenizer=bpe:400', '--val_fraction=0.2', '--num_proc=2',
         '--max_sentence_tokens=60']

def many(n, share):
    """That share of n, at least 1."""
    return max(1, round(n * share))

def python(*command, **how):
    """A process of this Python in the repository's root; what it says comes in one stream."""
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **how)

def ended(process, code=0, says=''):
    """The last line of what the process said, once it has ended with `code`."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, f'exit code {process.returncode}: {said}'
    assert says in said, said
    return (said.splitlines() or [''])[-1]

def training(kind, work, out):
    """(Command, metrics) of a miniature run of 'encoder' or 'decoder'."""
    if kind == 'encoder':
        return encoder(f'{work}/data', out), f'{out}/metrics.csv'
    return decoder(out, f'--encoder_path={work}/out'), f'{out}/metrics_decoder.csv'

def undisturbed(work):
    """Make `data` and `out`, an encoder and a decoder that ran straight through, in `work`; returns it."""
    if not os.path.exists(f'{work}/out'):
        ended(python(*BIBLE, f'--data_dir={work}/data', '--max_docs=200'))
        for kind in ('encoder', 'decoder'):
            start(*training(kind, work, f'{work}/out')[0]).end()
    return work

def assert_same_run(kind, work, out, whole=''):
    """The run in `out` ended as the undisturbed one: checkpoints bit for bit, and rows of metrics."""
    whole = whole or f'{work}/out'
    assert_equal(f'{whole}/{kind}.pt', f'{out}/{kind}.pt')
    assert_equal(f'{whole}/{kind}_best.pt', f'{out}/{kind}_best.pt', atol=1e-30)
    found, expected = (rows(training(kind, work, folder)[1]) for folder in (out, whole))
    assert [r for r in found if int(r['step']) % 5 == 0] == expected  # a stop has a row of its own

def contents(folder):
    return {name: open(f'{folder}/{name}', 'rb').read() for name in os.listdir(folder)}

def shards(folder):
    """{train shard: its inode and time} of a folder."""
    paths = glob.glob(f'{folder}/train_*.bin')
    return {path: (os.stat(path).st_ino, os.stat(path).st_mtime_ns) for path in paths}

# ------------------------------------------------------------------------------------------------------------
# Kills, stops, going on

def kills_prepare(work, share):
    """SIGKILL at random moments, the same command again, until it ends; and again."""
    command = [*BIBLE, '--shard_tokens=1000', f'--max_docs={200 if share < 0.1 else 0}']
    whole, began = f'{work}/whole', time.time()
    ended(python(*command, f'--data_dir={whole}'))
    length, rng, done, runs, kept = time.time() - began, random.Random(0), 0, 0, 0
    while done < many(100, share):
        out, finished, here = f'{work}/prepared_{runs}', {}, 0
        while True:
            process = python(*command, f'--data_dir={out}')
            try:
                # longer and longer, lest a busy machine never ends it
                process.communicate(timeout=rng.uniform(0, length * 1.1**here))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()  # until the workers have closed it too
                done, here, finished = done + 1, here + 1, shards(out)
        assert process.returncode == 0
        assert finished.items() <= shards(out).items(), 'a finished shard was written again'
        assert contents(whole) == contents(out)
        runs, kept = runs + 1, kept + len(finished)
    return [(f'prepare.py, {runs} runs of {len(shards(whole))} chunks', done,
             f'byte-identical to the undisturbed one; {kept} shards done before a kill kept their inode')]

def kills_train(work, share):
    """As kills_prepare, of both training scripts, forked from a process that has imported torch."""
    rng, done, runs, most, length = random.Random(0), 0, 0, 0, 600.0
    while done < many(200, share):
        kind, out, here = ('encoder', 'decoder')[runs % 2], f'{work}/killed_{runs}', 0
        checkpoint = f'{out}/{kind}.pt'
        while True:
            there, began = os.path.exists(checkpoint), time.time()
            run = start(*training(kind, undisturbed(work), out)[0])
            wait = rng.uniform(0, length * 1.1**here)
            run.process.join(wait if runs else length)  # the first is timed
            if run.process.exitcode is not None:
                break
            run.process.kill()
            run.process.join()
            done, here = done + 1, here + 1
            if os.path.exists(checkpoint):
                load_checkpoint(checkpoint, kind)  # whole, at every moment
        assert there == ('going on from step' in run.end().stdout)
        length = length if there else min(length, time.time() - began)  # of a whole run
        assert_same_run(kind, work, out)
        runs, most = runs + 1, max(most, here)
    return [(f'training, {runs} runs, up to {most} kills each', done,
             'each ends bit-identical to the undisturbed one: checkpoints and rows of metrics')]

def resume(work, share):
    """SIGTERM or Ctrl-C in the middle and the same command again, on one rank and on two."""
    found, straight = [], f'{undisturbed(work)}/out'
    for ranks, kind, number in ((1, 'encoder', 15), (1, 'decoder', 2), (2, 'encoder', 15), (2, 'decoder', 2)):
        before = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] * (ranks > 1)
        whole, out = f'{work}/whole_2' if ranks > 1 else straight, f'{work}/resume_{ranks}'
        if ranks > 1:
            ended(python(*before, *training(kind, work, whole)[0]))
        command, metrics = training(kind, work, out)
        process = python(*before, *command)
        while not os.path.exists(metrics) or not any(int(r['step']) >= 10 for r in rows(metrics)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        if ranks == 1:
            ended(process, 128 + number, 'the same command goes on')
        process.communicate(timeout=60)
        stopped = load_checkpoint(out, kind)['step']
        assert 0 < stopped < 40, 'the run was over before the signal'
        ended(python(*before, *command), says=f'going on from step {stopped} of')
        assert_same_run(kind, work, out, whole)
        found.append((f'{kind}, ranks: {ranks}, signal {number} at step {stopped} of 40', 1,
                      'saved; then bit-identical checkpoints and the same rows of metrics'))
    return found

# ------------------------------------------------------------------------------------------------------------
# Disk

def disk(work, share):
    """Files that cannot grow past some size, as on a full disk: nothing that was there is lost."""
    found, sizes = [], (10, 3000, 20_000, 200_000) if share > 0.1 else (20_000,)

    def full(size, command, out):  # the last line of what it says
        limit = {'preexec_fn': lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
        return ended(python(*command, **limit), 1, 'File too large').replace(out, '')
    for kind in ('encoder', 'decoder'):
        lines = set()
        for size in sizes:
            out = shutil.copytree(f'{undisturbed(work)}/out', f'{work}/disk_{kind}_{size}')
            lines.add(full(size, [*training(kind, work, out)[0], '--max_iters=60'], out))
            assert not [f for f in os.listdir(out) if f.endswith('.tmp')]
            assert_equal(f'{work}/out/{kind}.pt', f'{out}/{kind}.pt')
        found.append((f'train_{kind}.py', len(sizes), 'checkpoint untouched: ' + ' / '.join(sorted(lines))))
    lines = set()
    for size in sizes[:3]:
        out = f'{work}/disk_{size}'
        command = [*BIBLE, '--max_docs=200', f'--data_dir={out}']
        lines.add(full(size, command, out))
        ended(python(*command))  # there is room again
        assert contents(f'{work}/data') == contents(out)
    return [*found, ('prepare.py', len(sizes[:3]), 'later the same bytes: ' + ' / '.join(sorted(lines)))]

# ------------------------------------------------------------------------------------------------------------
# Bad input

NASTY = ['<|endoftext|>', '</s>', '\ud800', '\udfff x', '\0', '\x1c\x85\u2028', '\ufeff', '\u00a0', '👩‍👩‍👧',
         'é' * 50, '\n' * 50, 'x' * 5000, 'Mr. ', '. ' * 40, '…!?', '你好。', '\r\n', "'s", '\\ud800']

def fuzz(work, share):
    """What nobody meant, as text and as settings. (test_prepare.py does so with files.)"""
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st
    out = f'{undisturbed(work)}/out'
    reader, writer = lib.load_encoder(out, 'cpu'), lib.load_decoder(out, 'cpu')

    def letters(x):
        return ''.join(prepare.clean(x).replace('\ufeff', '').split())

    def tokens(some):
        some = [prepare.clean(x) for x in some]
        found = prepare.encode_documents(some, reader.tokenizer.encode, 16)
        for x, (ids, lengths) in zip(some, found, strict=True):  # no letter goes to another document
            assert lengths.sum() == len(ids) and lengths.max(initial=0) <= 16
            assert letters(reader.tokenizer.decode(ids)) == letters(x)

    def concepts(some):
        z = reader.encode(some)
        assert z.shape == (len(some), reader.dim) and np.isfinite(z).all()
        assert len(writer.generate(z, temperature=1, max_tokens=5)) == len(some)
        assert np.isfinite(reader.predict_next(some)).all()

    def setting(arguments):
        names = {'rate': 0.1, 'steps': 10, 'name': 'a', 'fast': True, '__file__': script, '__name__': ''}
        try:
            override(names, arguments, positive=('steps',), shares=('rate',))
            assert names['steps'] >= 1 and 0 <= names['rate'] < 1
        except UserError:
            pass
    with open(script := f'{work}/s.py', 'w') as f:
        f.write("\n# Settings\nrate = 0.1\nsteps = 10\nname = 'a'\nfast = True\n# ---\n")
    text = st.lists(st.one_of(st.text(), st.sampled_from(NASTY)), max_size=8).map(''.join)
    value = st.one_of(st.text(), st.integers().map(str), st.floats().map(str), st.just('9' * 5000))
    named = st.builds('--{}={}'.format, st.sampled_from(['rate', 'steps', 'name', 'fast', 'x']), value)
    argument = st.one_of(named, st.sampled_from(['a.py', '--', '--=', '\0.py', '--a\nb=1', 'x']))
    found, how = [], {'deadline': None, 'database': None, 'suppress_health_check': list(HealthCheck)}
    for check, n, given_as in ((tokens, 5000, st.lists(text, max_size=4)),
                               (setting, 5000, st.lists(argument, max_size=4)),
                               (concepts, 500, st.lists(text, min_size=1, max_size=4))):
        seed(0)(settings(max_examples=many(n, share), **how)(given(given_as)(check)))()
        found.append((check.__name__, many(n, share), 'as they should be'))
    return found

# ------------------------------------------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (kills_prepare, kills_train, resume, disk, fuzz)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', default=','.join(PARTS), help='parts, by name: %(default)s')
    parser.add_argument('--share', type=float, default=1.0, help='of the repetitions')
    parser.add_argument('--results', default=os.path.join(ROOT, 'tests', 'results'))
    a = parser.parse_args()
    path, kept = os.path.join(a.results, 'faults.csv'), []
    if os.path.exists(path):
        with open(path, newline='') as f:
            kept = list(csv.reader(f))[1:]
    with tempfile.TemporaryDirectory() as work:
        for name in a.only.split(','):
            found = [[name, *map(str, row)] for row in PARTS[name](work, a.share)]
            print(*map(' | '.join, found), sep='\n', flush=True)
            kept = [r for r in kept if r[0] != name] + found
            with open(path, 'w', newline='') as f:
                csv.writer(f, lineterminator='\n').writerows([('part', 'what', 'times', 'result'), *kept])

if __name__ == '__main__':
    main()
