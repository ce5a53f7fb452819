"""Speed of a training step: encoder and decoder against a plain language model of the same width.

    python tests/bench_train.py                              CPU: 192 and 384 wide, on the embedded Bible
    python tests/bench_train.py --device=cuda --data_dir=data/openstax --batch_size=16 --block_size=4096
    python tests/bench_train.py --other=<another checkout>   training scripts of both, step by step in turn

Medians of --repeats steps; workloads take turns; on CUDA all is compiled. FLOPs are what the mathematics asks
for: of real tokens, and of pairs of tokens of which one sees the other; `utilisation` is their share of a
matrix product in the same run. `generate` writes 64 tokens. Writes tests/results/train_<device>.csv and
phases_<device>.csv (milliseconds of a step's parts), or ratio_<device>.csv.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import model as lib  # noqa: E402
from prepare import Corpus  # noqa: E402

SIZES = {'cpu': '192,2,3;384,2,6', 'cuda': '384,6,6;512,6,8;768,12,12'}  # width, layers, heads
PREFIX, WRITTEN = 2, 64

class Bench:
    """Workloads of one size. Each makes step(i, mark), which calls mark(name) at the end of each of its parts
    and returns a function that gives (real tokens, flops) once the clock has stopped."""

    def __init__(self, corpus, size, a):
        self.corpus, (self.width, self.layers, self.heads), self.a = corpus, size, a
        self.vocab, self.path = corpus.meta['tokenizer']['n_vocab'], lib.attention_path(a.device, a.compile)
        self.autocast = torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16')

    def compiled(self, f):
        return torch.compile(f, dynamic=False) if self.a.compile else f

    def concept_decoder(self):
        config = lib.DecoderConfig(self.vocab, self.width, -1, self.layers, self.heads, self.width, PREFIX)
        return lib.Decoder(config).to(self.a.device)

    def updates(self, net):
        """A function of a loss and mark: backward and the optimizer's step."""
        optimizer = torch.optim.AdamW(lib.optimizer_groups(net), lr=1e-4, fused=True)

        def update(loss, mark):
            mark('forward')
            loss.backward()
            mark('backward')
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark('optimizer')
        return update

    def attention(self, pairs):
        """FLOPs of scores and weighted sums, forward, over pairs of positions of which one sees the other."""
        return 4 * self.layers * self.width * float(pairs)

    def training(self, kind):
        """A training script's step; batches are cut beforehand, as they are in the background."""
        a, encoder, prefix = self.a, kind == 'encoder', PREFIX * (kind == 'decoder')
        jepa = lib.JEPA(lib.JEPAConfig(self.vocab, self.layers, self.heads, self.width)).to(a.device)
        net = jepa if encoder else self.concept_decoder()
        net.config.eos = 0
        forward, targets, update = self.compiled(net), self.compiled(jepa.targets), self.updates(net)
        shape = a.batch_size, a.block_size, self.corpus.max_sentences(a.block_size, prefix)
        batches = [self.corpus.batch(i, 0, 1, *shape, prefix=prefix) for i in range(a.warm_up + a.repeats)]

        def step(i, mark):
            tokens, sentence, document = (torch.from_numpy(x).to(a.device) for x in batches[i].values())
            words = torch.where(lib.place_in_sentence(sentence) < prefix, -1, sentence)
            with self.autocast:
                own = lib.build_mask(words, path=self.path)
                mask = own if encoder else lib.build_mask(sentence, True, path=self.path)
                mark('masks')
                z = targets(tokens, words, document, own)
                mark('targets')
                concepts = jepa.whitening(z, document >= 0)
                mark('whitening')
                more = [document, z] if encoder else []
                loss = forward(tokens, sentence, *more, concepts, mask) / a.block_size
            update(loss, mark)
            if encoder:
                jepa.whitening.update(jepa.whitening.moments(z, document >= 0))
                if i % 10 == 0:
                    jepa.whitening.refresh()
                jepa.update_target(0.99)
                mark('statistics, moving average')
            return lambda: counts(*(torch.cat([torch.bincount(row[row >= 0]) for row in x]).double().cpu()
                                    for x in (sentence, words)))

        def counts(n, m):  # positions of each sentence, with the prefix and without
            frozen = 2 * matrices(jepa.encoder) * m.sum() + self.attention((m * m).sum())
            if encoder:  # the predictor reads two inputs
                return m.sum(), 4 * frozen + 12 * matrices(jepa.predictor) * len(m)
            once = matrices(net.prefix) + matrices(net.direct)
            return m.sum(), (frozen + 3 * self.attention((n * (n + 1) / 2).sum()) + 6 * (
                matrices(net.blocks) * n.sum() + once * len(n) + self.vocab * self.width * (m + 1).sum()))
        return step

    def language_model(self):
        B, T = self.a.batch_size, self.a.block_size
        config = lib.JEPAConfig(self.vocab, self.layers, self.heads, self.width)
        net = LanguageModel(config).to(self.a.device)
        forward, update = self.compiled(net), self.updates(net)
        tokens = torch.randint(self.vocab, (B, T), device=self.a.device)

        def step(i, mark):
            with self.autocast:
                loss = forward(tokens)
            update(loss, mark)
            return lambda: (B * T, 6 * (matrices(net.blocks) + self.vocab * self.width) * B * T
                            + 3 * self.attention(B * T * (T + 1) / 2))
        return step

    def writing(self, n):
        """Greedy generation of WRITTEN tokens for each of n concepts."""
        net, z = self.concept_decoder().eval(), torch.randn(n, self.width, device=self.a.device)

        def step(i, mark):
            with torch.inference_mode(), self.autocast:
                net.generate(z, WRITTEN)
            return lambda: (n * WRITTEN, 0)
        return step

class LanguageModel(lib.Encoder):
    """Tokens (B, T) to the cross-entropy of the next ones, as nanoGPT; head and embedding are one."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attend = lambda qkv, rope, *_, heads=block.n_head: causal(qkv, rope, heads)

    def forward(self, tokens):
        logits = F.linear(super().forward(tokens, None)[:, :-1], self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

def causal(qkv, rope, heads):
    """Block.attend, to all that stands before in the row, without a mask."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(lib.rotate(q, *rope), lib.rotate(k, *rope), v, is_causal=True)
    return y.transpose(1, 2).flatten(2)

def matrices(module):
    """Weights that each position is multiplied with: of a module's matrices, without its embeddings."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))

def timed(step, i, a):
    """(Tokens, flops, seconds, {part: seconds}) of a step. A GPU is waited for after each part."""
    names, times = [], []

    def mark(name):
        if a.device == 'cuda':
            torch.cuda.synchronize()
        names.append(name)
        times.append(time.perf_counter())
    mark('')
    counts = step(i, mark)
    mark('end')
    return *map(float, counts()), times[-1] - times[0], dict(zip(names[1:-1], np.diff(times)))

def measure(corpus, size, a, peak):
    """(Rows of the table, rows of parts) of one size."""
    bench, cuda, steps, memory, rows, parts = Bench(corpus, size, a), a.device == 'cuda', {}, {}, [], []
    make = {'encoder': partial(bench.training, 'encoder'), 'decoder': partial(bench.training, 'decoder'),
            'language model': bench.language_model, 'generate, batch 1': partial(bench.writing, 1),
            'generate, batch 64': partial(bench.writing, 64)}
    for name, f in make.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steps[name] = f()
        for i in range(a.warm_up):
            timed(steps[name], i, a)
        memory[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20) if cuda else ''
    torch._dynamo.utils.counters.clear()
    seen = [{name: timed(step, a.warm_up + i, a) for name, step in steps.items()} for i in range(a.repeats)]
    for name in steps:
        tokens, flops, seconds, marks = map(np.array, zip(*(found[name] for found in seen)))
        first = {'width': size[0], 'layers': size[1], 'workload': name}
        speed = np.median(flops / seconds) / 1e9
        rows.append(first | {'tokens/s': round(np.median(tokens / seconds)), 'GFLOP/s': round(speed, 1),
                             'utilisation': round(speed / peak, 3), 'MB': memory[name],
                             'compiled while timed': torch._dynamo.utils.counters['stats']['unique_graphs']})
        parts += [first | {'part': part, 'ms': round(1000 * np.median([m[part] for m in marks]), 2)}
                  for part in marks[0]]
    return rows, parts

# ------------------------------------------------------------------------------------------------------------
# Two checkouts. Of the other one this knows settings' names, metrics.csv and the API for other programs.

def in_turn(functions, repeats, warm_up=1):
    """{name: (repeats,) of what each function returned}; they take turns, every other time in reverse."""
    found = {name: [] for name in functions}
    for r in range(warm_up + repeats):
        for name in list(functions)[::1 - 2 * (r % 2)]:
            found[name].append(functions[name]())
    return {name: np.array(values[warm_up:]) for name, values in found.items()}

def interval(rates):
    """Medians of two rates {name: rates} and of their ratio, with its 95 % interval by bootstrap."""
    ratio = np.divide(*rates.values())
    drawn = np.median(np.random.default_rng(0).choice(ratio, (2000, len(ratio))), 1)
    low, high = np.quantile(drawn, (0.025, 0.975)).round(3)
    medians = {name: round(np.median(r)) for name, r in rates.items()}
    return medians | {'ratio': round(np.median(ratio), 3), 'from': low, 'to': high}

def held(root, kind, size, out, data, a):
    """Tokens a second of each next step of a checkout's training script, which stands still in between."""
    path, done, tokens = f"{out}/metrics{'_decoder' * (kind == 'decoder')}.csv", 0, [0]
    settings = {'data_dir': data, 'out_dir': out, 'n_embd': size[0], 'n_layer': size[1], 'n_head': size[2],
                'batch_size': a.batch_size, 'block_size': a.block_size, 'device': a.device, 'log_interval': 1,
                'eval_interval': 10**6, 'max_iters': 10**6, 'eval_iters': 1}
    settings |= {'start_passes': 0, 'start_tokens': 100_000} if kind == 'encoder' else {}
    command = [sys.executable, f'train_{kind}.py', *(f'--{name}={value}' for name, value in settings.items())]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
    try:
        while True:
            process.send_signal(signal.SIGCONT)
            began, before = time.perf_counter(), tokens[-1]
            while len(tokens) <= done + 1:
                time.sleep(0.002)
                assert process.poll() is None, 'the script has ended'
                with contextlib.suppress(FileNotFoundError), open(path) as f:
                    tokens = [0] + [int(r['tokens']) for r in csv.DictReader(f) if r['tokens_per_s']]
            seconds, done = time.perf_counter() - began, len(tokens) - 1
            process.send_signal(signal.SIGSTOP)
            yield (tokens[-1] - before) / seconds
    finally:  # let it save, and end
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        process.wait()

def compare(roots, outs, path, repeats, device):
    """{what: {name: rates}} of checkouts {name: folder}, models {name: out_dir}, on the texts in a json."""
    workers = {}
    for name, root in roots.items():
        command = [sys.executable, f'{HERE}/bench_worker.py', root, outs[name], path, device]
        workers[name] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(process):
        print(file=process.stdin, flush=True)
        return list(map(float, process.stdout.readline().split()))
    found = in_turn({name: lambda p=process: ask(p) for name, process in workers.items()}, repeats)
    for process in workers.values():
        process.communicate()
    return {what: {name: rates[:, i] for name, rates in found.items()}
            for i, what in enumerate(('encode, sentences', 'generate, tokens'))}

def against(sizes, a, work):
    """Rows that compare this checkout with a.other: training steps, encode, generate."""
    roots, rows = {'this': ROOT, 'other': os.path.abspath(a.other)}, []
    data = {name: prepared(f'{work}/{name}/data', a, root) for name, root in roots.items()}
    corpus = Corpus(data['this'], 'train')
    with open(f'{work}/texts.json', 'w') as f:
        json.dump([corpus.tokenizer.decode(s) for d in range(20) for s in corpus.document(d)][:300], f)
    for size in sizes:
        outs, found = {name: f'{work}/{name}/{size[0]}' for name in roots}, {}
        for kind in ('encoder', 'decoder'):
            runs = {name: held(root, kind, size, outs[name], data[name], a) for name, root in roots.items()}
            steps = {name: lambda run=run: next(run) for name, run in runs.items()}
            found[f'{kind} step, tokens'] = in_turn(steps, a.repeats, a.warm_up)
            for run in runs.values():
                run.close()
        found |= compare(roots, outs, f'{work}/texts.json', a.repeats, a.device)
        rows += [{'width': size[0], 'layers': size[1], 'a second': what, **interval(rates)}
                 for what, rates in found.items()]
    return rows

def show(rows, path):
    """Print rows as a table and keep them as csv."""
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print(' '.join(f'{v!s:>{max(len(k), 8)}}' for k, v in row.items()), flush=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def prepared(folder, a, root):
    """The folder, once root's prepare.py has put --dataset there."""
    command = ['prepare.py', f'--dataset={a.dataset}', f'--data_dir={folder}', '--tokenizer=bpe:8192']
    subprocess.run([sys.executable, *command], cwd=root, check=True, capture_output=True)
    return folder

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    for name, default in {'data_dir': '', 'dataset': 'web-bible', 'device': 'cpu', 'dtype': 'bfloat16',
                          'size': '', 'batch_size': 8, 'block_size': 512, 'repeats': 9, 'warm_up': 2,
                          'other': '', 'results': os.path.join(HERE, 'results')}.items():
        parser.add_argument(f'--{name}', type=type(default), default=default)
    a = parser.parse_args()
    cuda = a.compile = a.device == 'cuda'
    sizes = [tuple(map(int, size.split(','))) for size in (a.size or SIZES[a.device]).split(';')]
    torch.set_float32_matmul_precision('high')
    with tempfile.TemporaryDirectory() as work:
        if a.other:
            show(against(sizes, a, work), f'{a.results}/ratio_{a.device}.csv')
            return
        corpus = Corpus(a.data_dir or prepared(f'{work}/data', a, ROOT), 'train')
        x, rows, parts = torch.randn(2, *[8192 if cuda else 1024] * 2, device=a.device), [], []
        x = x.to(getattr(torch, a.dtype))  # large enough to fill the device
        products = [timed(lambda i, mark: lambda y=x[0] @ x[1]: (0, 2 * len(y)**3), i, a) for i in range(12)]
        peak = np.median([flops / seconds for _, flops, seconds, _ in products[2:]]) / 1e9
        for size in sizes:
            torch._dynamo.reset()
            found, more = measure(corpus, size, a, peak)
            rows, parts = rows + found, parts + more
    machine = {'dtype': a.dtype, 'compiled': a.compile, 'threads': torch.get_num_threads(),
               'device': torch.cuda.get_device_name() if cuda else 'cpu', 'torch': torch.__version__,
               'GFLOP/s at most': round(peak)}
    show(parts, f'{a.results}/phases_{a.device}.csv')
    show([row | machine for row in rows], f'{a.results}/train_{a.device}.csv')
    for width, *_ in sizes:
        speed = {r['workload']: r['GFLOP/s'] for r in rows if r['width'] == width}
        ratio = {k: round(float(speed['language model'] / speed[k]), 2) for k in ('encoder', 'decoder')}
        print(f"{width} wide, time a FLOP over the language model's: {ratio}")

if __name__ == '__main__':
    main()
