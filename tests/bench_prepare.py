"""prepare.py end to end: MB/s beside tiktoken alone on as many processes and an older checkout; memory.

    python tests/bench_prepare.py --text=<.jsonl or .jsonl.gz> --other=<folder of an older checkout>

All in turn, so that a slow moment of the machine falls on all. A speed is the difference of a large and a
small run: what a MB costs once Python is up and the tokenizer trained. Without --text: the embedded Bible.
Writes tests/results/prepare.csv.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

import tiktoken
from conftest import ROOT

import prepare


def start(spec):
    """Give the process tiktoken's own encoder, nothing of ours."""
    global _encode
    library = prepare.Tokenizer(spec)._library if 'merges' in spec else tiktoken.get_encoding(spec['name'])
    _encode = library.encode_ordinary

def tokenize(texts):
    return sum(len(_encode(text)) for text in texts)

def tiktoken_alone(texts, spec, n):
    """Seconds to tokenize whole documents in n processes that are already up: what cannot be avoided."""
    groups = [texts[i:i + 64] for i in range(0, len(texts), 64)]
    with multiprocessing.get_context('spawn').Pool(n, start, (spec,)) as pool:
        pool.map(tokenize, groups[:n])
        began = time.perf_counter()
        list(pool.imap_unordered(tokenize, groups))
        return time.perf_counter() - began

def run(root, source, folder, n, tokenizer, watch=False):
    """Seconds that a checkout's prepare.py takes; and its peak memory in MB if watched, which slows it."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, 'prepare.py', f'--dataset={source}', f'--data_dir={folder}', f'--num_proc={n}',
               f'--tokenizer={tokenizer}']
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while watch and process.poll() is None:
        children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True)
        peak = max(peak, sum(map(resident, [process.pid, *children.stdout.split()])))
        time.sleep(0.05)
    assert process.wait() == 0
    return time.perf_counter() - began, peak

def resident(pid):
    """Resident MB of a process."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
    return 0

def main():
    parser = argparse.ArgumentParser()
    for name in ('--text', '--other'):
        parser.add_argument(name, default='')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--num_proc', type=int, default=os.cpu_count())
    parser.add_argument('--tokenizer', default='bpe:8192')
    parser.add_argument('--megabytes', type=int, default=32, help='of text in the small run')
    parser.add_argument('--times', type=int, default=4, help='so much larger is the large run')
    parser.add_argument('--out', default=os.path.join(ROOT, 'tests', 'results', 'prepare.csv'))
    given = parser.parse_args()
    texts = list(prepare.read_file(given.text, 'text', '') if given.text else prepare.read_bible()) * 4
    texts = next(prepare.chunks(texts, given.megabytes * 1_000_000))
    size = sum(len(text.encode()) for text in texts) / 1e6
    roots, rows = {'prepare.py': ROOT} | ({'the other checkout': given.other} if given.other else {}), []
    with tempfile.TemporaryDirectory() as folder:
        sources = [f'{folder}/{name}.jsonl' for name in ('small', 'large')]
        for source, times in zip(sources, (1, given.times)):
            with open(source, 'w') as f:
                for _ in range(times):
                    f.writelines(json.dumps({'text': text}) + '\n' for text in texts)
        for root, source in ((root, source) for root in roots.items() for source in sources):
            data_dir = f'{folder}/{root[0]}_{os.path.basename(source)}'
            _, peak = run(root[1], source, data_dir, given.num_proc, given.tokenizer, watch=True)
            rows.append((f'{root[0]}: peak memory, {os.path.basename(source)[:5]} run, MB', f'{peak:.0f}'))
        spec = json.load(open(f'{folder}/prepare.py_small.jsonl/meta.json'))['tokenizer']
        for n in sorted({1, given.num_proc}):
            speeds = {name: [] for name in ('tiktoken alone', *roots)}
            for i in range(given.repeats):
                speeds['tiktoken alone'].append(size / tiktoken_alone(texts, spec, n))
                for name, root in roots.items():
                    short, long = (run(root, source, f'{folder}/{name}_{n}_{i}_{k}', n, given.tokenizer)[0]
                                   for k, source in enumerate(sources))
                    speeds[name].append(size * (given.times - 1) / (long - short))
            for name, values in speeds.items():
                rows.append((f'{n} processes: {name}, MB/s', f'{statistics.median(values):.1f}'))
                if name != 'prepare.py':
                    ratios = sorted(a / b for a, b in zip(speeds['prepare.py'], values))
                    rows.append((f'{n} processes: prepare.py / {name}, median (least to most)',
                                 f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'))
    rows.append((f'{given.tokenizer}; text, MB', f'{size:.0f} and {size * given.times:.0f}'))
    for row in rows:
        print(f'{row[0]:75} {row[1]}')
    with open(given.out, 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'value'), *rows])

if __name__ == '__main__':
    main()
