"""Break every stage in every way that happens on machines one does not watch, and see that nothing is lost.

    python tests/faults.py                                 all of it, an hour and a half on one core
    python tests/faults.py --only=kills,disk --kills=20    parts, by name, and shorter

Prints a table and keeps it in tests/results/faults.csv, a row for each thing that was tried (rows of parts that were
not run stay). tests/test_faults.py runs the same functions in miniature.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=2', '--block_size=128', '--compile=False', '--eval_iters=2',
        '--warmup_iters=5', '--max_iters=40', '--eval_interval=4', '--log_interval=3', '--gradient_accumulation_steps=2', '--dropout=0.1']
ENCODER = [*TINY, '--predictor_layer=1', '--whiten_interval=3']


def start(*command, cores=1, **how):
    """A process of this Python in the repository's root; what it says comes in one stream."""
    environment = {**os.environ, 'OMP_NUM_THREADS': str(cores), 'PYTHONUNBUFFERED': '1', **how.pop('env', {})}
    return subprocess.Popen([*how.pop('before', ()), sys.executable, *map(str, command)], cwd=ROOT, text=True, env=environment,
                            **{'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, **how})


def finish(process, code=0, says=''):
    """What it said, after it ended with `code`."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, f'exit code {process.returncode}: {said}'
    assert says in said, said
    assert code == 0 or 'Traceback' not in said, said
    return said


def texts(n, seed=0):
    """Documents of 3 to 12 sentences, each about words of its own."""
    rng = random.Random(seed)
    words = [''.join(rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(3)) for _ in range(300)]
    return [' '.join(' '.join(rng.choices(words[d % 280:d % 280 + 20], k=8)).capitalize() + '.' for _ in range(3 + d % 10))
            for d in range(n)]


def corpus(folder, n=200):
    """A source of n documents and the set that prepare.py makes of it; returns the set's folder."""
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/docs.jsonl', 'w') as f:
        f.writelines(json.dumps({'text': t}) + '\n' for t in texts(n))
    finish(start('prepare.py', *source(folder), f'--data_dir={folder}/data'))
    return f'{folder}/data'


def source(folder):
    """prepare.py's arguments for the documents in `folder`."""
    return [f'--dataset={folder}/docs.jsonl', '--tokenizer=bpe:400', '--val_fraction=0.2', '--shard_tokens=2000', '--num_proc=1']


# ---------------------------------------------------------------------------------------------------------------
# Long and large

def slope(x, y):
    """(Slope of y over x, half of its 95 % interval)."""
    (a, _), cov = np.polyfit(x, y, 1, cov=True)
    return a, 1.96 * cov[0, 0] ** 0.5


def soak(work, minutes=120, every=10):
    """Train for so long; memory, processor time a step and open files over time."""
    data, out = corpus(f'{work}/soak'), f'{work}/soak/out'
    process = start('train_encoder.py', f'--data_dir={data}', f'--out_dir={out}', *ENCODER, '--max_iters=100000000',
                    '--eval_interval=500', '--log_interval=100', '--warmup_iters=100', '--learning_rate=1e-4',
                    stdout=open(f'{work}/soak.log', 'w'))
    seen, end, page = [], time.time() + 60 * minutes, os.sysconf('SC_PAGE_SIZE') / 2**20
    while time.time() < end:
        time.sleep(every)
        assert process.poll() is None, open(f'{work}/soak.log').read()
        with open(f'{out}/metrics.csv') as f:
            step = int(f.read().rstrip().rpartition('\n')[2].split(',')[0] or 0)
        with open(f'/proc/{process.pid}/stat') as f:
            ticks = sum(map(int, f.read().rpartition(')')[2].split()[11:13]))
        with open(f'/proc/{process.pid}/statm') as f:
            resident = int(f.read().split()[1]) * page
        seen.append((time.time(), step, ticks / os.sysconf('SC_CLK_TCK'), resident, len(os.listdir(f'/proc/{process.pid}/fd'))))
        np.savetxt(f'{work}/soak.csv', seen, delimiter=',', header='time,step,cpu seconds,MB,files', comments='', fmt='%.2f')
    process.send_signal(signal.SIGTERM)
    process.wait(600)
    return [('long', f'training for {minutes} minutes', *soak_figures(np.array(seen)))]


def soak_figures(seen):
    """(Steps, words) of samples (n, 5), the first tenth left out."""
    seen = seen[len(seen) // 10:]
    hours, steps, cpu, resident, files = (seen[:, i] - (seen[0, i] if i < 3 else 0) for i in range(5))
    memory = slope(hours / 3600, resident)
    blocks = [b for b in np.array_split(np.arange(len(steps)), 40) if steps[b[-1]] > steps[b[0]]]
    times = [1000 * (cpu[b[-1]] - cpu[b[0]]) / (steps[b[-1]] - steps[b[0]]) for b in blocks]
    slower = slope([hours[b].mean() / 3600 for b in blocks], times)
    return int(seen[-1, 1]), (f'memory {resident.mean():.0f} MB, {memory[0]:+.2f} ± {memory[1]:.2f} MB an hour; step '
                              f'{np.mean(times):.1f} ms of CPU, {slower[0]:+.2f} ± {slower[1]:.2f} ms an hour; open files '
                              f'{files.min():.0f} to {files.max():.0f}')


def sparse(work, tokens=2_000_000_000, sentence=1000):
    """Open and sample a set of so many tokens that are holes in files; one more shard's offsets pass 2^32 if asked."""
    import prepare
    folder = f'{work}/sparse'
    os.makedirs(folder, exist_ok=True)
    shards, of_shard = [], min(tokens, 100_000_000)
    sizes = [of_shard] * (tokens // of_shard) + [5_000_000_000] * (tokens >= 10**9)
    for k, size in enumerate(sizes):
        n = size // sentence
        arrays = {'sentences': np.arange(n + 1, dtype=np.int64) * sentence, 'documents': np.arange(0, n + 1, 10, dtype=np.int64)}
        files = {}
        with open(f'{folder}/train_{k:06d}.tokens', 'wb') as f:
            f.truncate(2 * size)  # a hole: zeros that take no room
            for i in (0, n // 2, n - 1):  # some sentences that are known again
                f.seek(2 * i * sentence)
                f.write(np.full(sentence, 1 + k % 7 + i % 1000, np.uint16).tobytes())
        for name, array in arrays.items():
            array.tofile(f'{folder}/train_{k:06d}.{name}')
        for name in ('tokens', *arrays):
            path = f'{folder}/train_{k:06d}.{name}'
            files[os.path.basename(path)] = {'bytes': os.path.getsize(path), 'crc32': 0}
        shards.append({'tokens': size, 'sentences': n, 'documents': n // 10, 'files': files})
    said = {k: sum(s[k] for s in shards) for k in ('tokens', 'sentences', 'documents')} | {'shards': shards}
    prepare.write_json(f'{folder}/meta.json', {'format': prepare.FORMAT, 'splits': {'train': said}, 'dtype': 'uint16',
                                               'tokenizer': {'name': 'gpt2', 'n_vocab': 50257}})
    began = time.time()
    found = prepare.Corpus(folder, 'train', verify=False)
    opened, began = time.time() - began, time.time()
    for k, (first, size) in enumerate(zip(found.first_document, sizes)):
        for i in (0, size // sentence // 2, size // sentence - 1):
            ids = found.document(int(first) + i // 10)[i % 10]
            assert (ids == 1 + k % 7 + i % 1000).all(), (k, i)
    for step in (0, 1, found.n_tokens // 4096 // 4 - 1):  # the last makes it pack every shard
        batch = found.batch(step, 4, 4096, 16)
        assert ((batch['sentence'] >= 0).sum(1) == 4000).all()
        assert found.documents_in(step, 4, 4096, 16)
    with open('/proc/self/status') as f:
        peak = next(int(line.split()[1]) / 1e6 for line in f if line.startswith('VmHWM'))
    return [('long', 'a set of sparse tokens, one shard past 2^32 of them', found.n_tokens,
             f'opened in {opened:.1f} s, first, middle and last sentence of each shard right, sampled in '
             f'{time.time() - began:.0f} s, {peak:.1f} GB at most')]


# ---------------------------------------------------------------------------------------------------------------
# Kills and resume

def assert_same(a, b, close=False):
    """Two checkpoints hold the same training state: weights, average, whitening, moments, counts."""
    import torch

    import model as lib
    a, b = (lib.load_checkpoint(path, 'decoder' if 'decoder' in path else 'encoder') for path in (a, b))

    def compare(x, y, where):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for k in x.keys() - {'metrics_bytes', 'settings'}:  # clocks have more digits or fewer; folders
                compare(x[k], y[k], f'{where}.{k}')
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, pair in enumerate(zip(x, y)):
                compare(*pair, f'{where}.{i}')
        elif isinstance(x, torch.Tensor):
            far = 2e-3 if 'prediction_scale' in where else 5e-4  # that is measured, on more rows by more ranks
            assert torch.allclose(x.float(), y.float(), atol=far) if close else torch.equal(x, y), where
        else:
            assert x == y, (where, x, y)
    # close: the moments of gradients near 0 are all rounding, and what evaluation measures depends on the ranks
    compare(*({k: x[k] for k in ('model', 'step', 'seen_tokens')} if close else x for x in (a, b)), '')


def table(path):
    """A run's metrics without clocks."""
    with open(path) as f:
        return [{k: v for k, v in r.items() if k not in ('seconds', 'tokens_per_s', 'predictions_per_s')} for r in csv.DictReader(f)]


def stage(kind, data, out, encoder=''):
    """(Command, checkpoint, metrics) of a miniature run of 'encoder' or 'decoder'."""
    command = [f'train_{kind}.py', f'--data_dir={data}', f'--out_dir={out}', *(ENCODER if kind == 'encoder' else TINY)]
    return ([*command, f'--encoder_path={encoder}'] if kind == 'decoder' else command, f'{out}/{kind}.pt',
            f'{out}/metrics{"_decoder" * (kind == "decoder")}.csv')


def undisturbed(work):
    """(Data, out_dir) of an encoder and a decoder that ran straight through, in `work`; made once."""
    data, out = f'{work}/straight/data', f'{work}/straight/out'
    if not os.path.exists(f'{out}/decoder.pt'):
        corpus(f'{work}/straight')
        for kind in ('encoder', 'decoder'):
            finish(start(*stage(kind, data, out, out)[0]))
    return data, out


def torchrun(command, ranks=2, restarts=0):
    """The command under torchrun."""
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', f'--max_restarts={restarts}', *command]


# Without it, ranks that are started again read in torchrun's store where those before them listened, and wait for them
# for half an hour: of kills while ranks meet, most ended so (torch 2.13).
RESTARTS = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}


def workers(process, ranks=2):
    """Process ids of torchrun's ranks, once they are there."""
    while True:
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
            found = sorted(map(int, f.read().split()))
        if len(found) == ranks:
            return found
        assert process.poll() is None, finish(process, None)
        time.sleep(0.01)


def wait_for_step(process, path, step):
    """Until metrics at `path` have a row of that step."""
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        if os.path.exists(path) and any(int(r['step']) >= step for r in table(path)):
            return
        time.sleep(0.01)
    raise AssertionError(finish(process, None))


def resume(work, ranks=(1, 2), kinds=('encoder', 'decoder')):
    """Stopped by SIGTERM in the middle, at no step in particular, and gone on by the same command; and 1, 2, 1 ranks."""
    data, straight = undisturbed(work)
    found = []
    for n in ranks:
        for kind in kinds:
            whole, out = (straight, f'{work}/resume_{n}') if n == 1 else (f'{work}/whole_{n}', f'{work}/resume_{n}')
            for folder in {whole, out} - {straight}:
                command, checkpoint, metrics = stage(kind, data, folder, straight)
                command = command if n == 1 else torchrun(command, n)
                if folder == out:
                    process = start(*command)
                    wait_for_step(process, metrics, 9)
                    process.send_signal(signal.SIGTERM)
                    process.wait(60)
                    assert n > 1 or process.returncode == 143
                    stopped = load_step(checkpoint)
                    assert 0 < stopped < 40, 'the run was over before the signal'
                    finish(start(*command), says=f'going on from step {stopped} of')
                else:
                    finish(start(*command))
            assert_same(checkpoint.replace(out, whole), checkpoint)
            assert table(metrics) == table(metrics.replace(out, whole))
            found.append(('resume', f'{kind}, {n} rank{"s" * (n > 1)}: stopped at step {stopped} of 40', 1,
                          'bit-identical weights, average, whitening, moments; the same rows in metrics'))
    if 2 in ranks:
        exact = ['--dropout=0', '--dtype=float32', '--embedding_lr_scale=1']
        outs = [f'{work}/ranks_1', f'{work}/ranks_121']
        command, checkpoint, metrics = stage('encoder', data, outs[0])
        finish(start(*command, *exact))
        other = [c.replace(outs[0], outs[1]) for c in [*command, *exact]]
        for i in range(3):
            process = start(*(torchrun(other) if i == 1 else other))
            if i < 2:
                wait_for_step(process, metrics.replace(outs[0], outs[1]), (9, 24)[i])
                process.send_signal(signal.SIGTERM)
                process.wait(60)
            else:
                finish(process, says='going on from step')
        assert_same(checkpoint, checkpoint.replace(outs[0], outs[1]), close=True)
        tokens = [[r['tokens'] for r in table(f'{o}/metrics.csv')] for o in outs]
        assert tokens[0] == tokens[1]
        found.append(('resume', 'encoder, 1 rank, then 2, then 1', 1, 'the same rows of data; weights within 5e-4'))
    return found


def load_step(checkpoint):
    import model as lib
    return lib.load_checkpoint(checkpoint, 'decoder' if 'decoder' in checkpoint else 'encoder')['step']


def in_process(log, command):
    """Run a script as start() does, in this process, which has imported torch before."""
    import runpy
    sys.stdout = sys.stderr = open(log, 'w')
    sys.argv = command
    runpy.run_path(os.path.join(ROOT, command[0]), run_name='__main__')


def kills_train(work, kills=200, seed=0):
    """SIGKILL at random moments, the same command again, until it ends; again and again. One in eight is a process from
    its very start; the others are forked from one that has imported torch, which takes most of the time otherwise."""
    os.environ.update(OMP_NUM_THREADS='1', PYTHONPATH=ROOT)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'model', 'prepare'])
    data, straight = undisturbed(work)
    rng, done, runs, most, resumed, lengths = random.Random(seed), 0, 0, 0, 0, {}
    while done < kills:
        kind, out = ('encoder', 'encoder', 'decoder')[runs % 3], f'{work}/killed_{runs}'
        command, checkpoint, metrics = stage(kind, data, out, straight)
        here = 0
        while True:
            began, there = time.time(), os.path.exists(checkpoint) or os.path.exists(checkpoint.replace('.pt', '_best.pt'))
            if runs and rng.random() < 1 / 8:
                process, delay = start(*command), rng.uniform(0, 4 + lengths.get(kind, 4))
            else:
                process = context.Process(target=in_process, args=(f'{work}/kills.log', command))
                process.start()
                delay = rng.uniform(0, 1.1 * lengths[kind]) if kind in lengths else 600  # the first of each is timed
            poll = process.poll if isinstance(process, subprocess.Popen) else lambda process=process: process.exitcode
            while time.time() < began + delay and poll() is None:
                time.sleep(0.003)
            if poll() is not None:
                said = process.communicate()[0] if isinstance(process, subprocess.Popen) else open(f'{work}/kills.log').read()
                assert poll() == 0, said
                assert there == ('going on from step' in said), said  # and not all over again
                resumed += there
                lengths.setdefault(kind, time.time() - began)
                break
            process.kill()
            while poll() is None:
                time.sleep(0.003)
            done, here = done + 1, here + 1
            if os.path.exists(checkpoint):
                load_step(checkpoint)  # whole, at every moment
        assert_same(f'{straight}/{kind}.pt', checkpoint)
        assert_same(f'{straight}/{kind}_best.pt', checkpoint.replace('.pt', '_best.pt'))
        assert table(metrics) == table(metrics.replace(out, straight))
        assert not [f for f in os.listdir(out) if f.endswith('.tmp')]
        runs, most = runs + 1, max(most, here)
    return [('kills', f'training, {runs} runs, up to {most} kills each', done,
             f'each run ends bit-identical to the undisturbed one; {resumed} of the last starts went on from a checkpoint')]


def kills_prepare(work, kills=100, seed=0):
    """As kills_train, of prepare.py; and no process is left behind."""
    whole = corpus(f'{work}/prepared', 600)
    began = time.time()
    finish(start('prepare.py', *source(f'{work}/prepared'), f'--data_dir={work}/prepared/again'))
    length = time.time() - began
    rng, done, runs = random.Random(seed), 0, 0
    while done < kills:
        out = f'{work}/prepared/killed_{runs}'
        while True:
            process = start('prepare.py', *source(f'{work}/prepared'), f'--data_dir={out}', start_new_session=True)
            try:
                process.wait(rng.uniform(0, 1.2 * length))
                finish(process)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()  # until the workers have closed it too
                done += 1
        assert_folders_equal(whole, out)
        runs += 1
    return [('kills', f'prepare.py, {runs} runs', done, 'each ends byte-identical to the undisturbed one; no process left')]


def assert_folders_equal(a, b):
    """Byte for byte, but for the folder's own name in meta.json."""
    names = sorted(os.listdir(a))
    assert names == sorted(os.listdir(b)), (names, sorted(os.listdir(b)))
    for name in names:
        one, two = (open(f'{folder}/{name}', 'rb').read() for folder in (a, b))
        if name == 'meta.json':
            one, two = (json.loads(x) for x in (one, two))
            one, two = (x['splits'] | x['tokenizer'] for x in (one, two))
        assert one == two, name


def signals(work):
    """Ctrl-C and SIGTERM at each time of a run."""
    data, _ = undisturbed(work)
    found = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = f'{work}/signal_{code}'
        command, checkpoint, metrics = stage('encoder', data, out)
        process = start(*command, '--max_iters=100000')
        wait_for_step(process, metrics, 9)
        process.send_signal(number)
        began = time.time()
        said = finish(process, code, 'the same command goes on')
        found.append(('signals', f'{number.name} in training', 1, f'saved step {load_step(checkpoint)}, exit code {code} '
                      f'after {time.time() - began:.1f} s: {said.splitlines()[-1].replace(out, "<out_dir>")}'))
    process = start(*command, '--max_iters=200000', '--init_from=resume', '--batch_size=64', '--gradient_accumulation_steps=64', '--start_passes=0')
    next(line for line in process.stdout if not line.startswith(('resume', '0.')))  # a step of half a minute has begun
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    finish(process, 130, 'stopped at once')
    found.append(('signals', 'a second SIGINT in a long step', 1, 'stopped at once, exit code 130'))
    bible = ['--dataset=web-bible', '--tokenizer=bpe:4096', '--num_proc=1']  # a second of work
    for script, arguments in (('train_encoder.py', []), ('train_decoder.py', []), ('prepare.py', bible)):
        for delay in (0.1, 0.3, 0.6):  # a Ctrl-C during the imports, or soon after
            process = start(script, f'--data_dir={work}/signal_{delay}', *arguments)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            said = process.communicate()[0]
            assert process.returncode in (-signal.SIGINT, 130), said
            assert 'Traceback' not in said, said
    found.append(('signals', 'SIGINT during the imports', 9, 'ended by it, no traceback'))
    return found


def lost_rank(work, pauses=(0, 1, 2.5, 4, 7)):
    """One of two ranks is killed: the other ends; with --max-restarts both go on by themselves, to the same end."""
    data, _ = undisturbed(work)
    out = [f'{work}/lost_{i}' for i in range(3)]
    commands = [stage('encoder', data, o)[0] for o in out]
    process = start(*torchrun([*commands[0], '--max_iters=100000']))
    wait_for_step(process, f'{out[0]}/metrics.csv', 6)
    began = time.time()
    os.kill(workers(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    line = next(x for x in said.splitlines() if 'another rank is gone' in x or 'stopped' in x)
    found = [('ranks', 'one of two ranks killed', 1, f'all ended after {time.time() - began:.0f} s: {line[:150]}')]
    load_step(f'{out[0]}/encoder.pt')
    finish(start(*torchrun(commands[1])))
    process = start(*torchrun(commands[2], restarts=len(pauses)), env=RESTARTS)
    wait_for_step(process, f'{out[2]}/metrics.csv', 6)
    for i, pause in enumerate(pauses):  # in the loop, and while the next ones start and meet
        time.sleep(pause)
        os.kill(workers(process)[i % 2], signal.SIGKILL)
    finish(process)
    assert_same(f'{out[1]}/encoder.pt', f'{out[2]}/encoder.pt')
    assert table(f'{out[1]}/metrics.csv') == table(f'{out[2]}/metrics.csv')
    found.append(('ranks', 'torchrun --max-restarts: a rank killed again and again', len(pauses), 'went on by itself; bit-identical'))
    # to torchrun's process group, as a terminal sends it; the ranks have sessions of their own, and hear of it from torchrun
    process = start(*torchrun([*commands[0], '--max_iters=100000', '--init_from=resume']), start_new_session=True)
    before = load_step(f'{out[0]}/encoder.pt')
    wait_for_step(process, f'{out[0]}/metrics.csv', before + 6)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert 'saved to' in said, said
    found.append(('ranks', 'Ctrl-C under torchrun', 1, f'saved step {load_step(f"{out[0]}/encoder.pt")}'))
    return found


# ---------------------------------------------------------------------------------------------------------------
# Disk and files

def limited(size):
    """For start: files of this process cannot grow past `size` bytes, as on a disk that is full."""
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def clear(process, says=''):
    """It ended with code 1 and one line, no traceback; returns the line."""
    said = finish(process, 1, says)
    lines = [x for x in said.splitlines() if x.startswith(('train_', 'prepare.py:'))]
    assert len(lines) == 1, said
    return lines[0]


def disk(work, sizes=(10, 100, 800, 3000, 20_000, 200_000), tmpfs=(64, 200, 600)):
    """A full disk at each kind of write: before the first checkpoint, at the next one, in prepare.py."""
    data, straight = undisturbed(work)
    found = []
    begun = f'{work}/disk_begun'
    for kind in ('encoder', 'decoder'):
        finish(start(*stage(kind, data, begun, straight)[0]))
    for kind in ('encoder', 'decoder'):
        ways = set()
        for size in sizes:
            for base in ('', begun):  # from nothing; and with a checkpoint that is to stay
                out = f'{work}/disk_{kind}_{size}_{bool(base)}'
                os.makedirs(out)
                command, checkpoint, _ = stage(kind, data, out, straight)
                if base:
                    for name in os.listdir(base):
                        open(f'{out}/{name}', 'wb').write(open(f'{base}/{name}', 'rb').read())
                    command += ['--init_from=resume', '--max_iters=60']
                ways.add(clear(start(*command, preexec_fn=limited(size))).replace(out, '<out_dir>'))
                assert not [f for f in os.listdir(out) if f.endswith('.pt.tmp')]
                assert 'enforce' not in ' '.join(ways), ways  # the reason, not what torch made of it
                if base:
                    assert open(checkpoint, 'rb').read() == open(checkpoint.replace(out, base), 'rb').read()
        found.append(('disk', f'{kind}: files limited to {sizes[0]} to {sizes[-1]:,} bytes', 2 * len(sizes),
                      'one line each, checkpoints untouched: ' + ' / '.join(sorted(ways))))
    whole, ways = corpus(f'{work}/disk_prepare', 600), set()
    for size in sizes[:5]:
        out = f'{work}/disk_prepare/out_{size}'
        command = ['prepare.py', *source(f'{work}/disk_prepare'), f'--data_dir={out}']
        ways.add(clear(start(*command, preexec_fn=limited(size))).replace(out, '<data_dir>'))
        finish(start(*command))  # room again
        assert_folders_equal(whole, out)
    found.append(('disk', f'prepare.py: files limited to {sizes[0]} to {sizes[:5][-1]:,} bytes', len(sizes[:5]),
                  'one line each, and with room again the same bytes: ' + ' / '.join(sorted(ways))))
    if mounts():
        for kilobytes in tmpfs:
            out = f'{work}/tmpfs_{kilobytes}'
            os.makedirs(out)
            command, checkpoint, _ = stage('encoder', data, out)
            line = clear(start(*command, before=['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o size={kilobytes}k none {out}; exec "$@"', '-']))
            found.append(('disk', f'encoder on a tmpfs of {kilobytes} KiB', 1, line.replace(out, '<out_dir>')))
    return found


def mounts():
    """Whether this user may mount things in a namespace of their own."""
    return subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode == 0


def files(work, flips=3, seed=0):
    """Each file of a set, and a checkpoint, cut short, flipped, emptied, removed, of another version or tokenizer."""
    import shutil

    import model as lib
    import prepare
    data, straight = undisturbed(work)
    rng, tried, found = random.Random(seed), 0, []

    def harm(content):
        yield 'cut', content[:len(content) // 2]
        yield 'cut by one', content[:-1]
        yield 'empty', b''
        yield 'longer', content + b'\0'
        for _ in range(flips):
            at = rng.randrange(len(content))
            yield f'flipped at {at}', content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]

    folder = f'{work}/harmed'
    shutil.copytree(data, folder)
    before = prepare.Corpus(data, 'train').batch(0, 4, 128, 16)['tokens']
    for name in sorted(os.listdir(folder)):
        content = open(f'{folder}/{name}', 'rb').read()
        for how, harmed in [*harm(content), ('missing', None)]:
            os.unlink(f'{folder}/{name}')
            if harmed is not None:
                open(f'{folder}/{name}', 'wb').write(harmed)
            try:
                corpora = [prepare.Corpus(folder, split) for split in ('train', 'val')]
                # white space in meta.json says nothing
                assert name == 'meta.json' and (corpora[0].batch(0, 4, 128, 16)['tokens'] == before).all(), (name, how)
            except (ValueError, OSError) as error:
                assert name in str(error) or (name == 'meta.json' and folder in str(error)), (name, how, error)
            tried += 1
        open(f'{folder}/{name}', 'wb').write(content)
    meta = json.load(open(f'{folder}/meta.json'))
    del meta['crc32']  # as an earlier version wrote it
    prepare.write_json(f'{folder}/meta.json', meta)
    prepare.Corpus(folder, 'train')
    prepare.write_json(f'{folder}/meta.json', meta | {'format': 0})
    out = f'{work}/harmed_out'
    line = clear(start(*stage('encoder', folder, out)[0]), 'format 0')
    assert not os.path.exists(out)
    found.append(('files', 'each file of a set', tried, 'detected on opening and named; such as: ' + line.replace(folder, '<data_dir>')))

    tried, shown = 0, ''
    os.makedirs(out)
    for kind in ('encoder', 'decoder'):
        content, path = open(f'{straight}/{kind}.pt', 'rb').read(), f'{out}/{kind}.pt'
        for how, harmed in [*harm(content), *harm(content), *harm(content), ('a pickle with code', pickle_with_code(f'{out}/run')),
                            ('as torch.save writes it', saved_with_code(f'{out}/run'))]:
            open(path, 'wb').write(harmed)
            try:
                lib.load_checkpoint(path, kind)
                # padding between records, an unused field of the archive: what it holds must be what was saved
                shutil.copy(path, f'{out}/copy_{kind}.pt')
                assert_same(f'{straight}/{kind}.pt', f'{out}/copy_{kind}.pt')
                assert how.startswith(('flipped', 'longer', 'cut by one')), how
            except ValueError as error:
                assert path in str(error), error
            tried += 1
        open(path, 'wb').write(content[:1000])
        for arguments in ([], ['--init_from=resume']):
            shown = clear(start(*stage(kind, data, out, straight)[0], *arguments), 'damaged')
        assert open(path, 'rb').read() == content[:1000]
    assert not os.path.exists(f'{out}/run'), 'code in a pickle ran'
    found.append(('files', 'checkpoints, 2 of them pickles with code', tried, 'refused and named, no code run: ' + shown.replace(out, '<out_dir>')))
    # another tokenizer
    other = f'{work}/other'
    corpus(other)
    finish(start('prepare.py', *[a.replace('400', '300') for a in source(other)], f'--data_dir={other}/bpe300'))
    for kind in ('encoder', 'decoder'):
        line = clear(start(*stage(kind, f'{other}/bpe300', straight, straight)[0], '--init_from=resume'), 'tokenizer')
    found.append(('files', 'data of another tokenizer', 2, line.replace(f'{other}/bpe300', '<data_dir>')))
    return found


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickle_with_code(path):
    import pickle

    import model as lib
    return pickle.dumps({'format': lib.FORMAT, 'kind': 'encoder', 'model': Payload(path)})


def saved_with_code(path):
    import io

    import torch

    import model as lib
    out = io.BytesIO()
    torch.save({'format': lib.FORMAT, 'kind': 'encoder', 'model': Payload(path)}, out)
    return out.getvalue()


def places(work):
    """A folder one may not write to; two runs on one; files as open as the umask says, and no more."""
    data, straight = undisturbed(work)
    found = []
    out = f'{work}/place'
    os.makedirs(out)
    if mounts():
        read_only = ['unshare', '-m', 'sh', '-c', f'mount --bind {out} {out} && mount -o remount,ro,bind {out} && exec "$@"', '-']
        for command in (stage('encoder', data, out)[0], stage('decoder', data, out, straight)[0], ['prepare.py', *source(f'{work}/straight'), f'--data_dir={out}']):
            line = clear(start(*command, before=read_only), 'cannot write to')
        found.append(('places', 'a read-only folder: encoder, decoder, prepare.py', 3, line.replace(out, '<data_dir>')))
    command, _, metrics = stage('encoder', data, out)
    first = start(*command, '--max_iters=100000', preexec_fn=lambda: os.umask(0o077))
    wait_for_step(first, metrics, 6)
    line = clear(start(*command, '--max_iters=100000'), 'another run is writing there')
    said = start(*torchrun([*command, '--max_iters=100000'])).communicate()[0]  # the one that knows says so, none hangs
    assert 'another run is writing there' in said, said
    assert 'gone or out of reach' not in said, said
    first.send_signal(signal.SIGTERM)
    finish(first, 143)
    modes = {f: oct(os.stat(f'{out}/{f}').st_mode & 0o777) for f in os.listdir(out)}
    assert set(modes.values()) == {'0o600'}, modes
    finish(start(*command, '--max_iters=60', '--init_from=resume'))  # no lock is left
    found.append(('places', 'two runs on one out_dir', 1, line.replace(out, '<out_dir>')))
    slow = [*source(f'{work}/straight'), f'--data_dir={work}/place_data']
    first = start('prepare.py', *slow, preexec_fn=lambda: os.umask(0o077))
    while not os.path.exists(f'{work}/place_data'):
        time.sleep(0.01)
    time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # or it might be done before the second one looks
    line = clear(start('prepare.py', *slow), 'another run is writing there')
    first.send_signal(signal.SIGCONT)
    finish(first)
    modes = {f: oct(os.stat(f'{work}/place_data/{f}').st_mode & 0o777) for f in os.listdir(f'{work}/place_data')}
    assert set(modes.values()) == {'0o600'}, modes
    found.append(('places', 'two prepare.py on one data_dir', 1, line.replace(f'{work}/place_data', '<data_dir>')))
    found.append(('places', 'umask 077: modes of all files of both', len(modes), '600'))
    return found


# ---------------------------------------------------------------------------------------------------------------
# Numbers

# (rate, ranks, other settings, what the line says) of runs whose step 10 is not finite: after a step at 1e38 gradients are
# not, after one at 1e15 weights still are, and what comes of them is not: met by the targets' covariance if the space is
# whitened there, or in an evaluation, before a checkpoint is written
BROKEN = (('1e38', 1, '', 'training documents ['), ('1e38', 2, '', 'training documents ['),
          ('1e15', 1, '--whiten_interval=1', 'training documents ['), ('1e15', 1, '--eval_interval=1', 'step 10: '))


def numbers(work, broken=BROKEN):
    """Gradients that are not finite; batches in which no sentence has a next one."""
    data, straight = undisturbed(work)
    found = []
    for kind in ('encoder', 'decoder'):
        out = f'{work}/numbers'
        command, checkpoint, _ = stage(kind, data, out, straight)
        finish(start(*command, '--max_iters=9'))
        before = open(checkpoint, 'rb').read()
        for rate, ranks, also, says in broken:
            if kind == 'decoder' and 'whiten' in also:
                continue
            wrong = [*command, '--init_from=resume', f'--learning_rate={rate}', '--warmup_iters=0', f'--min_lr={rate}', *also.split()]
            said = start(*(wrong if ranks == 1 else torchrun(wrong))).communicate()[0]
            lines = [x for x in said.splitlines() if says in x and 'older and whole' in x]
            assert lines, said
            assert ranks > 1 or 'Traceback' not in said, said
            assert open(checkpoint, 'rb').read() == before, said
            found.append(('numbers', f'{kind}: a rate of {rate}, {ranks} rank{"s" * (ranks > 1)} {also}'.rstrip(), 1,
                          'stopped, checkpoint untouched: ' + lines[0][:200]))
    folder = f'{work}/lonely'
    os.makedirs(folder)
    with open(f'{folder}/docs.jsonl', 'w') as f:
        for i, t in enumerate(texts(400)):
            f.write(json.dumps({'text': t if i % 10 == 0 else t.split('.')[0] + '.'}) + '\n')
    finish(start('prepare.py', *source(folder), f'--data_dir={folder}/data'))
    small = ['--batch_size=1', '--block_size=60', '--gradient_accumulation_steps=1', '--grad_clip=1']
    outs = [f'{folder}/a', f'{folder}/b']
    finish(start(*stage('encoder', f'{folder}/data', outs[0])[0], *small))
    command, checkpoint, metrics = stage('encoder', f'{folder}/data', outs[1])
    process = start(*command, *small)
    wait_for_step(process, metrics, 9)
    process.send_signal(signal.SIGTERM)
    process.wait()
    finish(start(*command, *small))
    assert_same(f'{outs[0]}/encoder.pt', checkpoint)
    assert table(metrics) == table(f'{outs[0]}/metrics.csv')
    skipped = int([r for r in table(metrics) if r['skipped']][-1]['skipped'])
    assert 0 < skipped < 40
    found.append(('numbers', 'batches without a pair, stopped and resumed', 40, f'{skipped} of 40 steps skipped and counted; bit-identical'))
    return found


# ---------------------------------------------------------------------------------------------------------------
# Bad input

NASTY = ['<|endoftext|>', '</s>', '[MASK]', '\ud800', '\udfff x', '\0', '\x1c\x85\u2028', '\ufeff', '\u00a0', '👩‍👩‍👧', 'é' * 50, '\n' * 50, ' ' * 50,
         '<b>html</b> &amp; <script>', 'x' * 5000, 'Mr. ', '. ' * 40, '…!?', '你好。', 'مرحبا. ', '\r\n', '\t', '"', "'s", '\\ud800', '{', '[' * 30]


def fuzz(work, cases=100_000):
    """Text that nobody meant: split_sentences, tokenizers, encode, generate, the readers of files, settings."""
    import gzip
    import lzma

    import pyarrow
    import pyarrow.parquet
    import torch
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    import model as lib
    import prepare
    from config import override
    data, straight = undisturbed(work)
    torch.set_num_threads(1)
    folder = f'{work}/fuzz'
    os.makedirs(folder, exist_ok=True)
    encoder, decoder = lib.load_encoder(straight), lib.load_decoder(straight)
    tokenizer = prepare.Corpus(data, 'train').tokenizer
    text = st.lists(st.one_of(st.text(), st.sampled_from(NASTY)), max_size=8).map(''.join)

    def squeezed(x):
        return ''.join(x.split())

    def sentences(x):
        parts = prepare.split_sentences(x)
        assert squeezed(''.join(parts)) == squeezed(prepare.whole_characters(x))
        assert all(p and p == ' '.join(p.split()) for p in parts)

    def tokens(some):
        ids, lengths, of = prepare.encode_documents(some, tokenizer.encode, 16)
        assert lengths.sum() == len(ids) and (len(lengths) == 0 or lengths.max() <= 16)
        assert (ids < tokenizer.eos).all()  # a special token's own text is text
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        for i, x in enumerate(some):  # no document loses a letter to its neighbours
            assert squeezed(tokenizer.decode([t for k, row in zip(of, rows) if k == i for t in row])) == squeezed(x)

    def encode(some):
        z = encoder.encode(some)
        assert z.shape == (len(some), encoder.dim) and np.isfinite(z).all()
        if some:
            assert np.isfinite(encoder.predict(some)).all()

    def generate(given_):
        concepts, temperature, top_k, top_p = given_
        concepts = np.array(concepts, np.float32)[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)
        try:
            out = decoder.generate(concepts, temperature, top_k, top_p, 5)
        except ValueError:
            assert not np.isfinite(concepts).all()
        else:
            assert len(out) == len(concepts) and all(isinstance(x, str) for x in out)

    def read(given_):
        kind, pack, content, separator = given_
        path = f'{folder}/x.{kind}{pack}'
        with open(path, 'wb') as f:
            f.write({'': bytes, '.gz': gzip.compress, '.xz': lzma.compress}[pack](content))
        with contextlib.suppress(prepare.Mistake):
            found = list(prepare.read_file(path, 'text', separator))
            assert all(x is None or isinstance(x, str) for x in found)
            if kind == 'txt':
                assert squeezed(''.join(found)) == squeezed(content.decode('utf-8', 'replace').replace(separator or '\n', ''))

    def raw(given_):
        ending, content, make = given_
        path = f'{folder}/y.{ending}'
        with open(path, 'wb') as f:
            f.write(make(content) if make else content)
        try:
            list(prepare.read_file(path, 'text', ''))
            assert not make, 'half an archive was taken for whole'
        except prepare.Mistake:
            pass

    def records(rows):
        path = f'{folder}/z.jsonl'
        with open(path, 'w', encoding='utf-8', errors='surrogatepass') as f:
            f.writelines(json.dumps({'text': r}) + '\n' for r in rows)
        found = list(prepare.read_file(path, 'text', ''))
        assert found == [json.loads(json.dumps(r)) if isinstance(r, str) else None for r in rows]  # two surrogates may be one letter

    def parquet(given_):
        column, flip = given_
        path = f'{folder}/z.parquet'
        pyarrow.parquet.write_table(pyarrow.table({'text': column}), path)
        if flip is None:
            found = list(prepare.read_file(path, 'text', ''))
            assert found == [r if isinstance(r, str) else None for r in column]
        else:  # cut short
            with open(path, 'r+b') as f:
                f.truncate(flip % os.path.getsize(path))
            try:
                list(prepare.read_file(path, 'text', ''))
            except prepare.Mistake:
                return
            raise AssertionError('half a file was taken for whole')

    def setting(arguments):
        names = {'rate': 0.1, 'steps': 10, 'name': 'a', 'fast': True, 'compile': 'auto', '__file__': __file__}
        try:
            override(names, arguments, {'steps': (1, 100), 'rate': (0, 1)})
        except SystemExit as error:
            assert isinstance(error.code, str) and len(error.code.splitlines()) == 1, error
        else:
            assert 1 <= names['steps'] <= 100 and 0 <= names['rate'] <= 1

    whole = st.text(st.characters(exclude_categories=['Cs']))
    value = st.one_of(text, st.none(), st.integers(), st.floats(allow_nan=False), st.lists(st.none(), max_size=3),
                      st.dictionaries(whole, st.booleans(), max_size=2))
    number = st.floats(width=32)
    name = st.sampled_from(['rate', 'steps', 'name', 'fast', 'compile', 'x'])
    given_as = st.one_of(st.text(), st.integers().map(str), st.floats().map(str), st.just('9' * 5000))
    odd = st.sampled_from(['a.py', '--', '--=', '\0.py', '--rate', '/.py', '--a\nb=1'])
    argument = st.one_of(st.text(), st.builds('--{}={}'.format, name, given_as), odd).filter(lambda a: a not in ('-h', '--help'))
    encoded = text.map(lambda x: x.encode('utf-8', 'surrogatepass'))
    archives = st.one_of(*(st.tuples(st.just(ending), st.binary(), st.just(make)) for ending, make in (
        ('txt.gz', lambda b: gzip.compress(b)[:-4]), ('jsonl.xz', lambda b: lzma.compress(b)[:-4]), ('parquet', lambda b: b'PAR1' + b + b'PAR1'))))
    bytes_ = st.tuples(st.sampled_from(['txt.gz', 'jsonl.xz', 'parquet', 'txt.zst', 'jsonl']), st.binary(), st.none())
    columns = st.one_of(st.lists(st.one_of(st.none(), whole), max_size=5), st.lists(st.integers(-9, 9), max_size=5),
                        st.lists(st.lists(whole, max_size=2), max_size=3), st.lists(st.binary(), max_size=4),
                        st.lists(st.fixed_dictionaries({'a': whole}), min_size=1, max_size=3))
    share = {  # of the cases
        sentences: (0.3, text),
        tokens: (0.15, st.lists(text.map(prepare.whole_characters), max_size=4)),
        read: (0.15, st.tuples(st.sampled_from(['txt', 'jsonl']), st.sampled_from(['', '.gz', '.xz']), st.one_of(st.binary(), encoded),
                               st.sampled_from(['', '\n\n', '<sep>']))),
        raw: (0.08, st.one_of(archives, bytes_)),
        records: (0.1, st.lists(value, max_size=5)),
        parquet: (0.07, st.tuples(columns, st.one_of(st.none(), st.integers(0, 5000)))),
        setting: (0.13, st.lists(argument, max_size=4)),
        encode: (0.01, st.lists(text, max_size=4)),
        generate: (0.01, st.tuples(st.lists(number, max_size=3), st.floats(0, 1e6), st.integers(0, 10**6), st.floats(0, 1)))}
    found = []
    for check, (part, strategy) in share.items():
        n, began = max(int(cases * part), 20), time.time()
        seed(0)(settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))(given(strategy)(check)))()
        found.append(('fuzz', check.__name__, n, f'as they should be, {1000 * (time.time() - began) / n:.1f} ms each'))
    return found


def giants(work, megabytes=50, bomb=150):
    """A line of 50 MB, a word of 100,000 letters, 10,000 line breaks; a gz that swells a thousandfold; nested json."""
    import gzip

    import prepare
    folder, found = f'{work}/giants', []
    os.makedirs(folder)
    line = 'It rained on the city all day long. ' * (megabytes * 10**6 // 36)
    documents = ['First one. Then another.', line, 'x' * 100_000, '\n' * 10_000, 'One, ' * 50_000, '👩‍👩‍👧' * 20_000, 'Last one. The end.']
    with open(f'{folder}/long.jsonl', 'w') as f:
        f.writelines(json.dumps({'text': t}) + '\n' for t in documents)
    for name, megabyte in (('long.jsonl', None), ('bomb.txt.gz', bomb)):
        if megabyte:
            with gzip.open(f'{folder}/{name}', 'wb', 9) as f:
                f.write(b'First one. Then another.\n')
                for _ in range(megabyte):
                    f.write(b'\0' * 10**6)
        out = f'{folder}/{name}_out'
        began, most = time.time(), 0
        process = start('prepare.py', f'--dataset={folder}/{name}', '--tokenizer=bpe:300', f'--data_dir={out}', '--num_proc=1', '--val_fraction=0')
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(0.05)
        said = finish(process)
        corpus_ = prepare.Corpus(out, 'train')
        if not megabyte:
            back = ''.join(corpus_.tokenizer.decode(s) for d in range(corpus_.n_documents) for s in corpus_.document(d))
            assert ''.join(back.split()) == ''.join(''.join(documents).split())
        assert corpus_.tokenizer.decode(corpus_.document(0)[0]) == 'First one.'
        found.append(('input', name, os.path.getsize(f'{folder}/{name}'), f'{time.time() - began:.0f} s, {most:.0f} MB of memory over all processes; {said.splitlines()[-2]}'))
    for content, says in (('[' * 100_000, 'not JSON'), ('{"text": ' + '9' * 5000 + '}', 'not JSON'), ('{"text": {"a": [1, null]}}', 'no sentence')):
        with open(f'{folder}/odd.jsonl', 'w') as f:
            f.write(content)
        line = clear(start('prepare.py', f'--dataset={folder}/odd.jsonl', '--tokenizer=bpe:300', f'--data_dir={folder}/odd', '--num_proc=1'), says)
        found.append(('input', content[:20] + '…', 1, line.replace(folder, '<folder>')))
    return found


def memory(pid):
    """MB that a process and those it started hold."""
    total = 0
    with contextlib.suppress(OSError):  # it has just ended
        with open(f'/proc/{pid}/statm') as f:
            total = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
        for task in os.listdir(f'/proc/{pid}/task'):
            with open(f'/proc/{pid}/task/{task}/children') as f:
                total += sum(map(memory, map(int, f.read().split())))
    return total


# ---------------------------------------------------------------------------------------------------------------
# Several machines

def machines(work):
    """Two network namespaces with addresses of their own as two nodes: training and prepare.py, against one machine."""
    data, straight = undisturbed(work)
    if subprocess.run(['ip', 'netns', 'add', 'jepa_a'], capture_output=True).returncode:
        return [('machines', 'two network namespaces', 0, 'not run: this user may make none')]
    try:
        for command in ('netns add jepa_b', 'link add ja type veth peer name jb', 'link set ja netns jepa_a', 'link set jb netns jepa_b',
                        '-n jepa_a addr add 10.77.0.1/24 dev ja', '-n jepa_b addr add 10.77.0.2/24 dev jb', '-n jepa_a link set ja up',
                        '-n jepa_b link set jb up', '-n jepa_a link set lo up', '-n jepa_b link set lo up'):
            subprocess.run(['ip', *command.split()], check=True)

        def both(command):
            began = time.time()
            nodes = [start('-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', '--rdzv_id=7',
                           '--rdzv_endpoint=10.77.0.1:29411', f'--local_addr=10.77.0.{i + 1}',
                           f'--rdzv_conf=is_host={n == "a"}', *command, env=RESTARTS | {'GLOO_SOCKET_IFNAME': f'j{n}'},
                           before=['ip', 'netns', 'exec', f'jepa_{n}']) for i, n in enumerate('ab')]
            for node in nodes:
                finish(node)
            return time.time() - began
        found = []
        for kind in ('encoder', 'decoder'):
            command, checkpoint, metrics = stage(kind, data, f'{work}/two_nodes', straight)
            seconds = both(command)
            one, here, there = stage(kind, data, f'{work}/one_node', straight)
            finish(start(*torchrun(one)))
            assert_same(here, checkpoint)
            assert table(metrics) == table(there)
            found.append(('machines', f'{kind} on two nodes', 1, f'bit-identical to two ranks on one; {seconds:.0f} s'))
        outs = [f'{work}/prepare_{n}' for n in ('nodes', 'ranks')]
        both(['prepare.py', *source(f'{work}/straight'), f'--data_dir={outs[0]}'])
        finish(start(*torchrun(['prepare.py', *source(f'{work}/straight'), f'--data_dir={outs[1]}'])))
        assert_folders_equal(*outs)
        found.append(('machines', 'prepare.py on two nodes', 1, 'byte-identical to two ranks on one'))
        return found
    finally:
        for name in ('jepa_a', 'jepa_b'):
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


# ---------------------------------------------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (resume, kills_train, kills_prepare, signals, lost_rank, disk, files, places, numbers, fuzz, giants, machines,
                                 sparse, soak)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default=','.join(PARTS), help='parts, by name: ' + ', '.join(PARTS))
    parser.add_argument('--kills', type=int, default=200, help='of training; half as many of prepare.py')
    parser.add_argument('--cases', type=int, default=100_000, help='of bad input')
    parser.add_argument('--minutes', type=float, default=120, help='of the soak')
    parser.add_argument('--results', default=os.path.join(ROOT, 'tests', 'results', 'faults.csv'))
    chosen = parser.parse_args()
    options = {'kills_train': (chosen.kills,), 'kills_prepare': (chosen.kills // 2,), 'fuzz': (chosen.cases,), 'soak': (chosen.minutes,)}
    kept = []
    if os.path.exists(chosen.results):
        with open(chosen.results, newline='') as f:
            kept = list(csv.reader(f))[1:]
    for name in chosen.only.split(','):
        with tempfile.TemporaryDirectory() as work:
            rows = [[name, what, str(cases), said] for _, what, cases, said in PARTS[name](work, *options.get(name, ()))]
        for row in rows:
            print(' | '.join(row), flush=True)
        kept = [r for r in kept if r[0] != name] + rows
        with open(chosen.results, 'w', newline='') as f:
            csv.writer(f, lineterminator='\n').writerows([['part', 'what', 'times', 'result'], *sorted(kept, key=lambda r: list(PARTS).index(r[0]))])


if __name__ == '__main__':
    main()
