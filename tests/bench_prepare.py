"""prepare.py end to end against tiktoken alone, on the same number of processes; its parts; and its memory as the corpus
grows.

    python tests/bench_prepare.py --text=<.jsonl or .jsonl.gz> --repeats=5

Without --text: the embedded Bible, eight times over. Writes tests/results/prepare.csv.
"""

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare  # noqa: E402

_encode = None


def start(spec, folder):
    global _encode
    _encode = prepare.load_tokenizer(spec, folder)._decode.__self__.encode_ordinary  # tiktoken's own, nothing of ours


def tokenize(texts):
    """tiktoken on whole documents: what cannot be avoided."""
    return sum(len(_encode(text)) for text in texts)


def tiktoken_alone(texts, folder, n):
    """Seconds to tokenize the documents in n processes that are already up."""
    spec = json.load(open(os.path.join(folder, 'meta.json')))['tokenizer']
    chunks = [texts[i:i + 64] for i in range(0, len(texts), 64)]
    with multiprocessing.get_context('spawn').Pool(n, start, (spec, folder)) as pool:
        pool.map(tokenize, chunks[:n])
        began = time.perf_counter()
        for _ in pool.imap_unordered(tokenize, chunks):
            pass
        return time.perf_counter() - began


def in_turn(repeats, functions):
    """Median seconds of each of {name: function}, run in turn."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def parts(texts, spec, folder, repeats):
    """MB/s of the parts of prepare.py on one process: {name: median}, in turn."""
    encode = prepare.load_tokenizer(spec, folder).encode
    start(spec, folder)
    prepare._encode = encode
    chunks = list(prepare.chunks(texts[:640]))
    size = sum(len(t.encode()) for c in chunks for t in c) / 1e6
    sentences = [[s for t in c for s in prepare.split_sentences(t)] for c in chunks]
    done = [prepare.work(c, 128, 0.0, np.uint16) for c in chunks]

    def write():
        writer = prepare.Writer(folder, 'bench', 0, 1)
        for split, _, _ in done:
            writer.add(*split['train'])
        writer.close()
    stages = {'tiktoken alone': lambda: [tokenize(c) for c in chunks],
              'split_sentences': lambda: [prepare.split_sentences(t) for c in chunks for t in c],
              'tokenize sentences': lambda: [encode(s) for s in sentences],
              'write and checksum': write,
              'all that a worker does': lambda: [prepare.work(c, 128, 0.0, np.uint16) for c in chunks]}
    return {name: size / seconds for name, seconds in in_turn(repeats, stages).items()}


def memory(pid):
    """Resident MB of a process and its children."""
    total = 0
    for p in [pid, *map(int, subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split())]:
        try:
            with open(f'/proc/{p}/status') as f:
                total += next((int(line.split()[1]) for line in f if line.startswith('VmRSS')), 0)
        except OSError:
            pass
    return total / 1024


def run_prepare(source, folder, n, *more):
    """Seconds and peak MB of prepare.py as a user runs it, start of Python included."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare.py'), f'--dataset={source}', f'--data_dir={folder}',
                                f'--num_proc={n}', *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    reader.join()
    assert process.returncode == 0, output[0]
    return time.perf_counter() - began, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--text', default='')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--num_proc', type=int, default=os.cpu_count())
    parser.add_argument('--tokenizer', default='bpe:8192')
    parser.add_argument('--times', type=int, default=10, help='how much larger the corpus is whose memory is measured')
    arguments = parser.parse_args()
    texts = list(prepare.read_file(arguments.text, 'text', '')) if arguments.text else list(prepare.read_bible()) * 8
    size = sum(len(t.encode()) for t in texts) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, large = os.path.join(folder, 'a.jsonl'), os.path.join(folder, 'b.jsonl')
        lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts)
        with open(source, 'w') as f:
            f.write(lines)
        with open(large, 'w') as f:
            for _ in range(arguments.times):
                f.write(lines)
        tokenizer = f'--tokenizer={arguments.tokenizer}'
        _, small = run_prepare(source, f'{folder}/first', arguments.num_proc, tokenizer)
        alone, whole = [], []
        for i in range(arguments.repeats):
            alone.append(tiktoken_alone(texts, f'{folder}/first', arguments.num_proc))
            # the difference of a large and a small run: what a MB costs once Python is up and the tokenizer trained
            short, _ = run_prepare(source, f'{folder}/short{i}', arguments.num_proc, tokenizer)
            long, peak = run_prepare(large, f'{folder}/long{i}', arguments.num_proc, tokenizer)
            whole.append((long - short) / (arguments.times - 1))
        ratio = statistics.median(a / w for a, w in zip(alone, whole))
        rows = [('tiktoken alone, MB/s', f'{size / statistics.median(alone):.1f}'),
                ('prepare.py, MB/s', f'{size / statistics.median(whole):.1f}'), ('ratio', f'{ratio:.2f}'),
                (f'peak memory, {size:.0f} MB of text, MB', f'{small:.0f}'),
                (f'peak memory, {size * arguments.times:.0f} MB of text, MB', f'{peak:.0f}'),
                ('processes', arguments.num_proc), ('tokenizer', arguments.tokenizer)]
        spec = json.load(open(f'{folder}/first/meta.json'))['tokenizer']
        rows += [(f'one process: {name}, MB/s', f'{speed:.1f}')
                 for name, speed in parts(texts, spec, f'{folder}/first', arguments.repeats).items()]
    for name, value in rows:
        print(f'{name:50} {value}')
    os.makedirs(os.path.join(HERE, 'results'), exist_ok=True)
    with open(os.path.join(HERE, 'results', 'prepare.csv'), 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'value'), *rows])


if __name__ == '__main__':
    main()
