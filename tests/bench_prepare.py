"""prepare.py end to end against tiktoken alone, on 1 and on --num_proc processes; against `datasets.map` with whichever
sentence splitters are installed (see bench_split.py); its parts; and its memory as the corpus grows.

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
sys.path[:0] = [ROOT, HERE]
from bench_split import splitters  # noqa: E402

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


def map_text(batch, splitter):
    """What a user of `datasets` would write: the sentences of each text, split and tokenized."""
    split = splitters()[splitter]
    return {'ids': [[_encode(s) for s in split(text)] for text in batch['text']]}


def datasets_map(source, name, spec, folder, n, texts):
    """Seconds of datasets.map over the first `texts` texts of `source`, arrow file written, in n processes."""
    import datasets
    datasets.disable_progress_bars()
    data = datasets.load_dataset('json', data_files=source, split=f'train[:{texts}]', cache_dir=f'{folder}/cache')
    start(spec, folder)  # processes are forked: they have it
    began = time.perf_counter()
    data.map(map_text, batched=True, batch_size=64, num_proc=n, fn_kwargs={'splitter': name}, remove_columns=data.column_names,
             load_from_cache_file=False, new_fingerprint=f'{name}{began}')
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


def run_prepare(source, folder, n, *more, watch=False):
    """Seconds of prepare.py as a user runs it, start of Python included; peak MB if watched, which slows it."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare.py'), f'--dataset={source}', f'--data_dir={folder}',
                                f'--num_proc={n}', *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reader.start()
    while watch and process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    process.wait()
    seconds = time.perf_counter() - began
    reader.join()
    assert process.returncode == 0, output[0]
    return seconds, peak


def whole(source, large, texts, folder, n, tokenizer, repeats, times):
    """Median seconds of tiktoken alone and of prepare.py on n processes, and of their ratio, in turn."""
    seconds = []
    for i in range(repeats):
        alone = tiktoken_alone(texts, f'{folder}/first', n)
        # the difference of a large and a small run: what a MB costs once Python is up and the tokenizer trained
        short, _ = run_prepare(source, f'{folder}/short{n}_{i}', n, tokenizer)
        long, _ = run_prepare(large, f'{folder}/long{n}_{i}', n, tokenizer)
        ours = (long - short) / (times - 1)
        seconds.append((alone, ours, alone / ours))
    return [statistics.median(s) for s in zip(*seconds)]


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
    with tempfile.TemporaryDirectory() as folder:
        source, large = os.path.join(folder, 'a.jsonl'), os.path.join(folder, 'b.jsonl')
        lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts)
        with open(source, 'w') as f:
            f.write(lines)
        with open(large, 'w') as f:
            for _ in range(arguments.times):
                f.write(lines)
        tokenizer = f'--tokenizer={arguments.tokenizer}'
        _, small = run_prepare(source, f'{folder}/first', arguments.num_proc, tokenizer, watch=True)
        _, peak = run_prepare(large, f'{folder}/again', arguments.num_proc, tokenizer, watch=True)
        rows = [('tokenizer', arguments.tokenizer), ('processes', arguments.num_proc)]
        speeds = {}
        for n in sorted({1, arguments.num_proc}, reverse=True):
            alone, ours, ratio = whole(source, large, texts, folder, n, tokenizer, arguments.repeats, arguments.times)
            speeds[n] = size / ours
            rows += [(f'{n} processes: tiktoken alone, MB/s', f'{size / alone:.1f}'),
                     (f'{n} processes: prepare.py, MB/s', f'{size / ours:.1f}'), (f'{n} processes: ratio', f'{ratio:.2f}')]
        if len(speeds) == 2:
            rows.append((f'{arguments.num_proc} processes, of 1', f'{speeds[arguments.num_proc] / speeds[1]:.2f}'))
        rows += [(f'peak memory, {size:.0f} MB of text, MB', f'{small:.0f}'),
                 (f'peak memory, {size * arguments.times:.0f} MB of text, MB', f'{peak:.0f}')]
        spec = json.load(open(f'{folder}/first/meta.json'))['tokenizer']
        rows += [(f'one process: {name}, MB/s', f'{speed:.1f}')
                 for name, speed in parts(texts, spec, f'{folder}/first', arguments.repeats).items()]
        for name in splitters():
            # the slow ones on a part: 100 texts a process or the whole
            n = arguments.num_proc * 100 if name == 'pysbd' else len(texts)
            mb = sum(len(t.encode()) for t in texts[:n]) / 1e6
            took = [datasets_map(source, name, spec, f'{folder}/first', arguments.num_proc, n)
                    for _ in range(1 if name == 'pysbd' else arguments.repeats)]
            rows.append((f'datasets.map, {name}, MB/s', f'{mb / statistics.median(took):.1f}'))
    for name, value in rows:
        print(f'{name:50} {value}')
    os.makedirs(os.path.join(HERE, 'results'), exist_ok=True)
    with open(os.path.join(HERE, 'results', 'prepare.csv'), 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'value'), *rows])


if __name__ == '__main__':
    main()
