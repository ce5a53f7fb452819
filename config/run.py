"""What every training run does the same: ranks, device, rates, signals, metrics, checkpoints. No preset."""

import csv
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

if __name__ == '<run_path>':
    raise SystemExit('config/run.py is code that the training scripts share, not a preset')

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import UserError, as_user_error, ranks, write_file

FORMAT = 8  # of checkpoints

def pick_device(name: str | None) -> str:
    """The device called `name`; 'auto' or None: cuda where there is one. Raises UserError without it."""
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name in ('auto', None) else name
    with as_user_error(f'use --device={name}', "'auto' takes what there is"):
        torch.zeros(1, device=name)
    return name

def autocast(device: str, dtype: str):
    """The context of a forward pass: products in bfloat16 where dtype says so. Raises UserError."""
    if dtype not in ('float32', 'bfloat16'):
        raise UserError(f"dtype={dtype!r}: expected 'float32' or 'bfloat16'")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == 'bfloat16')

def half_cosine(step, total, start, end):
    """Learning rate, EMA momentum, weight decay: from start to end on a half cosine over `total` steps."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))

def lr_at(step: int, s: dict) -> float:
    """Learning rate of the settings s: linear warm-up, then a half cosine to min_lr, or to a tenth."""
    rate, warmup = s['learning_rate'], s['warmup_iters']
    if step < warmup:
        return rate * (step + 1) / (warmup + 1)
    if not s['decay_lr']:
        return rate
    total = (s['lr_decay_iters'] or s['max_iters']) - warmup
    return half_cosine(step - warmup, total, rate, s['min_lr'] or rate / 10)

def all_sum(x):
    """The tensor x summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

class Run:
    """A training process: its rank, device and dtype, the step it is at, and what it writes to out_dir.

    `s` are the script's settings, `kind` is what its checkpoints hold, `columns` are those that its metrics
    have besides what every run has, `name` is that of its files.
    """

    def __init__(self, s: dict, kind: str, columns: list[str], name: str):
        self.s, self.kind, self.name, self.out_dir = s, kind, name, s['out_dir'] or '.'
        self.columns = ['step', 'epoch', 'tokens', 'seconds', 'lr', 'loss', 'grad_norm', 'tokens_per_s',
                        *columns]
        self.suffix = '' if name == 'encoder' else f'_{name}'
        self.metrics = f'{self.out_dir}/metrics{self.suffix}.csv'
        self.step, self.seen, self.seconds, self.best = 0, 0, 0.0, -math.inf
        self.signal, self.stopping = 0, False
        self.rank, self.world_size, local = ranks()
        self.n_micro, self.device, self.dtype, self.compile = (
            s[k] for k in ('gradient_accumulation_steps', 'device', 'dtype', 'compile'))
        if self.n_micro % self.world_size:
            raise UserError(f'{self.world_size} ranks cannot share --gradient_accumulation_steps='
                            f'{self.n_micro}')
        if self.world_size > 1 and torch.cuda.is_available() and self.device.startswith(('auto', 'cuda')):
            self.device = f'cuda:{local}'  # whatever number was given: one rank, one GPU
        self.device = pick_device(self.device)
        self.device_type = torch.device(self.device).type
        if self.device.startswith('cuda:'):
            torch.cuda.set_device(self.device)  # which takes no 'cuda' without a number
        if self.world_size > 1:
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device_type == 'cuda' else 'gloo')
        if self.dtype == 'auto':  # bfloat16 only where the hardware multiplies it
            fast = torch.cuda.is_bf16_supported(including_emulation=False) if self.device_type == 'cuda' \
                else torch.cpu._is_avx512_bf16_supported()
            self.dtype = 'bfloat16' if fast else 'float32'
        if self.compile == 'auto':  # on a CPU plain code is faster: tests/results/first_edition
            self.compile = self.device_type == 'cuda'
        self.autocast = autocast(self.device, self.dtype)
        torch.set_float32_matmul_precision('high')  # fp32 products are TF32 on CUDA

    def compiled(self, f):
        """The module or function f, compiled where this run compiles."""
        return torch.compile(f) if self.compile else f

    # ------------------------------------------------------------------------------------------------
    # Before the first step

    def read(self, train_data, val_data, prefix=0):
        """Read these Corpora, with `prefix` free positions before each sentence."""
        s, self.train_data, block = self.s, train_data, (self.s['block_size'], prefix)
        self.rows = {'batch_size': s['batch_size'], 'block_size': s['block_size'], 'prefix': prefix,
                     'max_sentences': s['max_sentences'] or train_data.max_sentences(*block)}
        rows_a_step = self.n_micro * s['batch_size']
        self.positions = rows_a_step * s['block_size']  # of a step
        self.steps_per_epoch = train_data.n_windows(*block) / rows_a_step
        val_batches = val_data.n_windows(*block) // (s['batch_size'] * self.world_size)
        self.eval_iters = min(s['eval_iters'], max(val_batches, 1))  # no row twice

    def resume(self, fixed: dict) -> dict | None:
        """The checkpoint to go on from, None where out_dir has none; this run is then at its step.

        Raises UserError where an entry of `fixed`, {name: value}, was another when it was written. Every
        other setting that changed is printed and taken.
        """
        path, self.fixed = f'{self.out_dir}/{self.name}.pt', fixed
        if self.s['init_from'] != 'resume' and not os.path.exists(path):
            return None
        state = load_checkpoint(path, self.kind)
        for name, value in fixed.items():
            if (old := state['fixed'].get(name)) != value:
                raise UserError(f"'{path}' was trained with {name}={old}, not {value}: set it back, or take "
                                'another --out_dir')
        was = state['settings']
        changed = [k for k, v in self.s.items() if was.get(k) != v]
        self.say(f"going on from step {state['step']} of {path}",
                 *(f'  {k} is now {self.s[k]!r}, was {was.get(k)!r}' for k in changed))
        self.step, self.seen, self.seconds = state['step'], state['seen'], state['seconds']
        self.fixed = state['fixed'] | fixed
        if not {'data_dir', 'eval_iters', 'batch_size', 'block_size', 'max_sentences'}.intersection(changed):
            self.best = state['best']  # else it was measured on other sentences
        return state

    def build(self, model, groups: list, state: dict | None, **saved):
        """The model as it is called in training: compiled, and over all ranks.

        `groups` are those of model.optimizer_groups, `state` is a checkpoint to go on from, `saved` is what
        each checkpoint holds beside the weights.
        """
        self.model, self.saved = model, saved
        self.optimizer = torch.optim.AdamW(groups, betas=(self.s['beta1'], self.s['beta2']), fused=True)
        if state:  # its moments, with the current settings
            moments = {'state': state['optimizer']['state']}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | moments)
        self.forward = self.compiled(model)
        if self.world_size > 1:
            self.forward = DistributedDataParallel(self.forward)
        n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.say(f'{n_params / 1e6:.1f}M parameters, {self.train_data.n_tokens / 1e6:.1f}M tokens of text, '
                 f'{self.steps_per_epoch:,.0f} steps an epoch, {self.positions:,} positions a step, '
                 f'{self.world_size} x {self.device}, {self.dtype}{", compiled" * self.compile}')
        return self.forward

    def begin(self):
        """Write the files of a run, start loading batches, and save before it ends on a signal."""
        self.first, self.logged = self.step, self.seen
        self.since = self.began = time.time()
        if self.rank == 0:
            os.makedirs(self.out_dir, exist_ok=True)
            kept = []
            if self.step and os.path.exists(self.metrics):  # rows after this step are written again
                with open(self.metrics, encoding='utf-8') as f:
                    kept = [line for line in list(f)[1:] if int(line.partition(',')[0]) <= self.step]
            write_file(self.metrics, ','.join(self.columns) + '\n' + ''.join(kept))
            write_file(f'{self.out_dir}/config{self.suffix}.json', json.dumps(self.s, indent=1))
        self.bar = tqdm(total=self.s['max_iters'], initial=self.step, unit='step',
                        disable=self.rank > 0 or None)  # None: on a terminal alone
        self.loader = ThreadPoolExecutor(1)
        self.upcoming = self.loader.submit(self.micro_batches, self.step)

        def on_signal(number, frame):  # the first asks the loop to save and stop, the second stops at once
            if self.signal:
                os._exit(128 + number)
            self.signal = number
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)

    # ------------------------------------------------------------------------------------------------
    # Batches

    def micro_batches(self, step: int) -> list:
        """This rank's micro-batches of a step, on the CPU: (tokens, sentence, document) each."""
        return [self.tensors(self.train_data, step, i, self.n_micro, seed=self.s['seed'])
                for i in range(self.rank, self.n_micro, self.world_size)]

    def validation_batches(self, corpus, n: int):
        """n batches of this rank, always the same ones, on the device."""
        for i in range(n):
            yield self.to_device(self.tensors(corpus, i, self.rank, self.world_size))

    def tensors(self, corpus, *which, **how) -> list:
        """tokens, sentence, document of a batch; arguments as of Corpus.batch."""
        return list(map(torch.from_numpy, corpus.batch(*which, **self.rows, **how).values()))

    def to_device(self, batch) -> list:
        """The tensors of a batch on the device; the copy to a GPU is asynchronous."""
        if self.device_type == 'cuda':
            batch = [x.pin_memory() for x in batch]
        return [x.to(self.device, non_blocking=True) for x in batch]

    # ------------------------------------------------------------------------------------------------
    # A step: next_batches, count, and for each of on_device a backward; then update, log_step

    def next_batches(self) -> list:
        """As micro_batches, of this step; a thread loads the next step's meanwhile."""
        batches = self.upcoming.result()
        self.upcoming = self.loader.submit(self.micro_batches, self.step + 1)
        return batches

    def count(self, *counts: int) -> list[int]:
        """Sum counts of a step, tokens first, over ranks; sets `stopping` if a rank has got a signal."""
        total = torch.tensor([*counts, self.signal])  # on the CPU: no wait for a GPU
        *counts, self.stopping = all_sum(total).tolist()
        self.seen += counts[0]
        return counts

    def on_device(self, batches: list):
        """Yield the step's micro-batches; DDP sums the gradients of all in the last one's backward."""
        self.loss = 0
        for i, batch in enumerate(batches, 1):
            if self.world_size > 1:
                self.forward.require_backward_grad_sync = i == len(batches)
            yield self.to_device(batch)

    def backward(self, loss):
        """Add the gradients of a micro-batch's share of the step's loss."""
        (loss * self.world_size).backward()  # undoes DDP's average: losses are shares of all ranks'
        self.loss = self.loss + loss.detach()

    def update(self):
        """Clip the gradients and make the optimizer's step, at this step's rates."""
        s = self.s
        self.lr = lr_at(self.step, s)
        decay = half_cosine(self.step, s['max_iters'], s['weight_decay'], s['weight_decay_end'])
        for group in self.optimizer.param_groups:
            group['lr'], group['weight_decay'] = self.lr * group['scale'], decay * group['decays']
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s['grad_clip'] or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log_step(self, **row):
        """Count the step, and every log_interval write its loss, gradient norm and the speed so far."""
        self.step += 1
        self.bar.update(1)
        if self.step % self.s['log_interval'] == 0 or self.evaluates() or self.stopping:
            loss, norm = all_sum(self.loss).item(), self.norm.item()
            speed = (self.seen - self.logged) / (time.time() - self.since)
            self.log({'lr': self.lr, 'loss': loss, 'grad_norm': norm, 'tokens_per_s': speed, **row})
            self.bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s')
            self.logged = self.seen

    # ------------------------------------------------------------------------------------------------
    # Metrics and checkpoints

    def evaluates(self) -> bool:
        """Whether this step is evaluated: the first one, every eval_interval and the last."""
        resumed = self.step == self.first > 0
        return (self.step % self.s['eval_interval'] == 0 or self.step == self.s['max_iters']) and not resumed

    def log(self, row: dict):
        """Append a row to the metrics; cells that were not measured stay blank. Raises UserError for NaN."""
        now = time.time()
        self.seconds, self.since = self.seconds + now - self.since, now
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(f'step {self.step}: {name} is not finite. Saved checkpoints are whole; '
                                'try a lower --learning_rate')
        if self.rank == 0:
            row = {'step': self.step, 'epoch': self.step / self.steps_per_epoch, 'tokens': self.seen,
                   'seconds': self.seconds, **row}
            with open(self.metrics, 'a', newline='', encoding='utf-8') as f:
                csv.DictWriter(f, self.columns, lineterminator='\n').writerow(
                    {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})

    def record(self, values: dict, score: float, text: str):
        """Print and write an evaluation; keep the newest checkpoint and the best by `score`."""
        self.log(values)
        done = self.step - self.first
        minutes = (time.time() - self.began) / 60 / max(done, 1) * (self.s['max_iters'] - self.step)
        self.say(f'step {self.step}: {text}' + (f' | {minutes:.1f} min left' if done else ''))
        if self.step == 0 and self.name == 'encoder':
            self.save('_init')
        elif self.step:
            if score > self.best:
                self.best = score
                self.save('_best')
            self.save()
        self.since = time.time()

    def save(self, suffix: str = ''):
        """Write the checkpoint <name><suffix>.pt; the one without a suffix holds what is needed to go on."""
        state = {'kind': self.kind, 'config': vars(self.model.config), 'model': self.model.state_dict(),
                 'step': self.step, 'settings': self.s, **self.saved}
        if not suffix:
            state |= {'optimizer': self.optimizer.state_dict(), 'fixed': self.fixed, 'seen': self.seen,
                      'seconds': self.seconds, 'best': self.best}
        if self.rank == 0:
            save_checkpoint(f'{self.out_dir}/{self.name}{suffix}.pt', state)

    def end(self, hint: str):
        """Save where the run was stopped, and exit: code 0 at the end, 128 + n after signal n."""
        self.bar.close()
        if self.stopping:
            self.save()
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
        if self.step < self.s['max_iters']:
            self.say(f'stopped at step {self.step}, saved to {self.out_dir}: the same command goes on')
            sys.exit(128 + (self.signal or signal.SIGTERM))
        self.say(f'{self.out_dir} has {self.step} steps, {self.seconds / 60:.1f} minutes of training. {hint}')

    def say(self, *lines: str):
        """Print lines from the first rank, above its bar."""
        if self.rank == 0:
            tqdm.write('\n'.join(lines))
            sys.stdout.flush()

def save_checkpoint(path: str, state: dict):
    """Write `state` whole or not at all. Raises OSError."""
    try:
        write_file(path, lambda f: torch.save({'format': FORMAT, **state}, f))
    except RuntimeError as error:  # on a full disk torch raises one about file positions
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

def load_checkpoint(path: str, kind: str) -> dict:
    """The checkpoint of `kind` at `path`, or in that out_dir, on the CPU. Raises UserError: what to do."""
    path = os.path.expanduser(path)
    path = f'{path}/{kind}.pt' if os.path.isdir(path) else path
    if not os.path.exists(path):
        script = 'train_encoder.py' if kind == 'encoder' else 'train_decoder.py'
        raise UserError(f"no {kind} at '{path}': train one with {script}, or give its --out_dir")
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        if isinstance(error, (OSError, MemoryError)) or 'alloc' in str(error):
            raise UserError(f"cannot read '{path}': {str(error) or 'out of memory'}") from error
        raise UserError(f"'{path}' is damaged, or no checkpoint ({type(error).__name__}): give another, such "
                        'as a *_best.pt beside it') from error
    if not isinstance(state, dict) or (state.get('format'), state.get('kind')) != (FORMAT, kind):
        raise UserError(f"'{path}' holds no {kind} of format {FORMAT}: train one with this version")
    return state
