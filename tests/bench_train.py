"""A training step of encoder and decoder against two references of the same width and depth on the same text.

    python tests/bench_train.py                                      CPU: 192 and 384 wide, on the embedded Bible
    python tests/bench_train.py --data_dir=data/openstax --device=cuda --compile
    python tests/bench_train.py --variants

windows: the usual data flow, a context of the 8 sentences before and one target, each padded to the longest of its
batch, the encoder run on both, one prediction each. language model: a causal model on full rows, as nanoGPT trains it.
All run in turn, the medians of --repeats rounds count. Utilisation is of the bfloat16 (or float32) matrix product measured in
the same run. Writes tests/results/train_<device>.csv; with --variants, variants_<device>.csv: what compilation and bfloat16
bring, each on its own; with --profile, profile_<device>.csv: where a step's time goes.
"""

import argparse
import csv
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import model as lib  # noqa: E402
from prepare import Corpus  # noqa: E402

SIZES = {'cpu': [(192, 2, 3), (384, 2, 6)], 'cuda': [(384, 6, 6), (768, 12, 12), (1024, 24, 16)]}  # width, layers, heads
CONTEXT = 8  # sentences


class CausalBlock(lib.Block):
    """Block whose attention is causal without a mask, as a language model's is."""

    def forward(self, x, rope, mask=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(lib.rotate(q, *rope), lib.rotate(k, *rope), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(lib.Encoder):
    """Tokens to cross-entropy of the next ones; head and embedding are one."""

    def __init__(self, vocab_size, n_layer, n_head, n_embd):
        super().__init__(vocab_size, n_layer, n_head, n_embd)
        self.blocks = torch.nn.ModuleList(CausalBlock(n_embd, n_head, 0.0, n_layer) for _ in range(n_layer))
        torch.nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens):
        x = super().forward(tokens, None)
        logits = F.linear(x, self.embedding.weight)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Bench:
    """One size and its workloads: each makes a function that takes a step, by number.

    What that returns gives, when called, (predictions, tokens, positions, flops): counted once the clock has stopped.
    """

    def __init__(self, corpus, size, arguments):
        self.corpus, (self.width, self.layers, self.heads), self.a = corpus, size, arguments
        self.vocab = corpus.meta['tokenizer']['n_vocab']
        self.device = arguments.device
        self.autocast = torch.autocast(self.device, torch.bfloat16) if arguments.dtype == 'bfloat16' else nullcontext()
        self.path = lib.attention_path(self.device, arguments.compile)

    def compiled(self, f):
        return torch.compile(f) if self.a.compile else f

    def tensors(self, batch):
        return [torch.from_numpy(batch[k]).to(self.device) for k in ('tokens', 'sentence', 'document')]

    def update(self, net, optimizer, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g['params']], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def jepa(self):
        torch.manual_seed(0)
        config = lib.JEPAConfig(self.vocab, self.layers, self.heads, self.width, predictor_layer=2)
        net = lib.JEPA(config).to(self.device)
        return net, torch.optim.AdamW(lib.optimizer_groups(net, 0.05), lr=1e-4, fused=True)

    def encoder(self):
        net, optimizer = self.jepa()
        forward, target_means = self.compiled(net), self.compiled(net.target_means)

        def step(i):
            tokens, sentence, document = self.tensors(self.corpus.batch(i, self.a.batch_size, self.a.block_size,
                                                                        self.a.block_size // 8))
            own, context = net.masks(sentence, document, self.path)
            with torch.no_grad(), self.autocast:
                z = target_means(tokens, sentence, document.shape[1], own)
            mean, cov, _ = lib.moments(z[document >= 0])
            net.whitening.update(mean, cov)
            if i % 10 == 0:
                net.whitening.refresh()
            n = lib.pairs(document).sum()
            with self.autocast:
                loss = forward(tokens, sentence, document, net.whitening(z, mean), context) / n
            self.update(net, optimizer, loss)
            net.update_target(0.99)
            return lambda: counts(sentence, document, net.flops)
        return step

    def decoder(self):
        net, _ = self.jepa()
        net.eval().requires_grad_(False)
        config = lib.DecoderConfig(self.vocab, self.width, self.corpus.tokenizer.eos, self.layers, self.heads, self.width)
        decoder = lib.Decoder(config).to(self.device)
        optimizer = torch.optim.AdamW(lib.optimizer_groups(decoder, 0.05), lr=1e-4, fused=True)
        forward, target_means = self.compiled(decoder), self.compiled(net.target_means)
        prefix = config.n_prefix

        def step(i):
            tokens, sentence, document = self.tensors(self.corpus.batch(i, self.a.batch_size, self.a.block_size,
                                                                        self.a.block_size // 8, prefix=prefix))
            words = torch.where(lib.place_in_sentence(sentence) < prefix, -1, sentence)
            with torch.no_grad(), self.autocast:
                z = target_means(tokens, words, document.shape[1], net.masks(words, document, self.path)[0])
            mask = decoder.mask(sentence, self.path)
            with self.autocast:
                loss = forward(tokens, sentence, net.whitening(z), mask, torch.ones(document.shape, device=self.device)) / (sentence >= 0).sum()
            self.update(decoder, optimizer, loss)

            def flops(positions, sentences, seen):
                frozen = 2 * lib.matrix_weights(net.target) * (positions - prefix * sentences)
                return decoder.flops(positions, seen / 2) + frozen + 4 * self.layers * self.width * seen
            return lambda: counts(sentence, document, flops, prefix)
        return step

    def windows(self):
        net, optimizer = self.jepa()
        sentences = [s for d in range(50) for s in self.corpus.document(d)]
        size = max(self.a.batch_size * self.a.block_size // (9 * int(np.mean([len(s) for s in sentences]))), 1)
        encoder, target = self.compiled(net.encoder), self.compiled(net.target)

        def padded(rows):
            out = np.zeros((len(rows), max(map(len, rows))), np.int64)
            inside = np.zeros(out.shape, bool)
            for j, row in enumerate(rows):
                out[j, :len(row)], inside[j, :len(row)] = row, True
            return torch.from_numpy(out).to(self.device), torch.from_numpy(inside).to(self.device)

        def mean(h, inside):
            return (h.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)

        def step(i):
            at = np.random.default_rng(i).integers(CONTEXT, len(sentences), size)
            context, inside = padded([np.concatenate(sentences[j - CONTEXT:j]) for j in at])
            goal, there = padded([sentences[j] for j in at])
            alone = torch.zeros(size, 1, dtype=torch.long, device=self.device)
            with torch.no_grad(), self.autocast:
                z = mean(target(goal, there[:, None, None]), there)
            with self.autocast:
                c = mean(encoder(context, inside[:, None, None]), inside)[:, None]
                p = net.predict_concepts(lib.unit(c), alone)[:, 0]
                loss = (1 - F.cosine_similarity(p, z, dim=-1)).mean()
            self.update(net, optimizer, loss)
            net.update_target(0.99)
            return lambda: (size, int(inside.sum() + there.sum()), inside.numel() + there.numel(), int(
                lib.matrix_weights(net.encoder) * (6 * inside.sum() + 2 * there.sum())
                + 6 * lib.matrix_weights(net.predictor) * size
                + 4 * self.layers * self.width * (3 * (inside.sum(1) ** 2).sum() + (there.sum(1) ** 2).sum())))
        return step

    def language_model(self):
        torch.manual_seed(0)
        net = LanguageModel(self.vocab, self.layers, self.heads, self.width).to(self.device)
        optimizer = torch.optim.AdamW(lib.optimizer_groups(net, 0.05), lr=1e-4, fused=True)
        forward = self.compiled(net)
        tokens = self.corpus.shards[0].tokens
        B, T = self.a.batch_size, self.a.block_size

        def step(i):
            start = i * B * T % (len(tokens) - B * T)
            rows = torch.from_numpy(np.asarray(tokens[start:start + B * T]).astype(np.int64)).view(B, T).to(self.device)
            with self.autocast:
                loss = forward(rows)
            self.update(net, optimizer, loss)
            flops = 6 * (lib.matrix_weights(net.blocks) + self.vocab * self.width) * B * T + \
                12 * self.layers * self.width * B * T * (T + 1) // 2
            return lambda: (0, B * T, B * T, flops)
        return step


def counts(sentence, document, flops, prefix=0):
    """(predictions, real tokens, positions, flops) of a packed batch; flops of (tokens, sentences, pairs seen)."""
    n = torch.cat([torch.bincount(s[s >= 0]) for s in sentence]).double()
    tokens = int(n.sum()) - prefix * len(n)
    return int(lib.pairs(document).sum()), tokens, sentence.numel() - prefix * len(n), \
        float(flops(int(n.sum()), len(n), float((n * n).sum())))


WORKLOADS = {'encoder': Bench.encoder, 'windows': Bench.windows, 'decoder': Bench.decoder,
             'language model': Bench.language_model}


def wait(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def ceiling(device, dtype, n=2048):
    """GFLOP/s of a matrix product of n x n."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n ** 3 / statistics.median(times[1:]) / 1e9


def copy_speed(device, n=2**26):
    """GB/s of a memory copy, read and written."""
    a, b = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        a.copy_(b)
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n / statistics.median(times[1:]) / 1e9


def peak_memory(name, size, a):
    """MB that a workload adds to a process of its own (CPU), or takes on the GPU."""
    command = [sys.executable, __file__, f'--memory_of={name}', f"--size={','.join(map(str, size))}",
               *(f'--{k}={getattr(a, k)}' for k in ('data_dir', 'device', 'dtype', 'batch_size', 'block_size')),
               *(['--compile'] if a.compile else [])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def high_water():
    """Peak resident MB of this process. (getrusage's would be its parent's, if that is larger.)"""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 1024


def print_memory(a):
    bench = Bench(Corpus(a.data_dir, 'train'), tuple(map(int, a.size.split(','))), a)
    before = high_water()
    step = WORKLOADS[a.memory_of](bench)
    for i in range(3):
        step(i)
    print(torch.cuda.max_memory_allocated() / 2**20 if a.device == 'cuda' else high_water() - before)


def in_turn(steps, a):
    """Of each of {name: function}: rows (predictions, tokens, positions, flops, seconds) of a.repeats rounds, in turn."""
    seen = {name: [] for name in steps}
    for r in range(a.repeats):
        for name, step in steps.items():
            wait(a.device)
            began = time.perf_counter()
            taken = [step(a.warm_up + r * a.steps + i) for i in range(a.steps)]
            wait(a.device)
            seconds = time.perf_counter() - began
            seen[name].append([*np.sum([count() for count in taken], 0), seconds])
    return {name: np.array(runs) for name, runs in seen.items()}


def warmed_up(step, a):
    for i in range(a.warm_up):
        step(i)
    return step


def measure(corpus, size, a, peak):
    """Rows of the table for one size."""
    bench = Bench(corpus, size, a)
    steps = {name: warmed_up(make(bench), a) for name, make in WORKLOADS.items()}
    torch._dynamo.utils.counters.clear()
    seen = in_turn(steps, a)
    recompiled = torch._dynamo.utils.counters['stats']['unique_graphs'] if a.compile else 0
    rows = []
    for name, runs in seen.items():
        predictions, tokens, positions, flops, seconds = runs.T
        rows.append({'width': size[0], 'layers': size[1], 'workload': name,
                     'predictions/s': round(np.median(predictions / seconds)), 'tokens/s': round(np.median(tokens / seconds)),
                     'padding': round(1 - tokens.sum() / positions.sum(), 4),
                     'GFLOP/s': round(np.median(flops / seconds) / 1e9, 1),
                     'utilisation': round(np.median(flops / seconds) / 1e9 / peak, 3),
                     'MB': round(peak_memory(name, size, a)), 'graphs compiled while timed': recompiled})
    return rows


def variants(corpus, size, a):
    """Rows of tokens/s of encoder and decoder in fp32 and in bf16, as they are and compiled, all in turn."""
    steps = {}
    for workload in ('encoder', 'decoder'):
        for dtype in ('float32', 'bfloat16'):
            for compiled in (False, True):
                bench = Bench(corpus, size, argparse.Namespace(**vars(a) | {'dtype': dtype, 'compile': compiled}))
                steps[workload, dtype, compiled] = warmed_up(WORKLOADS[workload](bench), a)
    speed = {key: float(np.median(runs[:, 1] / runs[:, 4])) for key, runs in in_turn(steps, a).items()}
    return [{'width': size[0], 'layers': size[1], 'workload': w, 'dtype': d, 'compiled': c, 'tokens/s': round(v),
             'of fp32, not compiled': round(v / speed[w, 'float32', False], 2)} for (w, d, c), v in speed.items()]


def shares(corpus, size, a, top=8):
    """Rows of the operations that take the most of each workload's step: share of its own time."""
    from torch.profiler import ProfilerActivity, profile
    activity = ProfilerActivity.CUDA if a.device == 'cuda' else ProfilerActivity.CPU
    rows = []
    for name, make in WORKLOADS.items():
        step = warmed_up(make(Bench(corpus, size, a)), a)
        with profile(activities=[activity]) as profiled:
            for i in range(a.steps):
                step(a.warm_up + i)
            wait(a.device)
        time_of = operator.attrgetter(f'self_{"device" if a.device == "cuda" else "cpu"}_time_total')
        events = sorted(profiled.key_averages(), key=time_of, reverse=True)
        whole = sum(map(time_of, events))
        rows += [{'width': size[0], 'layers': size[1], 'workload': name, 'operation': e.key[:60],
                  'share': round(time_of(e) / whole, 3)} for e in events[:top]]
    return rows


def show(rows):
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print(' '.join(f'{v!s:>{max(len(k), 8)}}' for k, v in row.items()))


def write(name, rows):
    """Write rows to tests/results/<name>.csv."""
    os.makedirs(os.path.join(HERE, 'results'), exist_ok=True)
    with open(os.path.join(HERE, 'results', name + '.csv'), 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='', help='what prepare.py wrote; none: the embedded Bible, prepared here')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float32'])
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--variants', action='store_true', help='fp32 and bf16, compiled and not, instead')
    parser.add_argument('--profile', action='store_true', help='the operations that take the most time, instead')
    parser.add_argument('--batch_size', type=int, default=4)
    parser.add_argument('--block_size', type=int, default=1024)
    parser.add_argument('--steps', type=int, default=2, help='steps a round')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--warm_up', type=int, default=2)
    parser.add_argument('--memory_of', default='', help=argparse.SUPPRESS)
    parser.add_argument('--size', default='', help='width,layers,heads instead of the usual ones')
    a = parser.parse_args()
    torch.set_float32_matmul_precision('high')
    if a.memory_of:
        print_memory(a)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not a.data_dir:
            a.data_dir = folder + '/data'
            subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py'), '--dataset=web-bible',
                            f'--data_dir={a.data_dir}', '--tokenizer=bpe:8192'], check=True, stdout=subprocess.DEVNULL)
        corpus = Corpus(a.data_dir, 'train')
        peak = {d: ceiling(a.device, getattr(torch, d)) for d in ('bfloat16', 'float32')}
        print(f"{torch.get_num_threads()} threads, {a.dtype}{', compiled' if a.compile else ''}; matrix product "
              f"{peak['bfloat16']:.0f} GFLOP/s in bfloat16, {peak['float32']:.0f} in float32; copy "
              f'{copy_speed(a.device):.1f} GB/s')
        sizes = [tuple(map(int, a.size.split(',')))] if a.size else SIZES[a.device]
        machine = {'threads': torch.get_num_threads(), 'matrix product GFLOP/s': round(peak[a.dtype])}
        if a.variants:
            rows = [row for size in sizes for row in variants(corpus, size, a)]
            show(rows)
            write(f'variants_{a.device}', [row | machine for row in rows])
            return
        if a.profile:
            rows = [row for size in sizes for row in shares(corpus, size, a)]
            show(rows)
            write(f'profile_{a.device}', rows)
            return
        rows = [row for size in sizes for row in measure(corpus, size, a, peak[a.dtype])]
    show(rows)
    for size in dict.fromkeys(r['width'] for r in rows):
        of = {r['workload']: r for r in rows if r['width'] == size}
        print(f"{size} wide: predictions/s {of['encoder']['predictions/s'] / of['windows']['predictions/s']:.1f} x windows; "
              f"time a FLOP, of the language model's: encoder {of['language model']['GFLOP/s'] / of['encoder']['GFLOP/s']:.2f}, "
              f"decoder {of['language model']['GFLOP/s'] / of['decoder']['GFLOP/s']:.2f}")
    write(f'train_{a.device}', [row | {'dtype': a.dtype, 'compiled': a.compile} | machine for row in rows])


if __name__ == '__main__':
    main()
