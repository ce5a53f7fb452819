"""Train the decoder: from a sentence's concept, the sentence. The encoder is frozen.

    python train_decoder.py config/decoder_demo.py
    torchrun --nproc_per_node=8 train_decoder.py config/decoder_fineweb.py
    python train_decoder.py config/decoder_demo.py --max_iters=900 --init_from=resume     the same command needs no flag
    python train_decoder.py config/decoder_demo.py --language_model=True      evaluate.py compares predictions with it

Writes to out_dir, which may be the encoder's: decoder.pt (newest), decoder_best.pt (lowest validation loss),
metrics_decoder.csv, config_decoder.json; or language_model.pt and so on.
"""

import csv
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports ends without a traceback

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as lib
from config import override
from prepare import Corpus, Mistake, hold, write_json

# ---------------------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/decoder_*.py) and --name=value
# in and out
data_dir = ''  # what prepare.py wrote; '': what the encoder was trained on
out_dir = 'out/fineweb'  # the encoder's, for the checkpoints and metrics_decoder.csv
encoder_path = ''  # a checkpoint, or the out_dir of one; '': out_dir
init_from = 'scratch'  # 'resume': with other settings than before
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
log_interval = 10  # steps between lines in metrics_decoder.csv
eval_iters = 16  # validation batches an evaluation
wandb_log = False  # needs `pip install wandb`
wandb_project = 'lang-jepa'
wandb_run_name = 'decoder'
# data: a step reads gradient_accumulation_steps * batch_size rows of block_size tokens, over all ranks together
batch_size = 16  # rows in a micro-batch
block_size = 1024  # positions in a row: whole sentences, each with its prefix
max_sentences = 0  # sentences in a row at most; 0: block_size / 8
gradient_accumulation_steps = 1  # micro-batches a step, shared among the ranks
# model
n_layer = 12
n_head = 12
n_embd = 768
n_prefix = 2  # positions that carry the concept
dropout = 0.0
language_model = False  # True: no concept, and a token sees all that stands before it in its document's row
concept_noise = 0.1  # length of the Gaussian noise added to a unit-norm concept while training
concept_blur = 0.2  # share of sentences whose concept is mixed with noise and that much shorter: as predictions are
concept_dropout = 0.1  # share of sentences written without their concept: what perplexity is compared with
# optimizer: AdamW
learning_rate = 6e-4
max_iters = 50_000
weight_decay = 0.05  # on a half cosine to weight_decay_end
weight_decay_end = 0.05
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0: no clipping
decay_lr = True
warmup_iters = 500
lr_decay_iters = 0  # 0: max_iters
min_lr = 0.0  # 0: a tenth of learning_rate
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1'; auto: cuda where there is one
dtype = 'auto'  # 'float32' or 'bfloat16' (autocast); auto: bfloat16 where the hardware multiplies it faster
compile = 'auto'  # True or False; auto: on CUDA
seed = 1337
settings = override(globals(), limits={
    **dict.fromkeys(('eval_interval', 'log_interval', 'eval_iters', 'batch_size', 'block_size', 'n_layer', 'n_head',
                     'n_embd', 'gradient_accumulation_steps', 'n_prefix'), (1, math.inf)),
    **dict.fromkeys(('max_sentences', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'learning_rate', 'min_lr',
                     'weight_decay', 'weight_decay_end', 'grad_clip', 'concept_noise'), (0, math.inf)),
    **dict.fromkeys(('dropout', 'concept_dropout', 'concept_blur'), (0, 1)),
    **dict.fromkeys(('beta1', 'beta2'), (0, 0.99999)), 'seed': (0, 2**32 - 1)})

# ---------------------------------------------------------------------------------------------------------------
# Setup: ranks, device, data


def stop(message):
    """End with one line on standard error and exit code 1."""
    raise SystemExit(f'train_decoder.py: {message}')


interrupted = -1  # the signal that asked to stop; -1 before the first step, 0 while none has come


def on_signal(number, frame):
    """Ask the loop to save and stop; before the loop, and for the second time, stop at once."""
    global interrupted
    if interrupted:
        print('stopped at once: what was saved before is whole', file=sys.stderr)
        os._exit(128 + number)
    interrupted = number


def on_error(kind, error, trace):
    """In place of a traceback, one line where another rank was lost."""
    if isinstance(error, dist.DistError) or (kind is RuntimeError and 'gloo' in str(error)):
        print(f'rank {rank}: another rank is gone or out of reach ({str(error).splitlines()[0]}); checkpoints are '
              'whole, the same command goes on', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
sys.excepthook = on_error

ddp = 'RANK' in os.environ
rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
try:
    device = lib.pick_device(device)
except ValueError as error:
    stop(error)
device_type = torch.device(device).type
if wandb_log:
    try:
        import wandb
    except ImportError:
        stop('--wandb_log=True needs `pip install wandb`')
if ddp:
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo',
                            timeout=timedelta(minutes=10))  # a machine without power says no word
master = rank == 0
if dtype == 'auto':
    fast = torch.cuda.is_bf16_supported() if device_type == 'cuda' else torch.cpu._is_avx512_bf16_supported()
    dtype = 'bfloat16' if fast else 'float32'
if compile == 'auto':  # on a CPU what is not compiled is faster: tests/results/variants_cpu.csv
    compile = device_type == 'cuda'
if compile not in (True, False):
    stop(f"--compile={compile}: expected True, False or 'auto'")
if concept_blur + concept_dropout >= 1:
    stop(f'--concept_blur={concept_blur} and --concept_dropout={concept_dropout} leave no sentence with its concept')
if dtype not in ('float32', 'bfloat16'):
    stop(f"--dtype={dtype}: expected 'float32', 'bfloat16' or 'auto'")
if gradient_accumulation_steps % world_size:
    stop(f'{world_size} ranks cannot share --gradient_accumulation_steps={gradient_accumulation_steps} evenly')
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
torch.set_float32_matmul_precision('high')  # on CUDA, products that are fp32 by their docstring run as TF32
max_sentences = max_sentences or block_size // 8
lr_decay_iters, min_lr = lr_decay_iters or max_iters, min_lr or learning_rate / 10

try:
    encoder_state = lib.load_checkpoint(encoder_path or out_dir, 'encoder', device)
    data_dir = data_dir or encoder_state['settings']['data_dir']
    train_data, val_data = Corpus(data_dir, 'train'), Corpus(data_dir, 'val')
    val_rows = val_data.rows_per_epoch(block_size, max_sentences, prefix=n_prefix)
    jepa = lib.JEPA(lib.JEPAConfig(**encoder_state['config']))
except (OSError, ValueError, ImportError) as error:
    stop(error)
if encoder_state['tokenizer']['sha256'] != train_data.tokenizer_spec['sha256']:
    stop(f'{data_dir} was prepared with another tokenizer than the encoder read: prepare it with the same one')
jepa.load_state_dict(encoder_state['model'])
jepa.to(device).eval().requires_grad_(False)
attention, encoder_attention = (lib.attention_path(device_type, compile, hf) for hf in (False, bool(jepa.config.hf)))
del encoder_state
rows = {'batch_size': batch_size, 'block_size': block_size, 'max_sentences': max_sentences, 'prefix': n_prefix}
eval_iters = min(eval_iters, max(val_rows // (batch_size * world_size), 1))  # no row twice, but where there are fewer


def to_device(batch):
    """tokens, sentence, document of a numpy batch, on the device."""
    tensors = [torch.from_numpy(batch[k]) for k in ('tokens', 'sentence', 'document')]
    if device_type == 'cuda':
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return tensors


def micro_batches(step):
    """This rank's share of the step's micro-batches: a pure function of (seed, step, rank, world size)."""
    n = gradient_accumulation_steps
    return [train_data.batch(step, **rows, seed=seed, rank=i, world_size=n) for i in range(rank, n, world_size)]


def all_sum(x):
    """Sum of a tensor over all ranks."""
    if ddp:
        dist.all_reduce(x)
    return x


# ---------------------------------------------------------------------------------------------------------------
# Model: scratch or resume

architecture = {'vocab_size': train_data.tokenizer_spec['n_vocab'], 'concept_dim': jepa.config.n_embd,
                'eos': train_data.tokenizer.eos, 'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd,
                'n_prefix': n_prefix, 'dropout': dropout}
kind = 'language_model' if language_model else 'decoder'
checkpoint_path = os.path.join(out_dir, f'{kind}.pt')
metrics_path = os.path.join(out_dir, f'metrics_{kind}.csv')
if init_from not in ('scratch', 'resume'):
    stop(f"--init_from={init_from}: expected 'scratch' or 'resume'")
refused = ''
if master and (init_from != 'resume' or os.path.exists(lib.newest(checkpoint_path))):  # none for a mistyped --out_dir
    try:  # before the checkpoint is read, so that no other run writes one meanwhile
        os.makedirs(out_dir, exist_ok=True)
        hold(metrics_path)
    except OSError as error:
        refused = f'cannot write to {out_dir}: {error.strerror}'
if all_sum(torch.tensor(len(refused))):
    stop(refused) if refused else sys.exit(1)
newest_path = lib.newest(checkpoint_path)
encoder_fingerprint = lib.fingerprint(jepa)
if not math.isclose(all_sum(torch.tensor(encoder_fingerprint)).item() / world_size, encoder_fingerprint, rel_tol=1e-6):
    stop('ranks read different encoders: one is being trained or copied there')
torch.manual_seed(seed)
try:
    state = lib.checkpoint_to_resume(newest_path, kind, settings, device)
    model = lib.Decoder(lib.DecoderConfig(**architecture)).to(device)
except (OSError, ValueError) as error:
    stop(error)
if not state:
    words = [[i] for i in range(architecture['vocab_size'])]
    words = torch.from_numpy(lib.SentenceEncoder(jepa, None, device).encode_tokens(words, 1024))
    model.start_from(words.to(device), jepa.token_weight)
groups = lib.optimizer_groups(model, weight_decay)
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
step, best_loss, metrics_bytes, seen_tokens = 0, math.inf, 0, 0
if state:
    for name, value in architecture.items():
        if state['config'][name] != value and name != 'dropout':
            stop(f'{newest_path} was trained with {name}={state["config"][name]}, not {value}: '
                 f'set it back, or train from scratch in another --out_dir')
    if not math.isclose(state['encoder_fingerprint'], encoder_fingerprint, rel_tol=1e-6):
        stop(f'{newest_path} was trained on another encoder: remove {kind}.pt and {kind}_best.pt, and '
             'train from scratch')
    if master:
        print(f"going on from step {state['step']} of {newest_path}", flush=True)
        for name in sorted(settings.keys() & state['settings'].keys()):
            if settings[name] != state['settings'][name]:
                print(f'resume: {name} is now {settings[name]!r}, was {state["settings"][name]!r}')
    model.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    for group in optimizer.param_groups:  # settings of now, moments of then
        group['betas'] = beta1, beta2
    step, best_loss = state['step'], state['best_loss']
    metrics_bytes, seen_tokens = state['metrics_bytes'], state['seen_tokens']
del state

if master:
    try:
        os.truncate(metrics_path, min(metrics_bytes, os.path.getsize(metrics_path)))  # lost steps write rows again
        write_json(os.path.join(out_dir, f'config_{kind}.json'), settings)
    except OSError as error:
        stop(f'cannot write to {out_dir}: {error.strerror}')

compiled = torch.compile(model) if compile else model
target_means = torch.compile(jepa.target_means) if compile else jepa.target_means
parallel = DistributedDataParallel(compiled, forward_sync_buffers=False) if ddp else compiled

# ---------------------------------------------------------------------------------------------------------------
# Schedules: functions of the step, so that a resumed run needs no state of theirs


def lr_at(step):
    """Learning rate: linear warm-up, then a half cosine to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    ratio = min((step - warmup_iters) / max(lr_decay_iters - warmup_iters, 1), 1.0)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


# ---------------------------------------------------------------------------------------------------------------
# A batch's concepts, and what a validation batch costs with and without them


@torch.no_grad()
def inputs(tokens, sentence, document):
    """The decoder's mask and the concepts (B, S, concept_dim) of a batch; zeros for a language model."""
    if language_model:
        mask = model.mask(lib.document_of(sentence, document), attention)
        return mask, torch.zeros(*document.shape, jepa.config.n_embd, device=device)
    # the encoder does not see the decoder's free positions
    words = torch.where(lib.place_in_sentence(sentence) < n_prefix, -1, sentence)
    own = jepa.masks(words, document, encoder_attention)[0]
    with autocast:
        z = target_means(tokens, words, document.shape[1], own)
    return model.mask(sentence, attention), jepa.whitening(z)


def blurred(concepts):
    """Concepts (B, S, D) as training gives them: with a little noise, or, a share concept_dropout, none: zeros.

    A share `concept_blur` is given as predictions are: right by `sure` of its direction, the rest noise, and that long.
    """
    if language_model:
        return concepts
    draw = torch.rand(2, *concepts.shape[:2], device=concepts.device)
    noise = torch.randn_like(concepts) / concepts.shape[-1] ** 0.5
    sure = torch.where(draw[0] < concept_blur, draw[1], 1.0)[..., None]
    share = torch.where(sure < 1, (1 - sure.square()).sqrt(), concept_noise)
    none = draw[0][..., None] >= 1 - concept_dropout
    return torch.where(none, 0.0, sure * lib.unit(sure * concepts + share * noise))


@torch.no_grad()
def evaluate():
    """Validation nats per token (the end of a sentence counts as one) given the concept, another's, and none."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for i in range(eval_iters):
        tokens, sentence, document = to_device(val_data.batch(i, **rows, rank=rank, world_size=world_size))
        mask, concepts = inputs(tokens, sentence, document)
        used = document >= 0
        others = concepts.clone()
        others[used] = concepts[used].roll(1, 0)
        with autocast:
            for j, c in enumerate((concepts, others, torch.zeros_like(concepts))):
                sums[j] += compiled(tokens, sentence, c, mask).double()
        sums[3] += (sentence >= 0).sum() - (n_prefix - 1) * used.sum()
    model.train()
    sums = all_sum(sums)
    given, shuffled, none = (sums[:3] / sums[3]).tolist()
    if not math.isfinite(given):  # before a checkpoint is written
        stop(f'step {step}: the validation loss is {given}. Checkpoints are older and whole; try a lower '
             '--learning_rate')
    return {'val_loss': given, 'val_shuffled': shuffled, 'val_unconditional': none, 'val_information': none - given}


# ---------------------------------------------------------------------------------------------------------------
# Writing: metrics_decoder.csv, checkpoints

COLUMNS = ['step', 'tokens', 'seconds', 'lr', 'loss', 'grad_norm', 'tokens_per_s', 'val_loss', 'val_shuffled',
           'val_unconditional', 'val_information']


def log(row):
    """Append a row to metrics_decoder.csv; cells that were not measured stay blank."""
    with open(metrics_path, 'a', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, COLUMNS)
        if not f.tell():
            table.writeheader()
        table.writerow({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})
    if wandb_log:
        wandb.log(row, step=row['step'])


def save(name):
    """Write the state after `step` steps to out_dir/name, whole or not at all."""
    lib.save_checkpoint(os.path.join(out_dir, name), {
        'kind': kind, 'config': asdict(model.config), 'model': model.state_dict(),
        'optimizer': optimizer.state_dict(), 'tokenizer': train_data.tokenizer_spec, 'settings': settings, 'step': step,
        'best_loss': best_loss, 'metrics_bytes': lib.settled(metrics_path), 'seen_tokens': seen_tokens,
        'encoder_fingerprint': encoder_fingerprint})


if master:
    print(f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {gradient_accumulation_steps} x '
          f'{batch_size * block_size:,} positions a step, {world_size} x {device}, {dtype}'
          f'{", compiled" if compile else ""}')
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=settings)

# ---------------------------------------------------------------------------------------------------------------
# Loop

def not_finite(step, parts, what='loss'):
    """Stop a step that is not finite, saying what and where; parts: the loss, or `what`, summed over micro-batches."""
    sums = torch.zeros(gradient_accumulation_steps, device=device)
    sums[rank::world_size] = torch.stack(parts)
    said = lib.not_finite(model, all_sum(sums), lambda i: train_data.documents_in(
        step, **rows, seed=seed, rank=i, world_size=gradient_accumulation_steps), what)
    stop(f'step {step}: {said}. Checkpoints are older and whole; try a lower --learning_rate')


def look_at(last):
    """Stop where the last step, (step, whether its gradients are finite, loss of its micro-batches), was not finite.

    Asked once the GPU has more to do, which need not wait for the answer, and before anything is logged or saved.
    """
    if last and not last[1]():  # the same on all ranks
        not_finite(last[0], last[2])


def report(v, minutes):
    """Say what the evaluation `v` found and how long is left; keep it, and checkpoints of all but the first one."""
    global best_loss
    left = f' | {minutes:.0f} min left' if step > first_step else ''
    tqdm.write(f'step {step}: nats per token {v["val_loss"]:.3f} | another concept {v["val_shuffled"]:.3f} | no '
               f'concept {v["val_unconditional"]:.3f} | information {v["val_information"]:.3f}{left}', file=sys.stdout)
    if step == first_step == 0 or step > first_step:
        log({'step': step, 'tokens': seen_tokens, **v})
    if step > first_step:
        if v['val_loss'] < best_loss:
            best_loss = v['val_loss']
            save(f'{kind}_best.pt')
        save(f'{kind}.pt')


def run():
    """Train to max_iters; returns the signal that stopped it, or 0."""
    global step, seen_tokens
    loader = ThreadPoolExecutor(1)  # cuts the next batch while this one is computed
    upcoming = loader.submit(micro_batches, step)
    bar = tqdm(total=max_iters, initial=step, unit='step', disable=not (master and sys.stderr.isatty()))
    start = since = time.time()
    tokens_since = 0
    stopping, last = False, None
    while True:
        if stopping or step % eval_interval == 0 or step == max_iters:
            look_at(last)
        if step % eval_interval == 0 or step == max_iters:
            began, values = time.time(), evaluate()
            if master:
                report(values, (began - start) / max(step - first_step, 1) * (max_iters - step) / 60)
            since += time.time() - began
        if step >= max_iters:
            break
        if stopping:
            if master:
                save(os.path.basename(checkpoint_path))
            break

        arrays = upcoming.result()
        batches = [to_device(b) for b in arrays]
        upcoming = loader.submit(micro_batches, step + 1)
        torch.manual_seed(hash((seed, step, rank)))  # noise and dropout: no generator state to save
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step)
            if group['decays']:
                group['weight_decay'] = lib.momentum_at(step, max_iters, weight_decay, weight_decay_end)

        # counted on the CPU: the GPU is not waited for
        places = sum((b['sentence'] >= 0).sum() - (n_prefix - 1) * (b['document'] >= 0).sum() for b in arrays)
        seen, stopping = all_sum(torch.tensor([places, int(bool(interrupted))])).tolist()
        given = [inputs(*batch) for batch in batches]
        look_at(last)
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for i, ((tokens, sentence, _), (mask, concepts)) in enumerate(zip(batches, given)):
            concepts = blurred(concepts)
            sync = nullcontext() if not ddp or i == len(batches) - 1 else parallel.no_sync()
            with sync:
                with autocast:
                    part = parallel(tokens, sentence, concepts, mask) / max(seen, 1)
                (part * world_size).backward()  # DDP averages over ranks, and seen counts all of them
            parts.append(part.detach())
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        finite = lib.asked(norm.isfinite())
        # what is not finite by itself is to be told from what the norm would make so
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip or math.inf, norm.nan_to_num())
        optimizer.step()
        last = step, finite, parts
        step += 1

        seen_tokens, tokens_since = seen_tokens + seen, tokens_since + seen
        bar.update(1)
        if step % log_interval == 0 or step % eval_interval == 0 or step == max_iters:
            look_at(last)
            total = all_sum(torch.stack([torch.stack(parts).sum(), norm])).tolist()
            if not math.isfinite(total[0]):
                not_finite(step - 1, parts)
            if master:
                now = time.time()
                log({'step': step, 'tokens': seen_tokens, 'seconds': now - start, 'lr': lr_at(step - 1),
                     'loss': total[0], 'grad_norm': total[1] / world_size,
                     'tokens_per_s': tokens_since / (now - since)})
                bar.set_postfix_str(f'loss {total[0]:.3f}, {tokens_since / (now - since):,.0f} tokens/s')
                since, tokens_since = now, 0
    bar.close()
    upcoming.cancel()
    loader.shutdown()
    return (interrupted or signal.SIGTERM) if step < max_iters else 0


first_step, interrupted = step, 0
model.train()
try:
    if master and step and not os.path.exists(checkpoint_path):  # the best one was all there was
        save(os.path.basename(checkpoint_path))
    stopped = run()
except (OSError, Mistake) as error:  # a full disk; a sentence longer than block_size
    where = 'standard output' if isinstance(error, BrokenPipeError) else out_dir
    stop(f'cannot write to {where}: {error.strerror}' if getattr(error, 'strerror', '') else error)
if ddp:
    dist.barrier()  # a rank that ended while another still talked to it has been seen to abort
    dist.destroy_process_group()
if stopped:
    if master:
        print(f'stopped at step {step}, saved to {checkpoint_path}: the same command goes on')
    sys.exit(128 + stopped)
if master:
    print(f'{checkpoint_path} has {step} steps.'
          + ('' if encoder_path else f' Next: python evaluate.py --out_dir={out_dir}'))
