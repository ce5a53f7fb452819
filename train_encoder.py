"""Train encoder and predictor: from the sentences so far, the embedding of the next one.

    python train_encoder.py config/encoder_demo.py --learning_rate=5e-4 --out_dir=out/slower
    torchrun --nproc_per_node=8 train_encoder.py config/encoder_fineweb.py

The same command goes on from a run that was stopped. Writes to out_dir: encoder.pt (newest), encoder_best.pt
(highest validation skill), encoder_init.pt (step 0), metrics.csv, config.json.
"""

import math
import sys

import torch
from tqdm import tqdm

import model as lib
from config import UserError, override
from config.run import Run, all_sum, half_cosine
from prepare import Corpus

# ----------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/encoder_*.py) and --name=value
# in and out
data_dir = 'data/fineweb-edu'  # what prepare.py wrote
out_dir = 'out/fineweb'  # for the checkpoints, metrics.csv and config.json
init_from = 'scratch'  # or 'hf:<name or folder>': of transformers; 'resume': only where there is a checkpoint
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
log_interval = 10  # steps between lines in metrics.csv
eval_iters = 16  # validation batches an evaluation
# data: a step reads gradient_accumulation_steps * batch_size rows of block_size, over all ranks together
batch_size = 16  # rows in a micro-batch
block_size = 1024  # tokens in a row: whole sentences, of one or more documents
max_sentences = 0  # sentences in a row at most; 0: twice what the mean row has
gradient_accumulation_steps = 1  # micro-batches a step, shared among the ranks
# model
n_layer = 12
n_head = 12
n_embd = 768  # width of states and concepts
predictor_layer = 4
fade = 0.4  # initial weight in the predictor's attention per sentence of distance: exp(-fade)
dropout = 0.0
freeze_encoder = False  # True: only the predictor learns; runs of an epoch or more keep concepts in data_dir
pooling = 'sif'  # a sentence's mean weighs rare tokens more; 'mean': all alike
start_passes = 4  # over the text, to start token embeddings from (model.neighbour_embeddings); 0: random ones
start_tokens = 20_000_000  # read in each at most
context = 'concepts'  # the predictor's input: sentences encoded alone, or 'tokens': each with all before it
# objective: see tests/ablate.py for what each of these does
loss = 'cosine'  # or 'mse', 'infonce'
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
# optimizer: AdamW
learning_rate = 6e-4
embedding_lr_scale = 10.0  # multiplies the learning rate of token embeddings from scratch
predictor_lr_scale = 0.3  # and the predictor's: at 1 retrieval gets worse
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
settings = override(
    globals(),
    positive=('eval_interval', 'log_interval', 'eval_iters', 'batch_size', 'block_size', 'n_head', 'n_embd',
              'gradient_accumulation_steps', 'predictor_layer', 'whiten_interval', 'max_iters'),
    shares=('dropout', 'beta1', 'beta2', 'whiten_rate'),
    choices={'pooling': ('sif', 'mean'), 'context': ('concepts', 'tokens'),
             'loss': ('cosine', 'mse', 'infonce'), 'target': ('ema', 'stopgrad', 'shared'),
             'reg': ('none', 'vicreg', 'sigreg'), 'dtype': ('auto', 'float32', 'bfloat16'),
             'compile': ('auto', True, False)})

# ----------------------------------------------------------------------------------------------------
# Setup: ranks, device, data

# loss is the objective's, regulariser included; val_loss is always 1 - cos, so that runs compare
MEASURES = ['train_skill', 'val_loss', 'val_skill', 'val_copy_skill', 'val_window_skill', 'val_cos_unrelated',
            'val_rank']
if target == 'shared' and context != 'concepts':
    raise UserError('--target=shared needs --context=concepts: one view for both sides')
if freeze_encoder and (reg != 'none' or target == 'shared'):
    raise UserError('--freeze_encoder=True leaves --reg and --target=shared nothing to teach')
run = Run(settings, 'encoder', ['ema', *MEASURES], 'encoder')
train_data, val_data = Corpus(data_dir, 'train'), Corpus(data_dir, 'val')
for corpus in (train_data, val_data):
    if corpus.n_sentences == corpus.n_documents:
        raise UserError(f'the documents of {data_dir} have one sentence each, and no next one to predict: '
                        'where they span lines, prepare them with --doc_separator')
if max_sentences == 1:
    raise UserError('--max_sentences=1: a row of one sentence has no next one, expected 2 or more, or 0')
run.read(train_data, val_data)

# ----------------------------------------------------------------------------------------------------
# Model: from scratch, from a pretrained one, or the checkpoint of a run that was stopped

tokenizer = train_data.meta['tokenizer']
shape = {k: settings[k] for k in ('n_layer', 'n_head', 'n_embd', 'predictor_layer', 'context')}
config = shape | {'vocab_size': tokenizer['n_vocab'], 'dropout': dropout, 'fade': fade}
fixed = shape | {'freeze_encoder': freeze_encoder, 'pooling': pooling, 'whiten': whiten,
                 'tokenizer': tokenizer['sha256']}
if init_from != 'resume':
    fixed |= {'backbone': init_from.removeprefix('scratch')}
state, weights = run.resume(fixed), None
if state:
    config = state['config'] | {'dropout': dropout}
elif init_from.startswith('hf:'):
    found, weights = lib.pretrained(init_from[3:], tokenizer)
    config |= found  # n_layer, n_head and n_embd are the pretrained model's
elif init_from != 'scratch':
    raise UserError(f"--init_from={init_from}: expected 'scratch', 'resume' or 'hf:<name or folder>'")
torch.manual_seed(seed)
model = lib.JEPA(lib.JEPAConfig(**config))
model.objective = lib.Objective(loss, target, reg, reg_weight, freeze_encoder)
model.encoder.requires_grad_(not freeze_encoder)
model.whitening.rate, model.whitening.floor = whiten_rate, whiten_floor
n_embd = model.config.n_embd
if weights:
    model.encoder.net.load_state_dict(weights)
    model.update_target(0.0)
if state:
    model.load_state_dict(state['model'])
elif pooling == 'sif':
    model.token_weight.copy_(lib.sif_weights(torch.from_numpy(train_data.token_counts())))
model.to(run.device)
groups = lib.optimizer_groups(model, 1.0 if model.config.hf else embedding_lr_scale, predictor_lr_scale)
forward = run.build(model, groups, state, tokenizer=tokenizer)
targets = run.compiled(model.targets)
attention = 'mask' if model.config.hf else lib.attention_path(run.device_type, run.compile)
del state, weights

# ----------------------------------------------------------------------------------------------------
# The start: token embeddings from the sentences around them, and the whitened space, before the first step

def first_batches():
    """This rank's batches of the first steps: one pass over start_tokens, or all there are."""
    n = math.ceil(min(start_tokens / run.positions, run.steps_per_epoch))
    for i in tqdm(range(max(n, 1)), 'start', leave=False, disable=run.rank > 0 or not sys.stderr.isatty()):
        yield from map(run.to_device, run.micro_batches(i))

@torch.no_grad()
def sentence_means(tokens, sentence, document, kept=None, own=None):
    """The target's sentence means (B, S, D), or those kept, and which of them are sentences (B, S)."""
    if kept is not None:
        return kept, document >= 0
    own = model.masks(sentence, document, attention)[0] if own is None else own
    with run.autocast:
        return targets(tokens, sentence, document, own), document >= 0

if not run.step and start_passes and not model.config.hf:
    n_start = min(start_tokens, train_data.n_tokens)
    run.say(f'token embeddings start from {start_passes} passes over {n_start / 1e6:.1f}M tokens')
    table = lib.neighbour_embeddings(first_batches, model.token_weight, n_embd, start_passes)
    model.encoder.embedding.weight.data.copy_(table)
    model.update_target(0.0)
if freeze_encoder:
    for corpus in (train_data, val_data):
        encoder = lib.SentenceEncoder(model, corpus.tokenizer, run.device, run.dtype)
        encoder.keep_means(corpus, compute=max_iters >= run.steps_per_epoch)  # else most would not be read
if not run.step and whiten:
    model.whitening.fit(sentence_means(*batch) for batch in first_batches())

# ----------------------------------------------------------------------------------------------------
# Evaluation: what tells learning from collapse

@torch.no_grad()
def neighbours(corpus, n):
    """Of the pairs in n batches: predictions, true next, last, and mean of the last 8 concepts (pairs, D);
    document (pairs,)."""
    parts = []
    for tokens, sentence, document, *kept in run.validation_batches(corpus, n):
        z = sentence_means(tokens, sentence, document, *kept)[0]
        with run.autocast:
            p, z = model.expected(tokens, sentence, document, z), model.whitening(z)
        place = torch.arange(document.shape[1], device=z.device)
        window = lib.build_mask(document, causal=True)[:, 0] & (place > place[:, None] - 8)  # (B, S, S)
        means = window.float() @ z / window.sum(-1, keepdim=True)
        row, i = lib.pairs(document).nonzero(as_tuple=True)
        parts.append((p[row, i + 1], z[row, i + 1], z[row, i], means[row, i], document[row, i]))
    return map(torch.cat, zip(*parts))

def evaluate():
    """Validation measures, the same on all ranks; also fits model.prediction_scale."""
    model.eval()
    p, z, last, window, _ = neighbours(train_data, max(run.eval_iters // 2, 1))
    mean, (scale, *scales) = z.mean(0), [lib.fit_scale(x, z) for x in (p, last, window)]
    model.prediction_scale.copy_(all_sum(scale) / run.world_size)
    train_skill = lib.skill(model.prediction_scale * p, z, mean)
    p, z, last, window, document = neighbours(val_data, run.eval_iters)
    copy_skill, window_skill = (lib.skill(a * x, z, mean) for a, x in zip(scales, (last, window)))
    half, cosine = len(z) // 2, (lib.unit(p) * z).sum(1)
    unrelated = (lib.unit(p) * z.roll(half, 0)).sum(1)[document != document.roll(half)]
    values = torch.tensor([  # in the order of MEASURES
        train_skill, 1 - cosine.mean(), lib.skill(model.prediction_scale * p, z, mean), copy_skill,
        window_skill, unrelated.sum() / max(len(unrelated), 1), lib.rank_me(z - z.mean(0))],
        dtype=torch.float64, device=run.device)
    model.train()
    return dict(zip(MEASURES, (all_sum(values) / run.world_size).tolist()))

def describe(v):
    """The measures of an evaluation, and signs of collapse, as one line."""
    signs = {f"predictions point at unrelated sentences too (cosine {v['val_cos_unrelated']:.2f})":
             v['val_cos_unrelated'] > 0.5,
             f"concepts fill {v['val_rank']:.0f} of {n_embd} dimensions":
             v['val_rank'] < 0.1 * min(n_embd, val_data.n_sentences),
             'predictions are no better than the mean concept': v['val_skill'] <= 0 < run.step - warmup_iters}
    seen = ' and '.join(sign for sign, there in signs.items() if there)
    return ('loss {val_loss:.3f} | skill {val_skill:.3f} (copy {val_copy_skill:.3f}, window mean '
            '{val_window_skill:.3f}) | rank {val_rank:.0f}'
            .format(**v) + f'/{n_embd}' + (f' | this looks like collapse: {seen}' if seen else ''))

# ----------------------------------------------------------------------------------------------------
# Loop

run.begin()
model.train()
while True:
    if run.evaluates():
        values = evaluate()
        run.record(values, values['val_skill'], describe(values))
    if run.step >= max_iters or run.stopping:
        break
    batches, moments = run.next_batches(), 0
    _, n_pairs = run.count(sum(int((sentence >= 0).sum()) for _, sentence, *_ in batches),
                           sum(int(lib.pairs(document).sum()) for _, _, document, *_ in batches))
    if dropout or reg == 'sigreg':
        torch.manual_seed(hash((seed, run.step)))  # no generator state to save

    # forward and backward
    for tokens, sentence, document, *kept in run.on_device(batches):
        own, mask = (None, None) if kept and context == 'concepts' else \
            model.masks(sentence, document, attention)
        z, used = sentence_means(tokens, sentence, document, *kept, own=own)
        concepts = model.whitening(z, used if whiten else None)
        with run.autocast:
            loss_sum = forward(tokens, sentence, document, z, concepts, mask)
        run.backward(loss_sum / max(n_pairs, 1))
        if whiten and not freeze_encoder:
            moments = moments + model.whitening.moments(z, used)

    # clipping, optimizer, whitening, moving average
    run.update()
    if whiten and not freeze_encoder:
        model.whitening.update(all_sum(moments))
        if (run.step + 1) % whiten_interval == 0:
            model.whitening.refresh()
    ema = half_cosine(run.step, max_iters, ema_start, ema_end) if target == 'ema' else 0.0
    model.update_target(ema)
    run.log_step(ema=ema)
run.end(f'Next: python train_decoder.py config/decoder_<of its size>.py --out_dir={out_dir}')
