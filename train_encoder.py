"""Train encoder and predictor: from the sentences so far, the embedding of the next one.

    python train_encoder.py config/encoder_demo.py --learning_rate=5e-4 --out_dir=out/slower
    torchrun --nproc_per_node=8 train_encoder.py config/encoder_fineweb.py
    python train_encoder.py config/encoder_demo.py --max_iters=900 --init_from=resume     the same command needs no flag

Writes to out_dir: encoder.pt (newest), encoder_best.pt (highest validation MRR), metrics.csv, config.json.
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as lib
from config import override
from prepare import Corpus, Mistake, hold, write_json

# ---------------------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/encoder_*.py) and --name=value
# in and out
data_dir = 'data/fineweb-edu'  # what prepare.py wrote
out_dir = 'out/fineweb'  # for the checkpoints, metrics.csv and config.json
init_from = 'scratch'  # or 'hf:<name or folder>': of transformers; 'resume': with other settings than before
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
log_interval = 10  # steps between lines in metrics.csv
eval_iters = 16  # validation batches an evaluation
wandb_log = False  # needs `pip install wandb`
wandb_project = 'lang-jepa'
wandb_run_name = 'encoder'
# data: a step reads gradient_accumulation_steps * batch_size rows of block_size tokens, over all ranks together
batch_size = 16  # rows in a micro-batch
block_size = 1024  # tokens in a row: whole sentences, of one or more documents
max_sentences = 0  # sentences in a row at most; 0: block_size / 8
gradient_accumulation_steps = 1  # micro-batches a step, shared among the ranks
# model
n_layer = 12
n_head = 12
n_embd = 768  # width of states and concepts
predictor_layer = 4
fade = 0.4  # a sentence counts exp(-fade) times as much to the predictor as the one after it, at first
hypotheses = 1  # concepts predicted for the next sentence; the best of several learns, their weighted mean is used
dropout = 0.0
pooling = 'sif'  # a sentence's mean weighs rare tokens more; 'mean': all alike
start_passes = 4  # over the text, to start token embeddings from (model.neighbour_embeddings); 0: random ones
start_tokens = 20_000_000  # read in each at most
context = 'concepts'  # the predictor's input: sentences encoded alone, or 'tokens': each with all before it
# objective: see tests/ablate.py for what each of these does
loss = 'cosine'  # or 'mse', 'smooth_l1', 'infonce'
target = 'ema'  # moving average of the encoder; 'stopgrad': the encoder as it is; 'shared': and with gradient
whiten = True  # predict in the whitened space; False: unit-norm sentence means
reg = 'none'  # or 'vicreg', 'sigreg', of the online sentence means (of a micro-batch, over all ranks)
reg_weight = 1.0
# target
ema_start = 0.99  # momentum, on a half cosine to ema_end
ema_end = 0.999
whiten_rate = 0.99  # how much of the running covariance is kept a step
whiten_floor = 0.01  # eigenvalues below this share of their mean are raised to it
whiten_interval = 10  # steps between recomputations of C^-1/2
# optimizer
optimizer = 'adamw'  # 'muon': the matrices by Muon, at the same rates; the rest by AdamW
learning_rate = 6e-4
embedding_lr_scale = 10.0  # token embeddings from scratch learn so many times as fast
predictor_lr_scale = 0.1  # the predictor, so many
max_iters = 100_000
weight_decay = 0.05  # on a half cosine to weight_decay_end
weight_decay_end = 0.05
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0: no clipping
decay_lr = True
warmup_iters = 1000
lr_decay_iters = 0  # 0: max_iters
min_lr = 0.0  # 0: a tenth of learning_rate
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1'; auto: cuda where there is one
dtype = 'auto'  # 'float32' or 'bfloat16' (autocast); auto: bfloat16 where the hardware multiplies it faster
compile = 'auto'  # True or False; auto: on CUDA
seed = 1337
settings = override(globals(), limits={
    **dict.fromkeys(('eval_interval', 'log_interval', 'eval_iters', 'batch_size', 'block_size', 'n_layer', 'n_head',
                     'n_embd', 'gradient_accumulation_steps', 'predictor_layer', 'whiten_interval', 'hypotheses'),
                    (1, math.inf)),
    **dict.fromkeys(('max_sentences', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'learning_rate', 'min_lr',
                     'weight_decay', 'weight_decay_end', 'grad_clip', 'reg_weight', 'fade', 'start_passes',
                     'start_tokens', 'embedding_lr_scale', 'predictor_lr_scale'), (0, math.inf)),
    **dict.fromkeys(('dropout', 'ema_start', 'ema_end', 'whiten_rate', 'whiten_floor'), (0, 1)),
    **dict.fromkeys(('beta1', 'beta2'), (0, 0.99999)), 'seed': (0, 2**32 - 1)})

# ---------------------------------------------------------------------------------------------------------------
# Setup: ranks, device, data


def stop(message):
    """End with one line on standard error and exit code 1."""
    raise SystemExit(f'train_encoder.py: {message}')


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
if max_sentences == 1:
    stop('--max_sentences=1: a row of one sentence holds no next one; expected 2 or more, or 0')
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
if pooling not in ('sif', 'mean'):
    stop(f"--pooling={pooling}: expected 'sif' or 'mean'")
if compile == 'auto':  # on a CPU what is not compiled is faster: tests/results/variants_cpu.csv
    compile = device_type == 'cuda'
if compile not in (True, False):
    stop(f"--compile={compile}: expected True, False or 'auto'")
if target == 'shared' and context != 'concepts':
    stop("--target=shared needs --context=concepts: one view for both sides")
if init_from not in ('scratch', 'resume') and not init_from.startswith('hf:'):
    stop(f"--init_from={init_from}: expected 'scratch', 'resume' or 'hf:<name or folder>'")
if optimizer not in ('adamw', 'muon'):
    stop(f"--optimizer={optimizer}: expected 'adamw' or 'muon'")
if dtype not in ('float32', 'bfloat16'):
    stop(f"--dtype={dtype}: expected 'float32', 'bfloat16' or 'auto'")
if gradient_accumulation_steps % world_size:
    stop(f'{world_size} ranks cannot share --gradient_accumulation_steps={gradient_accumulation_steps} evenly')
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
torch.set_float32_matmul_precision('high')  # on CUDA, products that are fp32 by their docstring run as TF32
max_sentences = max_sentences or block_size // 8
lr_decay_iters, min_lr = lr_decay_iters or max_iters, min_lr or learning_rate / 10

try:
    train_data, val_data = Corpus(data_dir, 'train'), Corpus(data_dir, 'val')
    val_rows = val_data.rows_per_epoch(block_size, max_sentences)
except (OSError, ValueError) as error:
    stop(error)
for corpus in (train_data, val_data):
    if corpus.n_sentences == corpus.n_documents:
        stop(f'every document of {data_dir} ({corpus.split}) is one sentence: there is no next one to predict. Where '
             'documents span lines, prepare them with --doc_separator')
rows = {'batch_size': batch_size, 'block_size': block_size, 'max_sentences': max_sentences}
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

architecture = {'vocab_size': train_data.meta['tokenizer']['n_vocab'], 'n_layer': n_layer, 'n_head': n_head,
                'n_embd': n_embd, 'predictor_layer': predictor_layer, 'dropout': dropout, 'context': context,
                'fade': fade, 'hypotheses': hypotheses}
checkpoint_path = os.path.join(out_dir, 'encoder.pt')
metrics_path = os.path.join(out_dir, 'metrics.csv')
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
weights = None
try:
    state = lib.checkpoint_to_resume(newest_path, 'encoder', settings, device)
    if state:
        if state['config']['hf']:
            architecture |= {k: state['config'][k] for k in ('hf', 'n_layer', 'n_head', 'n_embd')}
        if state['tokenizer']['sha256'] != train_data.tokenizer_spec['sha256']:
            stop(f'{newest_path} was trained on data of another tokenizer than {data_dir}')
        for name, value in (('pooling', pooling), ('optimizer', optimizer)):
            if state['settings'][name] != value:
                stop(f"{newest_path} was trained with {name}='{state['settings'][name]}': set it back")
        was = asdict(lib.JEPAConfig(**state['config']))  # entries that came later have their defaults
        for name, value in architecture.items():
            if was[name] != value and name != 'dropout':
                stop(f'{newest_path} was trained with {name}={was[name]}, not {value}: '
                     f'set it back, or train from scratch in another --out_dir')
    elif init_from.startswith('hf:'):  # n_layer, n_head and n_embd are the pretrained model's
        found, weights = lib.pretrained(init_from[3:], train_data.meta['tokenizer'])
        architecture |= found
        if master:
            print(f"{init_from} has {', '.join(f'{k}={found[k]}' for k in ('n_layer', 'n_head', 'n_embd'))} of its own")
    torch.manual_seed(seed)
    model = lib.JEPA(lib.JEPAConfig(**architecture))
    model.objective = lib.Objective(loss, target, reg, reg_weight)
except (OSError, ValueError, ImportError) as error:
    stop(str(error).splitlines()[0])
n_embd = model.config.n_embd
if weights:
    model.encoder.net.load_state_dict(weights)
    model.target.net.load_state_dict(weights)
model.whitening.rate, model.whitening.floor = whiten_rate, whiten_floor
if not state and pooling == 'sif':
    model.token_weight.copy_(lib.sif_weights(torch.from_numpy(train_data.token_counts())))
model.to(device)
groups = lib.optimizer_groups(model, weight_decay, 1.0 if model.config.hf else embedding_lr_scale, predictor_lr_scale)
by_adamw = [g for g in groups if optimizer == 'adamw' or not g['decays']]  # what decays is a matrix
by_muon = [g for g in groups if optimizer == 'muon' and g['decays']]
optimizers = [torch.optim.AdamW(by_adamw, lr=learning_rate, betas=(beta1, beta2), fused=True)]
if by_muon:
    optimizers.append(torch.optim.Muon(by_muon, lr=learning_rate, adjust_lr_fn='match_rms_adamw'))
step, best_mrr, metrics_bytes, seen_tokens, skipped = 0, -1.0, 0, 0, 0
if state:
    if master:
        print(f"going on from step {state['step']} of {newest_path}", flush=True)
        for name in sorted(settings.keys() & state['settings'].keys()):
            if settings[name] != state['settings'][name]:
                print(f'resume: {name} is now {settings[name]!r}, was {state["settings"][name]!r}')
    model.load_state_dict(state['model'])
    for o, saved in zip(optimizers, state['optimizers']):  # settings of now, moments of then
        scales = [g['scale'] for g in o.param_groups]
        o.load_state_dict(saved)
        for group, scale in zip(o.param_groups, scales):
            group.update({'scale': scale} | ({'betas': (beta1, beta2)} if 'betas' in group else {}))
    step, best_mrr = state['step'], state['best_mrr']
    metrics_bytes, seen_tokens = state['metrics_bytes'], state['seen_tokens']
    skipped = state.get('skipped', 0)  # earlier checkpoints do not count them
del state, weights  # memory for the run

if master:
    try:
        os.truncate(metrics_path, min(metrics_bytes, os.path.getsize(metrics_path)))  # lost steps write rows again
        write_json(os.path.join(out_dir, 'config.json'), settings)
    except OSError as error:
        stop(f'cannot write to {out_dir}: {error.strerror}')

attention = lib.attention_path(device_type, compile, bool(model.config.hf))
compiled = torch.compile(model) if compile else model
target_means = torch.compile(model.target_means) if compile else model.target_means
predict = torch.compile(model.predict) if compile else model.predict
parallel = DistributedDataParallel(compiled, forward_sync_buffers=False) if ddp else compiled


def masks(sentence, document):
    """(target's mask, context's mask)."""
    return model.masks(sentence, document, attention)


def measure(zs, arrays):
    """Take the moments of all ranks' sentence means into the running ones; returns the mean and number of these."""
    # which rows are sentences is worked out on the CPU: the GPU is not waited for
    at = [torch.from_numpy(np.flatnonzero(a['document'] >= 0)).to(device, non_blocking=True) for a in arrays]
    mean, cov, n = lib.moments(torch.cat([z.flatten(0, 1)[i] for z, i in zip(zs, at)]), all_sum)
    model.whitening.update(mean, cov)
    return mean, n


if master:
    n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f'{n_params / 1e6:.1f}M parameters, {train_data.n_tokens / 1e6:.1f}M tokens of training data, '
          f'{gradient_accumulation_steps * batch_size * block_size:,} tokens a step, {world_size} x {device}, {dtype}'
          f'{", compiled" if compile else ""}', flush=True)
if not step and start_passes and not model.config.hf:
    began, n_start = time.time(), min(start_tokens, train_data.n_tokens)
    if master:
        print(f'token embeddings start from {start_passes} passes over {n_start / 1e6:.1f}M tokens', flush=True)

    def first_steps():
        """This rank's batches of each of the first steps."""
        steps = range(math.ceil(n_start / (gradient_accumulation_steps * batch_size * block_size)))
        for i in tqdm(steps, 'start', leave=False, disable=not (master and sys.stderr.isatty())):
            yield [to_device(b) for b in micro_batches(i)]
    try:
        table = lib.neighbour_embeddings(first_steps, model.token_weight, n_embd, start_passes, reduce=all_sum)
    except Mistake as error:  # a sentence longer than block_size
        stop(error)
    model.encoder.embedding.weight.data.copy_(table)
    model.target.embedding.weight.data.copy_(table)
    del table
    if master:
        print(f'the start took {time.time() - began:.0f} s', flush=True)
if whiten and not model.whitening.steps:  # the space is whitened before the first step, on 50 sentences a dimension
    measured = 0
    while measured < 50 * n_embd and model.whitening.steps < 200:
        try:
            arrays = micro_batches(int(model.whitening.steps))
            batches = [to_device(b) for b in arrays]
        except Mistake as error:  # a sentence longer than block_size
            stop(error)
        with torch.no_grad(), autocast:
            zs = [target_means(t, s, d.shape[1], masks(s, d)[0]) for t, s, d in batches]
        measured += measure(zs, arrays)[1]
    model.whitening.refresh()

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
# Evaluation: what tells learning from collapse


@torch.no_grad()
def neighbours(corpus, n):
    """Of the pairs in n batches: predictions, true next and last concepts (pairs, D); documents, places in the row, and
    how many sentences were read (pairs,)."""
    parts = []
    for i in range(n):
        tokens, sentence, document = to_device(corpus.batch(i, **rows, rank=rank, world_size=world_size))
        own, context_mask = masks(sentence, document)
        with autocast:
            z = model.whitening(target_means(tokens, sentence, document.shape[1], own))
            p = model.predict_concepts(z, document) if context == 'concepts' else \
                predict(tokens, sentence, document, context_mask)
        row, place = lib.pairs(document).nonzero(as_tuple=True)
        key = (i * len(tokens) + row) * document.shape[1] + document[row, place]
        read = lib.place_in_sentence(document) + 1  # of a document, here
        parts.append((p[row, place], z[row, place + 1], z[row, place], key, place, read[row, place]))
    return [torch.cat(x) for x in zip(*parts)]


def reciprocal_ranks(p, z, document, place):
    """Reciprocal ranks of z[i] given p[i]: among the other documents' z, and among its own document's outside the
    window of the 8 sentences before; and chance of the latter. Each (n,), on at most 1,000 pairs spread evenly."""
    at = torch.linspace(0, len(p) - 1, min(len(p), 1000), device=p.device).long()
    similar, same = p[at] @ z.T, document[at, None] == document
    distance = place - place[at, None]
    inside = same & ((distance > 0) | (distance < -8))
    corpus_rr = 1 / lib.worst_ranks(similar, at, ~same).float()
    document_rr = 1 / lib.worst_ranks(similar, at, inside).float()
    harmonic = torch.arange(1, len(z) + 1, device=p.device, dtype=torch.float32).reciprocal().cumsum(0)
    m = 1 + inside.sum(1)
    return corpus_rr, document_rr, harmonic[m - 1] / m


def evaluate():
    """Validation measures as a dict of floats, the same on all ranks; 'copy' is copy-last, the baseline."""
    model.eval()
    p, z, last, _, _, read = neighbours(train_data, max(eval_iters // 2, 1))
    mean, copy_scale = z.mean(0), lib.fit_scale(last, z)
    model.prediction_scale.copy_(lib.fit_prediction_scale(p, z, read, all_sum))  # saved with the model
    p, z, last, document, place, read = neighbours(val_data, eval_iters)
    p = model.scaled(p, read)
    if all_sum((~(p.isfinite() & z.isfinite())).sum()):  # before a checkpoint is written
        stop(f'step {step}: predictions or concepts are not finite. Checkpoints are older and whole; try a lower '
             '--learning_rate')
    skill, p = lib.skill(p, z, mean, 1.0), lib.unit(p)
    rr, doc_rr, chance = reciprocal_ranks(p, z, document, place)
    copy_rr, doc_copy_rr, _ = reciprocal_ranks(last, z, document, place)
    other = torch.roll(torch.arange(len(z), device=z.device), len(z) // 2)
    unrelated = ((p * z[other]).sum(1))[document != document[other]]
    values = {
        'val_loss': (1 - (p * z).sum(1)).mean(), 'val_cos': (p * z).sum(1).mean(),
        'val_cos_unrelated': unrelated.mean() if len(unrelated) else torch.zeros(()),
        'val_skill': skill, 'val_copy_skill': lib.skill(last, z, mean, copy_scale),
        'val_rank': lib.rank_me(z - z.mean(0)), 'val_mrr': rr.mean(), 'val_copy_mrr': copy_rr.mean(),
        'val_doc_mrr': doc_rr.mean(), 'val_doc_copy_mrr': doc_copy_rr.mean(), 'val_doc_chance': chance.mean(),
    }
    total = all_sum(torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)) / world_size
    model.train()
    return dict(zip(values, total.tolist()))


def collapse_warning(v):
    """In words, what looks like collapse in the evaluation `v`; '' where nothing does."""
    signs = []
    if v['val_cos_unrelated'] > 0.5:
        signs.append(f"predictions point at unrelated sentences too (cosine {v['val_cos_unrelated']:.2f})")
    if v['val_rank'] < 0.1 * n_embd:
        signs.append(f"concepts fill {v['val_rank']:.0f} of {n_embd} dimensions")
    if v['val_skill'] <= 0 and step > warmup_iters:
        signs.append('predictions are no better than the mean concept')
    return ' and '.join(signs)


# ---------------------------------------------------------------------------------------------------------------
# Writing: metrics.csv, checkpoints

# loss is the objective's, regulariser included; val_loss is 1 - cos whatever that is, so that runs compare;
# skipped: steps so far in which no sentence had a next one
COLUMNS = ['step', 'tokens', 'seconds', 'lr', 'ema', 'loss', 'grad_norm', 'tokens_per_s', 'predictions_per_s',
           'val_loss', 'val_skill', 'val_copy_skill', 'val_cos', 'val_cos_unrelated', 'val_rank', 'val_mrr',
           'val_copy_mrr', 'val_doc_mrr', 'val_doc_copy_mrr', 'val_doc_chance', 'skipped']


def log(row):
    """Append a row to metrics.csv; cells that were not measured stay blank."""
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
        'kind': 'encoder', 'config': asdict(model.config), 'model': model.state_dict(),
        'optimizers': [o.state_dict() for o in optimizers], 'tokenizer': train_data.tokenizer_spec,
        'settings': settings, 'step': step, 'best_mrr': best_mrr, 'metrics_bytes': lib.settled(metrics_path),
        'seen_tokens': seen_tokens, 'skipped': skipped})


if master and wandb_log:
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
    global best_mrr
    left = f' | {minutes:.0f} min left' if step > first_step else ''
    tqdm.write(f'step {step}: loss {v["val_loss"]:.3f} | skill {v["val_skill"]:.3f} (copy {v["val_copy_skill"]:.3f}) | '
               f'cos {v["val_cos"]:.3f}, unrelated {v["val_cos_unrelated"]:.3f} | rank {v["val_rank"]:.0f}/{n_embd} | '
               f'MRR {v["val_mrr"]:.3f} (copy {v["val_copy_mrr"]:.3f}) | in document {v["val_doc_mrr"]:.3f} (copy '
               f'{v["val_doc_copy_mrr"]:.3f}, chance {v["val_doc_chance"]:.3f}){left}', file=sys.stdout)
    if collapse_warning(v):
        tqdm.write(f'  this looks like collapse: {collapse_warning(v)}', file=sys.stdout)
    if step == first_step == 0 or step > first_step:
        log({'step': step, 'tokens': seen_tokens, **v})
    if step > first_step:
        if v['val_mrr'] > best_mrr:
            best_mrr = v['val_mrr']
            save('encoder_best.pt')
        save('encoder.pt')


def run():
    """Train to max_iters; returns the signal that stopped it, or 0."""
    global step, seen_tokens, skipped
    loader = ThreadPoolExecutor(1)  # cuts the next batch while this one is computed
    upcoming = loader.submit(micro_batches, step)
    bar = tqdm(total=max_iters, initial=step, unit='step', disable=not (master and sys.stderr.isatty()))
    start = since = time.time()
    tokens_since = pairs_since = 0
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
        if dropout or reg == 'sigreg':
            torch.manual_seed(hash((seed, step, rank)))  # no generator state to save
        for group in (g for o in optimizers for g in o.param_groups):
            group['lr'] = lr_at(step) * group['scale']
            if group['decays']:
                group['weight_decay'] = lib.momentum_at(step, max_iters, weight_decay, weight_decay_end)

        # targets of all micro-batches first: they are centred and whitened together
        views = [masks(s, d) for _, s, d in batches]
        with torch.no_grad(), autocast:
            zs = [target_means(t, s, d.shape[1], own) for (t, s, d), (own, _) in zip(batches, views)]
        look_at(last)
        model.zero_grad(set_to_none=True)
        mean = measure(zs, arrays)[0] if whiten else None
        if whiten and step % whiten_interval == 0:
            if not model.whitening.cov.isfinite().all():  # the same on all ranks
                not_finite(step, [z.sum() for z in zs], "targets' sum")
            model.whitening.refresh()
        # counted on the CPU: the GPU is not waited for
        counts = [[int(lib.pairs(torch.from_numpy(b['document'])).sum()), (b['sentence'] >= 0).sum()] for b in arrays]
        n_pairs, seen, stopping = all_sum(torch.tensor([*map(sum, zip(*counts)), int(bool(interrupted))])).tolist()
        skipped += not n_pairs  # without a pair there is no gradient, and the optimizer leaves all as it is

        parts = [torch.zeros((), device=device)] * len(batches)
        for i, ((tokens, sentence, document), z, (_, context_mask)) in enumerate(zip(batches, zs, views)):
            if not n_pairs:
                break
            sync = nullcontext() if not ddp or i == len(batches) - 1 else parallel.no_sync()
            with sync:
                with autocast:
                    part = parallel(tokens, sentence, document, model.whitening(z, mean), context_mask) / n_pairs
                (part * world_size).backward()  # DDP averages over ranks, and n_pairs counts all of them
            parts[i] = part.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        finite = lib.asked(norm.isfinite())
        # what is not finite by itself is to be told from what the norm would make so
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip or math.inf, norm.nan_to_num())
        for o in optimizers:
            o.step()
        last = step, finite, parts
        ema = lib.momentum_at(step, max_iters, ema_start, ema_end) if target == 'ema' else 0.0
        model.update_target(ema)
        step += 1

        seen_tokens += seen
        tokens_since, pairs_since = tokens_since + seen, pairs_since + n_pairs
        bar.update(1)
        if step % log_interval == 0 or step % eval_interval == 0 or step == max_iters:
            look_at(last)
            total = all_sum(torch.stack([torch.stack(parts).sum(), norm.to(device)])).tolist()
            if not math.isfinite(total[0]):
                not_finite(step - 1, parts)
            if master:
                now = time.time()
                log({'step': step, 'tokens': seen_tokens, 'seconds': now - start, 'lr': lr_at(step - 1), 'ema': ema,
                     'loss': total[0], 'grad_norm': total[1] / world_size, 'tokens_per_s': tokens_since / (now - since),
                     'predictions_per_s': pairs_since / (now - since), 'skipped': skipped})
                bar.set_postfix_str(f'loss {total[0]:.3f}, {tokens_since / (now - since):,.0f} tokens/s')
                since, tokens_since, pairs_since = now, 0, 0
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
    print(f'{checkpoint_path} has {step} steps. Next: python train_decoder.py --out_dir={out_dir}, with a preset '
          '(config/decoder_*.py) of about its size')
