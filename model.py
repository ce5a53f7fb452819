"""LANG-JEPA's models: an encoder and a predictor that work on sentences, and a decoder that writes them back.

    h = encoder(tokens, context view)      c = mean of h over each sentence        p = predictor(c)
    z = mean of target(tokens, sentence view) over each sentence                   concept = normalize((z - mu) W)
    loss = 1 - cos(p[i], concept[i + 1])   for neighbours in one document

Letters in shapes: B rows, T tokens in a row, S sentences in a row, D the width of a concept, V the vocabulary.
A row comes from prepare.Corpus: `tokens` (B, T), `sentence` (B, T) the sentence of each token or -1 for padding,
`document` (B, S) the document of each sentence or -1 where the row has fewer.
"""

import copy
import errno
import inspect
import json
import math
import os
import shutil
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

FORMAT = 6  # of checkpoints
HEAD_CHUNK = 1024  # positions whose logits are held at once in training
READ = 9  # predictions are scaled by how many sentences were read: 1, 2, ... 8, more


# ---------------------------------------------------------------------------------------------------------------
# Masks: who sees whom. One definition each, read by FlexAttention and by scaled_dot_product_attention alike; and Spans,
# which says the same of views that keep to a sentence, for a CPU.

def sentence_view(sentence, document):
    """Each token sees its own sentence, both ways: nothing else can reach a target."""
    return lambda b, h, q, k: sentence[b, q] == sentence[b, k]


def document_of(sentence, document):
    """The document (B, T) of each token, -1 for padding, of sentence (B, T) and document (B, S)."""
    return torch.where(sentence < 0, -1, document.gather(1, sentence.clamp(min=0)))


def context_view(sentence, document):
    """Each token sees its own and all earlier sentences of its document."""
    doc = document_of(sentence, document)
    return lambda b, h, q, k: (doc[b, q] == doc[b, k]) & (sentence[b, k] <= sentence[b, q])


def causal_view(group):
    """Each position sees itself and what stands before it in its group (B, T): a sentence or a document."""
    return lambda b, h, q, k: (group[b, q] == group[b, k]) & (k <= q)


def build_mask(mod, shape, device, path='mask'):
    """The mask of `mod` for rows of `shape` (B, T): a BlockMask for 'flex', else a boolean tensor (B, 1, T, T)."""
    B, T = shape
    if path == 'flex':
        return _compiled_block_mask()(mod, B, None, T, T, device=device)
    b = torch.arange(B, device=device)[:, None, None]
    t = torch.arange(T, device=device)
    return mod(b, 0, t[None, :, None], t[None, None, :])[:, None]


class Spans:
    """In a mask's place: each position attends within its run of equal `group` (B, T), to all or causally.

    A row has some twenty sentences, so a mask over it is nearly all False, and a CPU computes all of it. Here runs of
    like length are padded to the same power of two and attend in a batch of their own: 2.7 times as fast, forward and
    backward, in rows of 512. Positions with group < 0 get zeros; some must have another.
    """

    def __init__(self, group, causal=False):
        B, T = group.shape
        self.causal = causal
        row = torch.arange(B, device=group.device)[:, None]
        value, length = torch.unique_consecutive(torch.where(group < 0, -1, group + row * (T + 1)), return_counts=True)
        start = (length.cumsum(0) - length)[value >= 0]
        length = length[value >= 0]
        width = (2 ** length.clamp(min=16).log2().ceil().long()).clamp(max=T)
        slots, self.inside = [], []  # position of each slot; per width, which slots (n, width) are not padding
        for w in width.unique().tolist():
            at = torch.arange(w, device=group.device)
            inside = at < length[width == w][:, None]
            slots.append((start[width == w][:, None] + at * inside).flatten())
            self.inside.append(inside)
        slot, used = torch.cat(slots), torch.cat([i.flatten() for i in self.inside])
        position = torch.zeros(B * T, dtype=torch.long, device=group.device)  # slot of each position
        position[slot[used]] = used.nonzero()[:, 0]
        self.to_slots, self.to_positions = (slot, used[:, None]), (position, (group >= 0).flatten()[:, None])

    def attend(self, qkv, rope, n_head):
        """Attention output (B, T, D) of queries, keys and values qkv (B, T, 3 D)."""
        B, T = qkv.shape[:2]
        x = Rearrange.apply(qkv.flatten(0, 1), *self.to_slots, *self.to_positions)
        out = []
        for inside, part in zip(self.inside, x.split([i.numel() for i in self.inside])):
            n, w = inside.shape
            q, k, v = part.view(n, w, 3, n_head, -1).permute(2, 0, 3, 1, 4)
            q, k = (rotate(x, rope[0][:w], rope[1][:w]).flatten(0, 1) for x in (q, k))  # places within the run
            seen = torch.ones(w, w, dtype=torch.bool, device=q.device).tril() if self.causal else inside[:, None, None]
            score = (q @ k.transpose(1, 2)).float().view(n, n_head, w, w) * q.shape[-1] ** -0.5
            share = score.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
            out.append((share @ v).transpose(1, 2).reshape(n * w, -1))
        return Rearrange.apply(torch.cat(out), *self.to_positions, *self.to_slots).view(B, T, -1)


class Rearrange(torch.autograd.Function):
    """Rows of x by index, zero where not `ok`; (back, back_ok) undoes it, so that the gradient is a gather as well."""

    @staticmethod
    def forward(ctx, x, index, ok, back, back_ok):
        ctx.save_for_backward(back, back_ok)
        return x.index_select(0, index).masked_fill_(~ok, 0)

    @staticmethod
    def backward(ctx, gradient):
        back, ok = ctx.saved_tensors
        return gradient.index_select(0, back).masked_fill_(~ok, 0), None, None, None, None


def pick_device(name):
    """The device of the setting `device`; auto: cuda where there is one. Raises ValueError for what is not there."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        kind = torch.device(name).type
    except (RuntimeError, TypeError):
        raise ValueError(f"--device={name}: expected 'auto', 'cpu', 'cuda' or 'cuda:1'") from None
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device={name}: this machine, or this build of torch, has no CUDA')
    return name


def attention_path(device, compiled, hf=False):
    """How masks are best built: 'flex' on CUDA, compiled; 'spans' on CPU, not compiled; or 'mask'.

    FlexAttention has no backward on CPU, spans have no fixed shape, and models of transformers take a mask.
    """
    if hf:
        return 'mask'
    return 'flex' if device == 'cuda' and compiled else 'spans' if device == 'cpu' and not compiled else 'mask'


_block_mask = None


def _compiled_block_mask():
    global _block_mask
    if _block_mask is None:
        _block_mask = torch.compile(create_block_mask)
    return _block_mask


# ---------------------------------------------------------------------------------------------------------------
# Transformer: pre-norm, rotary positions, RMSNorm, no biases. Encoder, predictor and decoder are all made of it.

def rotary(positions, dim, base=10_000.0):
    """Cosines and sines (len(positions), dim / 2) of rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""
    rate = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * rate
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the halves of each head of x (B, H, T, dim) by the angles of its positions; computed in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Attention and a feed-forward layer of 4 D with GELU, each on a normalised copy of the residual stream."""

    def __init__(self, dim, n_head, dropout, n_layer):
        super().__init__()
        if dim % n_head or (dim // n_head) % 2:
            raise ValueError(f'n_embd={dim} must be an even multiple of n_head={n_head}')
        self.n_head, self.dropout = n_head, dropout
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        for layer in (self.qkv, self.up):
            nn.init.normal_(layer.weight, std=dim ** -0.5)
        nn.init.normal_(self.proj.weight, std=(2 * n_layer * dim) ** -0.5)  # the residual stream keeps its scale
        nn.init.normal_(self.down.weight, std=(2 * n_layer * 4 * dim) ** -0.5)

    def silence(self):
        """Let both branches end in zeros: the block starts as the identity."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, rope, mask, cache=None):
        """x (B, T, D); mask a BlockMask, Spans, boolean (B, 1, T, T) or None for all; cache (keys, values, length)."""
        qkv = self.qkv(self.norm1(x))
        y = mask.attend(qkv, rope, self.n_head) if isinstance(mask, Spans) else self.attend(qkv, rope, mask, cache)
        x = x + F.dropout(self.proj(y), self.dropout, self.training)
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(y, self.dropout, self.training)

    def attend(self, qkv, rope, mask, cache):
        """Attention output (B, T, D) of queries, keys and values qkv (B, T, 3 D)."""
        B, T, D = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            keys, values, length = cache
            keys[:, :, length:length + T], values[:, :, length:length + T] = k, v
            k, v = keys[:, :, :length + T], values[:, :, :length + T]
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(B, T, D // 3)


class Encoder(nn.Module):
    """Tokens to states; what a token sees is the mask's affair, so both views share these weights.

    The branches of its blocks end in zeros at first: it starts as the embeddings, whose start means something
    (neighbour_embeddings), and random branches would only blur them.
    """

    def __init__(self, vocab_size, n_layer, n_head, n_embd, dropout=0.0):
        super().__init__()
        self.head_dim = n_embd // n_head
        self.embedding = nn.Embedding(vocab_size, n_embd)  # unit scale: smaller ones are swamped by their common mode
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, n_layer) for _ in range(n_layer))
        for block in self.blocks:
            block.silence()
        self.norm = nn.RMSNorm(n_embd, eps=1e-6)

    def forward(self, tokens, mask):
        """tokens (B, T), mask as in Block -> states (B, T, D)."""
        rope = rotary(torch.arange(tokens.shape[1], device=tokens.device), self.head_dim)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.norm(x)


class HFEncoder(nn.Module):
    """A model of `transformers` in Encoder's place, from its configuration as json: same call, its own positions.

    Models trained to fill in words see both ways, as Encoder does; those trained to go on see only what came before.
    Raises ImportError without transformers, ValueError for a model that cannot be used.
    """

    def __init__(self, config, dropout=0.0):
        super().__init__()
        import transformers  # optional: pip install transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
        config = json.loads(config)
        config = transformers.AutoConfig.for_model(config.pop('model_type'), **config)
        config.use_cache = False
        for name in vars(config):
            if name.endswith(('dropout', 'dropout_prob', '_pdrop')):
                setattr(config, name, dropout)
        layers = set(getattr(config, 'layer_types', None) or ['full_attention'])
        self.net = transformers.AutoModel.from_config(config, attn_implementation='sdpa')
        if 'position_ids' not in inspect.signature(self.net.forward).parameters or \
                layers - {'full_attention', 'sliding_attention'}:
            raise ValueError(f'a {config.model_type} model takes no positions or has layers that no mask reaches: it '
                             'cannot read packed sentences')
        if hasattr(self.net, 'pooler'):
            self.net.pooler = None  # of the first token; it would have no gradient
        self.causal = type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        self.window = config.sliding_window if 'sliding_attention' in layers else None
        table = getattr(getattr(self.net, 'embeddings', None), 'position_embeddings', None)
        padding = getattr(table, 'padding_idx', None)
        self.first_position = 0 if padding is None else padding + 1  # RoBERTa's count from there
        self.max_positions = config.max_position_embeddings - self.first_position

    @property
    def embedding(self):
        """The table of token embeddings."""
        return self.net.get_input_embeddings()

    def forward(self, tokens, mask):
        """tokens (B, T), mask boolean (B, 1, T, T) -> states (B, T, D).

        Positions count from the first token that one sees, of its sentence or its document; past the model's last
        they stay there.
        """
        T = tokens.shape[1]
        at = torch.arange(T, device=tokens.device)
        place = (at - mask[:, 0].byte().argmax(-1)).clamp(max=self.max_positions - 1) + self.first_position
        if self.causal:
            mask = mask & (at <= at[:, None])
        if self.window:
            reach = self.window - self.causal  # transformers counts the token itself in a causal window
            mask = {'full_attention': mask, 'sliding_attention': mask & ((at - at[:, None]).abs() <= reach)}
        return self.net(input_ids=tokens, attention_mask=mask, position_ids=place).last_hidden_state


def pretrained(name, tokenizer):
    """(entries of JEPAConfig, weights for HFEncoder.net) of the `transformers` model of that name or folder, in fp32.

    Raises ImportError without transformers, OSError where there is no such model, ValueError where the prepared data
    have another tokenizer (meta.json's entry `tokenizer`).
    """
    import transformers  # optional: pip install transformers
    net = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    config = net.config
    if not hasattr(config, 'vocab_size'):
        raise ValueError(f'hf:{name} is a {config.model_type} model: it does not read text alone')
    same = tokenizer['name'] == f'hf:{name}' or (config.model_type, tokenizer['name']) == ('gpt2', 'gpt2')
    if not same or tokenizer['n_vocab'] > config.vocab_size:
        raise ValueError(f"the data were prepared with '{tokenizer['name']}' ({tokenizer['n_vocab']:,} tokens), and "
                         f'hf:{name} knows {config.vocab_size:,} of its own: prepare them with --tokenizer=hf:{name}')
    entries = {'hf': config.to_json_string(use_diff=False), 'n_layer': config.num_hidden_layers,
               'n_head': config.num_attention_heads, 'n_embd': config.hidden_size}
    return entries, {k: v for k, v in net.state_dict().items() if not k.startswith('pooler.')}


def sif_weights(counts, a=1e-3):
    """Weights (V,) of tokens in a sentence's mean, of their counts (V,): a / (a + frequency), 1 on average over text.

    Smooth inverse frequency (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings"): without
    it, the words that every sentence has make up most of its mean.
    """
    frequency = counts.float() / counts.sum()
    weights = a / (a + frequency)
    return weights / (weights * frequency).sum()


def sentence_mean(h, weights, sentence, n_sentences):
    """Mean of the states h (B, T, D), each times its weight (B, T), over the tokens of each sentence -> fp32 (B, S, D).

    Zero where there is no such sentence.

    A matrix product, not scatter_add: that one adds in no fixed order on CUDA, and a resumed run would differ.
    """
    ids = torch.arange(n_sentences, device=h.device)
    member = (sentence[:, None, :] == ids[None, :, None]).float()  # (B, S, T)
    with torch.autocast(h.device.type, enabled=False):  # sums in fp32
        return ((member * weights[:, None]) @ h.float()) / member.sum(-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def neighbour_embeddings(steps, weight, dim, passes, own=0.3, reduce=lambda x: x):
    """Token embeddings (V, dim) to start from, of length sqrt(dim): each points to the sentences around its own.

    A sentence's mean of embeddings, times `weight` (V,), is whitened to a concept; a token's embedding becomes the sum
    of the concepts before and after the sentences it comes in, each over its sentence's length (without that, STS-B is
    a point lower), and a share `own` of a random vector of its own, which keeps words of one topic apart; and so again,
    `passes` times. It is where the loss would pull the embeddings in the end, were the encoder linear: orthogonal
    iteration towards the directions in which neighbouring sentences correlate (canonical correlation, Hotelling 1936,
    the words' covariance taken as diagonal, as in Dhillon et al. 2015, "Eigenwords"). A pass takes seconds where
    gradient steps take an hour to come as far.

    The space is whitened here whatever the objective is, with Whitening's own floor.

    `steps()` yields, for each training step, a list of this rank's batches as (tokens, sentence, document); `reduce`
    sums a tensor over all ranks.
    """
    random = unit(torch.randn(len(weight), dim, device=weight.device))
    table = random * dim ** 0.5

    def means(tokens, sentence, document):
        return sentence_mean(table[tokens], weight[tokens], sentence, document.shape[1])
    for _ in range(passes):
        whitening, measured = Whitening(dim).to(weight.device), 0
        for batches in steps():
            mean, cov, n = moments(torch.cat([means(*batch)[batch[2] >= 0] for batch in batches]), reduce)
            whitening.update(mean, cov)
            measured += n
            if measured > 50 * dim:
                break
        whitening.refresh()
        total = torch.zeros_like(table)
        for tokens, sentence, document in (batch for batches in steps() for batch in batches):
            z = whitening(means(tokens, sentence, document))  # (B, S, D)
            follows = pairs(document)[..., None]
            around = F.pad(z[:, :-1] * follows, (0, 0, 1, 0)) + F.pad(z[:, 1:] * follows, (0, 0, 0, 1))
            length = (sentence[:, None] == torch.arange(document.shape[1], device=sentence.device)[:, None]).sum(-1)
            around = around / length.clamp(min=1)[..., None]
            row, at = (sentence >= 0).nonzero(as_tuple=True)
            total.index_add_(0, tokens[row, at], around[row, sentence[row, at]])
        table = unit((1 - own) * unit(reduce(total)) + own * random) * dim ** 0.5
    return table


class Predictor(nn.Module):
    """Causal transformer over the sentences of a document: p[i] is the concept expected at i + 1.

    It starts as "the same again, and more of what went before": the branches of its blocks end in zeros, but for the
    first attention, which starts close to 8 times a mean of the concepts so far, the older the less: by exp(-fade) a
    sentence. The last sentence tells place, the mean tells topic. Attention scores fall with distance, by a slope that
    is learned for each head, the same in all blocks (ALiBi's, Press et al. 2022, arXiv:2108.12409, are fixed).
    """

    def __init__(self, n_layer, n_head, n_embd, dropout=0.0, fade=0.4):
        super().__init__()
        self.head_dim = n_embd // n_head
        self.slope = nn.Parameter(torch.full((n_head,), fade))
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, n_layer) for _ in range(n_layer))
        for block in self.blocks:
            block.silence()
        with torch.no_grad():
            for block in self.blocks[:1]:
                block.qkv.weight[:2 * n_embd] *= 0.1  # scores near 0: nearly equal attention
                block.qkv.weight[2 * n_embd:] = torch.eye(n_embd)
                block.proj.weight.copy_(8 * torch.eye(n_embd))

    def forward(self, c, document):
        """c (B, S, D) concepts scaled to length sqrt(D), document (B, S) -> predictions (B, S, D) of any length."""
        rope = rotary(torch.arange(c.shape[1], device=c.device), self.head_dim)
        mask = build_mask(causal_view(document), document.shape, c.device)
        at = torch.arange(c.shape[1], device=c.device)
        mask = torch.where(mask, -self.slope[:, None, None] * (at[:, None] - at), -torch.inf)  # (B, H, S, S)
        for block in self.blocks:
            c = block(c, rope, mask)
        return c


class Hypotheses(nn.Module):
    """k concepts in the place of one prediction, each a learned step from it, and how likely each is to be the best.

    Next sentences are many, and their mean may be none of them. Training follows the best of the k (best_of). The steps
    start at random, at 0.3 of the prediction's length, and sum to zero: at first the k lie evenly around it.
    """

    def __init__(self, n_embd, k):
        super().__init__()
        self.steps = nn.Linear(n_embd, k * n_embd)
        self.choice = nn.Linear(n_embd, k)
        start = 0.3 * n_embd ** -0.5 * torch.randn(k, n_embd, n_embd)
        with torch.no_grad():
            self.steps.weight.copy_((start - start.mean(0)).flatten(0, 1))
        for zero in (self.steps.bias, self.choice.weight, self.choice.bias):
            nn.init.zeros_(zero)

    def forward(self, p):
        """Predictions p (B, S, D) -> concepts (B, S, k, D), of p's length or so, and logits (B, S, k), in fp32."""
        size = p.norm(dim=-1, keepdim=True).clamp(min=1e-12) * p.shape[-1] ** -0.5
        x = p / size
        each = size[..., None] * (x[..., None, :] + self.steps(x).float().unflatten(-1, (-1, p.shape[-1])))
        return each, self.choice(x.detach()).float()  # to be told what is best should move nothing else


def best_of(losses, logits, counted, relaxed=0.05, balance=0.1):
    """Loss (B, S) of hypotheses' losses (B, S, k), of which the smallest counts; logits (B, S, k) learn which that is.

    Winner takes all, relaxed (Rupprecht et al. 2017, arXiv:1612.00197): a share `relaxed` of the weight is every
    hypothesis's, so that one that never wins still comes nearer. `balance` is the weight of log k less the entropy of
    how often each is the best, softly, over the pairs `counted` (B, S), of all ranks: none is to win all, or none.
    """
    k = losses.shape[-1]
    best = losses.argmin(-1)
    weight = (1 - relaxed) * F.one_hot(best, k) + relaxed / k
    counted = counted[..., None].float()
    n = over_ranks(counted.sum()).clamp(min=1)
    usual = over_ranks((losses.detach() * counted).sum()) / (n * k)
    soft = (-losses / (0.05 * usual).clamp(min=1e-6)).softmax(-1)  # a difference of a twentieth of the loss tells
    used = over_ranks((soft * counted).sum((0, 1))) / n
    uneven = math.log(k) + (used * used.clamp(min=1e-12).log()).sum()
    told = F.cross_entropy(logits.flatten(0, -2), best.flatten(), reduction='none').view_as(best)
    return (weight * losses).sum(-1) + told + balance * uneven


# ---------------------------------------------------------------------------------------------------------------
# The space of concepts

class Whitening(nn.Module):
    """Running mean and covariance of the target's sentence means, and W = C^-1/2: concept = normalize((z - mu) W).

    In a whitened space every direction has the same variance, so the mean direction, the easiest thing to predict,
    is gone, and a collapsed model predicts nothing. Eigenvalues are floored at `floor` of their mean.
    """

    def __init__(self, dim, rate=0.99, mean_rate=0.97, floor=0.01):
        super().__init__()
        self.rate, self.mean_rate, self.floor = rate, mean_rate, floor
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('cov', torch.eye(dim))
        self.register_buffer('W', torch.eye(dim))
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, mean, cov):
        """Move towards a batch's mean (D,) and covariance (D, D), the same on all ranks."""
        self.steps += 1
        share = 1.0 / self.steps.float()  # a plain average at first, until it would forget more slowly than told
        # the mean is followed more closely: one that lags, or is of few batches, leaves concepts a direction in common
        self.mean.lerp_(mean, share.clamp(min=1.0 - self.mean_rate))
        self.cov.lerp_(cov, share.clamp(min=1.0 - self.rate))

    @torch.no_grad()
    def refresh(self):
        """Recompute W from the covariance, in fp32."""
        value, vector = torch.linalg.eigh(self.cov.float())
        floor = (self.floor * value.mean()).clamp(min=1e-12)
        self.W.copy_((vector * value.clamp(min=floor).rsqrt()) @ vector.T)

    def forward(self, z, mean=None):
        """Sentence means z (..., D) -> unit-norm concepts (..., D), fp32; centred with `mean`, or the running one."""
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize((z.float() - (self.mean if mean is None else mean)) @ self.W, dim=-1, eps=1e-6)


def pairs(document):
    """Boolean (B, S - 1): sentence i + 1 follows sentence i in the same document, of document (B, S)."""
    return (document[:, :-1] == document[:, 1:]) & (document[:, 1:] >= 0)


@dataclass
class Objective:
    """What training minimises: one switch each, compared in tests/ablate.py. The whitening's switch is the script's."""
    loss: str = 'cosine'  # or 'mse', 'smooth_l1', 'infonce'
    target: str = 'ema'  # or 'stopgrad': the encoder as it is; 'shared': that, and the gradient flows into it too
    reg: str = 'none'  # or 'vicreg', 'sigreg': of the online encoder's sentence means
    reg_weight: float = 1.0

    def __post_init__(self):
        known = {'loss': ('cosine', 'mse', 'smooth_l1', 'infonce'), 'target': ('ema', 'stopgrad', 'shared'),
                 'reg': ('none', 'vicreg', 'sigreg')}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name}={getattr(self, name)}: expected one of {', '.join(values)}")


def distance(p, concepts, document, loss):
    """Loss (B, S - 1), fp32, of predictions p[i] and concepts[i + 1], both (B, S, D); document (B, S).

    mse and smooth_l1 are means over dimensions, concepts of length sqrt(D) as the predictor reads them, and a tenth of
    the prediction: it starts about ten times as long.
    """
    with torch.autocast(p.device.type, enabled=False):
        p, z = p[:, :-1].float(), concepts[:, 1:].float()
        if loss == 'cosine':
            return 1 - F.cosine_similarity(p, z, dim=-1)
        if loss == 'infonce':
            return infonce(p, concepts, document)
        f = F.mse_loss if loss == 'mse' else F.smooth_l1_loss
        return f(0.1 * p, z * z.shape[-1] ** 0.5, reduction='none').mean(-1)


def infonce(p, concepts, document, temperature=0.1):
    """Cross-entropy (B, S - 1) of telling concepts[i + 1] by p[i] from all others of the batch but sentence i.

    van den Oord et al. 2018 (arXiv:1807.03748); cosine similarity, over the temperature.
    """
    B, S, _ = concepts.shape
    logits = F.normalize(p, dim=-1).flatten(0, 1) @ concepts.float().flatten(0, 1).T / temperature  # (B (S - 1), B S)
    at = torch.arange(B * S, device=p.device).view(B, S)
    left_out = (document.flatten() < 0) | (at.flatten() == at[:, :-1].flatten()[:, None])
    logits = logits.masked_fill(left_out, -1e4)  # finite: where all are left out, the gradient is 0 and not NaN
    return F.cross_entropy(logits, at[:, 1:].flatten(), reduction='none').view(B, S - 1)


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks, whose gradient is summed too: a statistic of all ranks is every rank's."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient)
        return gradient


def over_ranks(x):
    """x summed over ranks, with gradient."""
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return SumOverRanks.apply(x) if many else x


def vicreg(x, counted):
    """Variance and covariance terms of VICReg (Bardes et al. 2022, arXiv:2105.04906) of the counted rows of x (N, D).

    The hinge that holds each dimension's standard deviation at 1 or more, and a 25th, the paper's share, of the squared
    covariances off the diagonal over D. Statistics are over all ranks.
    """
    counted = counted.float()[:, None]
    n = over_ranks(counted.sum())
    x = (x.float() - over_ranks((x * counted).sum(0)) / n) * counted
    cov = over_ranks(x.T @ x) / (n - 1).clamp(min=1)
    spread = F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean()
    return spread + (cov - cov.diagonal().diag()).square().sum() / len(cov) / 25


def sigreg(x, counted, directions=256, points=17, reach=5.0):
    """Sketched isotropic Gaussian regularisation (Balestriero & LeCun 2025, arXiv:2511.08544) of the rows of x (N, D).

    The Epps-Pulley statistic, which tells a sample from a standard Gaussian by its characteristic function, averaged
    over random directions: n times the integral over t of |mean exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by the
    trapezoid rule, n being the counted rows of all ranks, over which the means run. All ranks draw the same directions.
    """
    counted = counted.float()[:, None, None]
    n = over_ranks(counted.sum())
    a = torch.randn(x.shape[1], directions, device=x.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(a, 0)
    t = torch.linspace(-reach, reach, points, device=x.device)
    angle = (x.float() @ F.normalize(a, dim=0))[..., None] * t  # (N, directions, points)
    real, imaginary = (over_ranks((f(angle) * counted).sum(0)) / n for f in (torch.cos, torch.sin))
    gauss = torch.exp(-t.square() / 2)
    return n * torch.trapezoid(((real - gauss).square() + imaginary.square()) * gauss, t).mean()


@dataclass
class JEPAConfig:
    """Architecture of encoder and predictor; saved in the checkpoint."""
    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    predictor_layer: int = 2
    dropout: float = 0.0
    context: str = 'concepts'
    fade: float = 0.4  # of the predictor's attention at first, a sentence
    hypotheses: int = 1  # concepts that are predicted for a sentence
    hf: str = ''  # configuration, as json, of a transformers model in the encoder's place


class JEPA(nn.Module):
    """Encoder, its exponential moving average (the target), whitening and predictor."""

    def __init__(self, config: JEPAConfig):
        super().__init__()
        if config.context not in ('concepts', 'tokens'):
            raise ValueError(f"context='{config.context}': expected 'concepts' or 'tokens'")
        self.config = config
        if config.hf:
            self.encoder = HFEncoder(config.hf, config.dropout)
        else:
            self.encoder = Encoder(config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.dropout)
        self.predictor = Predictor(config.predictor_layer, config.n_head, config.n_embd, config.dropout, config.fade)
        self.hypotheses = Hypotheses(config.n_embd, config.hypotheses) if config.hypotheses > 1 else None
        self.target = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.whitening = Whitening(config.n_embd)
        self.objective = Objective()
        self.register_buffer('token_weight', torch.ones(config.vocab_size))  # in a sentence's mean: see sif_weights
        self.register_buffer('prediction_scale', torch.ones(READ))  # see fit_prediction_scale

    def train(self, mode=True):
        super().train(mode)
        self.target.eval()  # no dropout in the target
        return self

    def masks(self, sentence, document, path='mask'):
        """(target's mask, context's mask), built outside the compiled region; one object where they are the same."""
        own = Spans(sentence) if path == 'spans' else \
            build_mask(sentence_view(sentence, document), sentence.shape, sentence.device, path)
        if self.config.context == 'concepts':
            return own, own
        return own, build_mask(context_view(sentence, document), sentence.shape, sentence.device, path)

    @torch.no_grad()
    def target_means(self, tokens, sentence, n_sentences, mask):
        """Unwhitened targets z (B, S, D), fp32, no gradient."""
        return sentence_mean(self.target(tokens, mask), self.token_weight[tokens], sentence, n_sentences)

    def means(self, tokens, sentence, document, mask):
        """Means (B, S, D), fp32, over each sentence of the online encoder's states."""
        return sentence_mean(self.encoder(tokens, mask), self.token_weight[tokens], sentence, document.shape[1])

    def predict(self, tokens, sentence, document, mask):
        """Predictions (B, S, D), fp32, of any length, of the concept of sentence i + 1, from the online encoder."""
        return self.predict_concepts(self.whitening(self.means(tokens, sentence, document, mask)), document)

    def predict_concepts(self, concepts, document, each=False):
        """As predict, from unit-norm concepts (B, S, D): how a model of context='concepts' is used after training.

        Of several hypotheses it gives the mean, weighted by how likely each is and by its length, or `each` of them:
        (B, S, k, D).
        """
        p = self.predictor(concepts * concepts.shape[-1] ** 0.5, document).float()
        if not self.hypotheses:
            return p[:, :, None] if each else p
        found, logits = self.hypotheses(p)
        return found if each else (logits.softmax(-1)[..., None] * found).sum(-2)

    def scaled(self, p, read):
        """Predictions p (n, ..., D), each made of `read` (n,) sentences, at the length that says how sure they are."""
        return self.prediction_scale[read.clamp(max=READ) - 1].view(-1, *[1] * (p.dim() - 1)) * p

    def next_loss(self, context, concepts, document):
        """Loss (B, S - 1) of what is predicted from context (B, S, D), given what comes, concepts (B, S, D)."""
        kind, p = self.objective.loss, self.predictor(context * context.shape[-1] ** 0.5, document).float()
        if not self.hypotheses:
            return distance(p, concepts, document, kind)
        found, logits = self.hypotheses(p)
        losses = torch.stack([distance(q, concepts, document, kind) for q in found.unbind(2)], -1)
        return best_of(losses, logits[:, :-1], pairs(document))

    def forward(self, tokens, sentence, document, concepts, mask):
        """The objective's loss, 1 - cos(p[i], concept[i + 1]) where it is not another, summed over pairs; concepts
        (B, S, D) are the whitened targets.

        With context='concepts' the predictor learns from two inputs, half the loss each: the online encoder's states,
        through which the encoder learns, and the targets' own concepts, which it reads after training. The online
        encoder runs ahead of its average: a predictor that had seen only its states retrieved less.
        """
        goal = self.objective
        means = self.means(tokens, sentence, document, mask)
        own = self.whitening(means)
        if goal.target == 'shared':
            concepts = own
        loss = self.next_loss(own, concepts, document)
        if self.config.context == 'concepts' and goal.target != 'shared':
            loss = (loss + self.next_loss(concepts, concepts, document)) / 2
        follows = pairs(document)
        loss = (loss * follows).sum()
        if goal.reg != 'none':
            measure = vicreg if goal.reg == 'vicreg' else sigreg
            with torch.autocast(loss.device.type, enabled=False):
                weight = goal.reg_weight * follows.sum()  # the caller divides by the pairs of all ranks
                loss = loss + weight * measure(means.flatten(0, 1), document.flatten() >= 0)
        return loss

    def flops(self, n_tokens, n_sentences, n_seen):
        """Floating-point operations of a training step on so many tokens and sentences, padding not counted.

        n_seen: pairs of tokens of which one sees the other. A matrix is used by the online encoder forward and backward
        (6 a weight) and by the target forward (2); whitening, under 1 %, is left out.
        """
        config, passes = self.config, 2 if self.config.context == 'concepts' else 1
        predictor = matrix_weights(self.predictor) + (matrix_weights(self.hypotheses) if self.hypotheses else 0)
        return (8 * matrix_weights(self.encoder) * n_tokens + 16 * config.n_layer * config.n_embd * n_seen
                + 6 * passes * predictor * n_sentences)

    @torch.no_grad()
    def update_target(self, momentum):
        """target = momentum * target + (1 - momentum) * encoder, in fp32."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1.0 - momentum)


def moments(z, reduce=lambda x: x):
    """Mean (D,), covariance (D, D) and number of the rows of z (n, D); `reduce` sums a tensor over all ranks.

    With no row at all: zeros, and 1.
    """
    n = max(reduce(torch.tensor(len(z))).item(), 1)
    mean = reduce(z.sum(0)) / n
    centred = (z - mean).double()  # neither autocast nor TF32: small eigenvalues are divided by
    return mean, reduce(centred.T @ centred).float() / n, n


def matrix_weights(module):
    """Weights of the matrices of a module, without embeddings: what each token is multiplied with."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def momentum_at(step, total, start, end):
    """EMA momentum, weight decay and the like: from start to end on a half cosine over `total` steps."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def optimizer_groups(model, weight_decay, embedding_scale=1.0, predictor_scale=1.0):
    """Parameter groups for AdamW: matrices decay; embeddings, gains and lone vectors do not. Each one, once.

    A group's `scale` is what its learning rate is multiplied by: embeddings and the predictor have their own.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            role = 'embedding' if id(p) in tables else 'predictor' if name.startswith('predictor.') else 'other'
            groups.setdefault((role, p.dim() >= 2 and role != 'embedding'), []).append(p)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(map(len, groups.values())) == len(trainable), 'a parameter stands in no group or in two'
    scales = {'embedding': embedding_scale, 'predictor': predictor_scale, 'other': 1.0}
    return [{'params': part, 'weight_decay': weight_decay if decays else 0.0, 'decays': decays, 'scale': scales[role]}
            for (role, decays), part in groups.items()]


# ---------------------------------------------------------------------------------------------------------------
# Measures of a concept space that training prints too; evaluate.py has all the others.

def unit(x):
    """x (..., D) in fp32 at length 1; a zero vector stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def fit_scale(p, z):
    """The scalar a that minimises sum |a p - z|^2 over rows of p, z (n, D), tensors or arrays.

    Fitted on train pairs, used on validation.
    """
    return (p * z).sum() / ((p * p).sum() + 1e-12)


def fit_prediction_scale(p, z, read, reduce=lambda x: x):
    """What predictions p (n, D) are multiplied with, so that their lengths say how sure they are: (READ,).

    z (n, D) is what came, read (n,) how many sentences each was made of. A mean of few is longer than one of many, and
    no surer: predictions are divided by the mean length of those made of as many, and all then multiplied with the
    scalar that brings them nearest to z. `reduce` sums a tensor over all ranks.
    """
    made_of = F.one_hot(read.clamp(max=READ) - 1, READ).float()
    length = p.norm(dim=-1)
    total, n = reduce(torch.stack((length @ made_of, made_of.sum(0))))
    mean = torch.where(n > 0, total / n.clamp(min=1), total.sum() / n.sum().clamp(min=1)).clamp(min=1e-12)
    q = p / (made_of @ mean)[:, None]
    along, square = reduce(torch.stack(((q * z).sum(), q.square().sum())))
    return (along / square.clamp(min=1e-12)).clamp(min=1e-6) / mean  # never turned round


def skill(p, z, mean, scale):
    """1 - sum |scale p - z|^2 / sum |mean - z|^2 for p and unit-norm z (n, D) and the train targets' mean (D,).

    Above 0: better than always predicting the mean. A constant predictor, or a collapsed space, gets 0 or less.
    """
    error = (scale * p - z).square().sum()
    base = (mean - z).square().sum()
    return (1 - error / base).item() if base > 1e-9 * len(z) else 0.0  # no variance to explain: nothing explained


def worst_ranks(similar, true, allowed):
    """Ranks (n,) from 1 of column true[i] among the allowed columns of similar (n, m); ties take the worst rank.

    `allowed` is boolean (n, m). The tolerance covers what one matrix product rounds differently from column to column.
    """
    own = similar.gather(1, true[:, None])
    beats = (similar >= own - 1e-6) & allowed
    beats.scatter_(1, true[:, None], False)
    return 1 + beats.sum(1)


def rank_me(x):
    """RankMe (Garrido et al. 2023, arXiv:2210.02885) of x (n, D): exp of the entropy of the singular values."""
    s = torch.linalg.svdvals(x.float())
    if s.sum() <= 1e-6:
        return 1.0
    p = s / s.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()


# ---------------------------------------------------------------------------------------------------------------
# The decoder: a causal transformer writes the sentence after a few prefix positions made of the concept. What is left
# of the concept once the words written so far are taken from it also goes straight to the logits.

@dataclass
class DecoderConfig:
    """Architecture of the decoder; saved in the checkpoint."""
    vocab_size: int
    concept_dim: int
    eos: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    n_prefix: int = 2
    dropout: float = 0.0


def place_in_sentence(sentence):
    """Place (B, T), from 0, of each position in its sentence, of sentence (B, T)."""
    place = torch.arange(sentence.shape[1], device=sentence.device).expand_as(sentence)
    first = F.pad(sentence[:, 1:] != sentence[:, :-1], (1, 0), value=True)
    return place - torch.where(first, place, 0).cummax(1).values


class RunningSum(torch.autograd.Function):
    """Sum of x (B, T, D) over each run from its first position on; first, last (B, T): of each position's run.

    The gradient is a gather too: what autograd would do adds in no fixed order on CUDA, and a resumed run would differ.
    """

    @staticmethod
    def forward(ctx, x, first, last):
        ctx.save_for_backward(last)
        return RunningSum.sum(x, first)

    @staticmethod
    def backward(ctx, gradient):
        last, = ctx.saved_tensors
        return RunningSum.sum(gradient.flip(1), last.shape[1] - 1 - last.flip(1)).flip(1), None, None

    @staticmethod
    def sum(x, first):
        index = first[..., None].expand_as(x)
        total = x.cumsum(1)
        return total - total.gather(1, index) + x.gather(1, index)


class HeadCrossEntropy(torch.autograd.Function):
    """Sum of counted (N,) times the cross-entropy in nats of target (N,) given what the head (V, D) reads, x (N, D).

    A chunk of positions at a time, and with `learn` the gradient made on the way: all logits at once, in fp32, are most
    of the memory of a small model with a large vocabulary, and on a CPU moving them costs as much as making them.
    """

    @staticmethod
    def forward(ctx, x, head, target, counted, learn):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        total, gx, gh = torch.zeros((), device=x.device), [], torch.zeros_like(head)
        with torch.autocast(kind, enabled=False):
            low = head.to(dtype)
            for states, goal, weight in zip(x.to(dtype).split(HEAD_CHUNK), target[:, None].split(HEAD_CHUNK),
                                            counted[:, None].float().split(HEAD_CHUNK)):
                logits = (states @ low.T).float()
                whole = logits.logsumexp(-1, keepdim=True)
                total += ((whole - logits.gather(1, goal)) * weight).sum()
                if learn:  # (softmax - one-hot) times weight
                    logits.sub_(whole).exp_().mul_(weight)
                    logits.scatter_add_(1, goal, -weight)  # one a row: in any order the same
                    low_gradient = logits.to(dtype)
                    gx.append((low_gradient @ low).to(x.dtype))
                    gh += low_gradient.T @ states
        if learn:
            ctx.save_for_backward(torch.cat(gx), gh)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gx, gh = ctx.saved_tensors
        return gx * gradient, gh * gradient, None, None, None


class Decoder(nn.Module):
    """Causal transformer over [prefix of the concept, tokens of the sentence]; many sentences packed in a row.

    A concept's direction is what it says, its length how sure that is: 1 (longer counts as 1) for a sentence's own,
    less for a prediction, 0 for no concept.

    logits = E (norm(x) + sqrt(concept_dim) P concept - |concept| spent * said), with E the table of token embeddings,
    tied, and `said` the sum of the embeddings of the tokens so far, each times its weight in a sentence's mean.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.n_embd // config.n_head
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.prefix = nn.Linear(config.concept_dim, config.n_prefix * config.n_embd, bias=False)
        nn.init.normal_(self.prefix.weight, std=0.2 * config.concept_dim ** -0.5)
        self.no_concept = nn.Parameter(0.2 * torch.randn(config.n_prefix * config.n_embd))  # unconditional prefix
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head, config.dropout, config.n_layer)
                                    for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.direct = nn.Linear(config.concept_dim, config.n_embd, bias=False)  # P
        nn.init.normal_(self.direct.weight, std=0.02 * config.concept_dim ** -0.5)
        self.spent = nn.Parameter(torch.full((config.n_embd,), 2.0))
        self.register_buffer('token_weight', torch.ones(config.vocab_size))  # the encoder's

    @torch.no_grad()
    def start_from(self, concepts, token_weight):
        """Let E and P start from the concepts (V, concept_dim) of single tokens, so that E P c is c's bag of words.

        P are their principal directions, as many as n_embd has room for; E is each token in them, 1 long on average.
        token_weight (V,) is the encoder's. Without this a decoder needs thousands of steps to find out which direction
        stands for which word.
        """
        concepts = concepts - concepts.mean(0)
        vectors = torch.linalg.eigh(concepts.double().T @ concepts.double()).eigenvectors
        directions = vectors.flip(1)[:, :self.config.n_embd].T.float()  # the largest first
        words = concepts @ directions.T
        words /= words.norm(dim=-1).mean().clamp(min=1e-6)
        self.embedding.weight.zero_()[:, :len(directions)] = words
        self.direct.weight.zero_()[:len(directions)] = directions
        self.token_weight.copy_(token_weight)

    def words(self, tokens):
        """What tokens (...) add to `said`: (..., n_embd)."""
        return self.embedding(tokens) * self.token_weight[tokens][..., None]

    def split(self, concepts):
        """Direction (..., concept_dim), sqrt(concept_dim) long, and length (..., 1), 1 at most, of concepts."""
        return unit(concepts) * self.config.concept_dim ** 0.5, concepts.norm(dim=-1, keepdim=True).clamp(max=1)

    def head_input(self, x, concepts, said):
        """What the head reads (..., n_embd): of x, what leaves the last block, concepts and `said`."""
        says, sure = self.split(concepts)
        return self.norm(x) + sure * (self.direct(says) - self.spent * said)

    def prefixes(self, concepts):
        """Concepts (..., concept_dim) -> (..., n_prefix, n_embd); the unconditional one where the length is 0."""
        says, sure = self.split(concepts)
        x = self.prefix(says).float()  # the residual stream is fp32
        return torch.lerp(self.no_concept, x, sure).unflatten(-1, (self.config.n_prefix, self.config.n_embd))

    @staticmethod
    def mask(group, path='mask'):
        """Each position sees itself and what stands before it in its group (B, T), its sentence, or its document in a
        language model; path as attention_path says."""
        if path == 'spans':
            return Spans(group, causal=True)
        return build_mask(causal_view(group), group.shape, group.device, path)

    def layout(self, tokens, sentence):
        """Of rows with n_prefix free positions before each sentence: place in the sentence, targets, where they count.

        tokens, sentence (B, T) -> place, target, counted (B, T). The last prefix position predicts the first token,
        each token the next one, the last one the end of the sentence.
        """
        place = place_in_sentence(sentence)
        last = F.pad(sentence[:, 1:] != sentence[:, :-1], (0, 1), value=True)
        target = torch.where(last, self.config.eos, F.pad(tokens[:, 1:], (0, 1)))
        return place, target, (sentence >= 0) & (place >= self.config.n_prefix - 1)

    def forward(self, tokens, sentence, concepts, mask):
        """Cross-entropy in nats, summed over the positions that count: the loss.

        tokens, sentence (B, T) from Corpus.batch(prefix=n_prefix); concepts (B, S, concept_dim), of length 1 to 0.
        """
        x, target, counted = self.head_inputs(tokens, sentence, concepts, mask)
        return HeadCrossEntropy.apply(x.flatten(0, 1), self.head.weight, target.flatten(), counted.flatten(),
                                      torch.is_grad_enabled())

    def losses(self, tokens, sentence, concepts, mask, only=True):
        """As forward, of each position (B, T), 0 where none is counted or `only` (B, T) is False."""
        x, target, counted = self.head_inputs(tokens, sentence, concepts, mask)
        at = counted & only
        loss = torch.zeros(at.shape, device=x.device)
        loss[at] = F.cross_entropy(self.head(x[at]).float(), target[at], reduction='none')
        return loss

    def head_inputs(self, tokens, sentence, concepts, mask):
        """What the head reads (B, T, n_embd), targets and which of them count (B, T); arguments as in forward."""
        place, target, counted = self.layout(tokens, sentence)
        prefix = self.prefixes(concepts).flatten(1, 2)  # (B, S * P, n_embd)
        at = sentence.clamp(min=0) * self.config.n_prefix + place.clamp(max=self.config.n_prefix - 1)
        prefix = prefix.gather(1, at[..., None].expand(-1, -1, prefix.shape[-1]))
        x = torch.where((place < self.config.n_prefix)[..., None], prefix, self.embedding(tokens))
        rope = rotary(torch.arange(tokens.shape[1], device=x.device), self.head_dim)
        for block in self.blocks:
            x = block(x, rope, mask)
        at = sentence.clamp(min=0)
        own = concepts.gather(1, at[..., None].expand(-1, -1, concepts.shape[-1]))
        position = torch.arange(tokens.shape[1], device=x.device)
        last = position + place_in_sentence(sentence.flip(1)).flip(1)
        words = self.words(tokens) * (place >= self.config.n_prefix)[..., None]
        said = RunningSum.apply(words, position - place, last)
        return self.head_input(x, own, said), target, counted

    def flops(self, n_positions, n_seen):
        """Floating-point operations of a training step on so many positions, prefixes included and padding not; n_seen:
        pairs of positions of which one sees the other."""
        each = matrix_weights(self.blocks) + self.head.weight.numel() + self.direct.weight.numel()
        return 6 * each * n_positions + 12 * self.config.n_layer * self.config.n_embd * n_seen

    @torch.inference_mode()
    def generate(self, concepts, max_tokens=64, temperature=0.0, top_k=0, top_p=1.0, generator=None, cache=True,
                 before=None):
        """Token ids (n, at most max_tokens) written from concepts (n, concept_dim), eos and what follows it included.

        temperature 0 takes the likeliest token; otherwise samples, among the top_k likeliest (0: all) and the
        likeliest that make up top_p of the probability. `cache=False` reads the whole prefix again for each token.
        `before` (n, T, n_embd) are states that a language model reads first: embeddings of the text so far, a prefix
        before each sentence.
        """
        config, n, device = self.config, len(concepts), concepts.device
        inputs = self.prefixes(concepts)  # (n, P, n_embd)
        if before is not None:
            inputs = torch.cat((before, inputs), 1)
        length = inputs.shape[1] + max_tokens
        shape = (n, config.n_head, length, self.head_dim)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        caches = [(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
                  for _ in self.blocks]
        cos, sin = rotary(torch.arange(length, device=device), self.head_dim)
        out = torch.empty(n, 0, dtype=torch.long, device=device)
        done = torch.zeros(n, dtype=torch.bool, device=device)
        said = torch.zeros(n, config.n_embd, device=device)
        seen, x = 0, inputs
        while out.shape[1] < max_tokens and not done.all():
            if not cache:
                seen, x = 0, inputs
            T = x.shape[1]
            # what comes first sees each other causally, as in training
            mask = torch.ones(T, T, dtype=torch.bool, device=device).tril() if T > 1 else None
            h, end = x, seen + T
            for block, (keys, values) in zip(self.blocks, caches):
                h = block(h, (cos[seen:end], sin[seen:end]), mask, (keys, values, seen))
            logits = self.head(self.head_input(h[:, -1], concepts, said)).float()
            token = sample(logits, temperature, top_k, top_p, generator)
            said = said + self.words(token)
            out = torch.cat((out, token[:, None]), 1)
            done |= token == config.eos
            seen, x = end, self.embedding(token)[:, None]
            inputs = torch.cat((inputs, x), 1) if not cache else inputs
        return out


def sample(logits, temperature, top_k, top_p, generator=None):
    """One token id a row of logits (n, V); see Decoder.generate."""
    if temperature < 1e-6:  # or what fp32 cannot divide by
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -torch.inf
    if top_p < 1:
        order = logits.sort(descending=True)
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)  # mass of the likelier ones
        out = (before >= top_p) & (before > 0)  # the likeliest stays, whatever top_p is
        logits = logits.scatter(-1, order.indices, order.values.masked_fill(out, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: written under a temporary name, flushed, renamed; read with weights_only=True.

def save_checkpoint(path, state: dict):
    """Write `state` to `path` so that at every moment either the old or the new one lies there, whole.

    Raises OSError, with the old file untouched and no half-written one left behind.
    """
    temporary = f'{path}.tmp'  # one name: a killed run leaves one at most, which the next overwrites
    try:
        with open(temporary, 'wb') as f:
            torch.save({'format': FORMAT, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)  # no more open to others than it was
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's writer turns a full disk into a RuntimeError about positions
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write the checkpoint '{path}': {str(cause).splitlines()[0]}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_checkpoint(path, kind, device='cpu') -> dict:
    """The state saved at `path`, a checkpoint of `kind` 'encoder', 'decoder' or 'language_model', or its out_dir.

    Raises FileNotFoundError or ValueError, each with what to do about it.
    """
    if os.path.isdir(path):
        path = os.path.join(path, f'{kind}.pt')
    if not os.path.exists(path):
        script = 'train_encoder.py' if kind == 'encoder' else 'train_decoder.py'
        raise FileNotFoundError(f"no {kind} at '{path}': train one with {script}, or give its out_dir")
    try:
        with zipfile.ZipFile(path) as z:
            # torch.load looks at no checksum, and reads another record's bytes where an attribute says 'folder'
            if z.testzip() or any(record.external_attr for record in z.infolist()):
                raise zipfile.BadZipFile
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # bytes that are not what they should be can raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a seek to nowhere is damage
            raise  # not ours to read, or a disk that fails: the file may be whole
        best = best_beside(path)
        raise ValueError(f"'{path}' is not a checkpoint of this program, or is damaged ({type(error).__name__}): give "
                         'another' + (f', such as {best}; training goes on from that once this one is removed'
                                      if best else '')) from error
    if not isinstance(state, dict) or state.get('format') != FORMAT or state.get('kind') != kind:
        raise ValueError(f"'{path}' holds no {kind} of format {FORMAT}: give another, or train one with this version")
    return state


def best_beside(path):
    """The best checkpoint beside the newest, `path`; '' where there is none."""
    best = str(path).removesuffix('.pt') + '_best.pt'
    return best if os.path.exists(best) else ''


def newest(path):
    """`path`, a checkpoint; the best one beside it where there is only that, so that it is not overwritten."""
    return path if os.path.exists(path) else best_beside(path) or path


def checkpoint_to_resume(path, kind, settings, device) -> dict | None:
    """The checkpoint to go on from: where settings['init_from'] is 'resume', or one of these very settings lies there,
    so that a run that was killed goes on by the same command. settings['init_from'] becomes what the weights came from.

    None where there is none. Raises ValueError for one of other settings, and as load_checkpoint.
    """
    told = settings['init_from'] == 'resume'
    if not told and not os.path.exists(path):
        return None
    state = load_checkpoint(path, kind, device)
    differ = sorted(k for k in settings.keys() & state['settings'].keys()  # a setting may have come since
                    if settings[k] != state['settings'][k])
    if not told and differ:
        raise ValueError(f"'{path}' exists, of a run with other settings ({', '.join(differ)}): choose "
                         'another --out_dir, or go on with --init_from=resume where the architecture is the same')
    settings['init_from'] = state['settings']['init_from']
    return state


def not_finite(model, sums, documents, what='loss') -> str:
    """In words, which gradients of `model` are not finite, and where its batch lies: `sums` (n,), `what` is summed over
    each of the micro-batches of a step, documents(i) the documents of one."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = [n for n, g in gradients.items() if not g.isfinite().all()]
    bad = (~sums.isfinite()).nonzero()[:, 0].tolist() or range(len(sums))
    named = f"that of {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" if names else 'none by itself'
    return (f'{what} {sums.sum():.3g}' + (f', gradients not finite: {named}' if gradients else '')
            + f'; training documents {sorted(set().union(*map(documents, bad)))}')


def asked(x):
    """A function that gives the value of x, a tensor of one element, and waits for no work queued after this call."""
    value, done = x.to('cpu', non_blocking=True), torch.cuda.Event() if x.is_cuda else None
    if done:
        done.record()

    def answer():
        if done:
            done.synchronize()
        return value.item()
    return answer


def settled(path) -> int:
    """Bytes of the file `path`, on the disk when this returns: a checkpoint that counts them is not ahead of it."""
    with open(path, 'rb') as f:
        os.fsync(f.fileno())
        return os.path.getsize(path)


def fingerprint(jepa: JEPA) -> float:
    """A number that tells one concept space (target and whitening) from another; a decoder remembers its encoder's."""
    tensors = [*jepa.target.parameters(), jepa.whitening.mean, jepa.whitening.W]
    return sum((i + 1) * t.double().abs().mean().item() for i, t in enumerate(tensors))


# ---------------------------------------------------------------------------------------------------------------
# What other programs use: text in, arrays or text out.

def rows_by_length(sequences, batch_size):
    """Batches of token sequences of similar length: yields (indices (n,), padded ids (n, T), lengths (n,))."""
    lengths = np.array([len(s) for s in sequences])
    order = np.argsort(-lengths, kind='stable')  # longest first: what does not fit in memory fails at once
    for start in range(0, len(order), batch_size):
        index = order[start:start + batch_size]
        ids = np.zeros((len(index), max(lengths[index[0]], 1)), dtype=np.int64)
        for row, i in enumerate(index):
            ids[row, :lengths[i]] = sequences[i]
        yield index, ids, lengths[index]


class SentenceEncoder:
    """Sentences to concepts, and windows of sentences to the concept expected next. From load_encoder."""

    def __init__(self, jepa: JEPA, tokenizer, device='cpu', dtype='float32', max_tokens=512):
        self.model, self.tokenizer, self.device = jepa.to(device).eval(), tokenizer, torch.device(device)
        self.dim, self.max_tokens = jepa.config.n_embd, max_tokens
        self.autocast = torch.autocast(self.device.type, getattr(torch, dtype), enabled=dtype != 'float32')

    def encode(self, sentences, batch_size=64, show_progress_bar=None, **_) -> np.ndarray:
        """Concepts of `sentences` (a list of str, or one str): float32 (n, d) of unit norm, in the order given.

        Tokens past `max_tokens` are cut. A bar is shown on a terminal from 10,000 sentences on, or as told. MTEB gives
        batches, {'text': list of str}, instead of sentences.
        """
        if isinstance(sentences, str):
            return self.encode([sentences], batch_size, show_progress_bar)[0]
        sentences = [t for s in sentences for t in (s['text'] if isinstance(s, dict) else [s])]
        return self.encode_tokens(self.tokenizer.encode_batch(sentences), batch_size, show_progress_bar)

    @staticmethod
    def similarity(a, b):
        """Cosines (n, m) of concepts a (n, d) and b (m, d), predictions or not: a tensor."""
        return unit(torch.as_tensor(a)) @ unit(torch.atleast_2d(torch.as_tensor(b))).T

    @staticmethod
    def similarity_pairwise(a, b):
        """Cosines (n,) of the rows of concepts a and b (n, d): a tensor."""
        return (unit(torch.as_tensor(a)) * unit(torch.as_tensor(b))).sum(-1)

    @torch.inference_mode()
    def encode_tokens(self, sequences, batch_size=64, show_progress_bar=None) -> np.ndarray:
        """As encode, from token ids."""
        out = np.empty((len(sequences), self.dim), dtype=np.float32)
        hide = len(sequences) < 10_000 or None if show_progress_bar is None else not show_progress_bar
        bar = tqdm(total=len(sequences), desc='encode', unit='sentence', disable=hide, leave=False)
        for index, tokens, inside in self.batches(sequences, batch_size):
            out[index] = self.concepts(tokens, inside).cpu().numpy()
            bar.update(len(index))
        bar.close()
        return out

    def batches(self, sequences, batch_size=64):
        """Yields (indices (n,), token ids (n, T), inside (n, T): False in padding) of sequences of similar length."""
        for index, ids, lengths in rows_by_length([s[:self.max_tokens] for s in sequences], batch_size):
            inside = np.arange(ids.shape[1]) < lengths[:, None]
            yield index, torch.from_numpy(ids).to(self.device), torch.from_numpy(inside).to(self.device)

    def concepts(self, tokens, inside):
        """Concepts (n, d), fp32, unit norm, of one sentence a row: token ids (n, T), inside (n, T)."""
        sentence = inside.long() - 1  # 0 in the sentence, -1 in padding
        with self.autocast:
            own = build_mask(sentence_view(sentence, None), tokens.shape, self.device)
            return self.model.whitening(self.model.target_means(tokens, sentence, 1, own)[:, 0])

    def predict(self, sentences) -> np.ndarray:
        """The concept expected after `sentences` (a list of str, oldest first): float32 (d,).

        Its length, mostly under 1, says how sure it is, as ConceptDecoder reads it (fit_prediction_scale). Raises
        ValueError on an empty list.
        """
        if not sentences:
            raise ValueError('predict needs at least one sentence')
        return self.predict_windows(self.tokenizer.encode_batch(list(sentences)), [(0, len(sentences))])[0]

    @torch.inference_mode()
    def predict_windows(self, sequences, windows, batch_size=64) -> np.ndarray:
        """As predict, after sequences[start:end], for each (start, end) of `windows`: (n, d).

        `sequences` are the token ids of sentences; a window, not empty, counts as one document.
        """
        sequences = [s[:self.max_tokens] for s in sequences]
        out = np.empty((len(windows), self.dim), dtype=np.float32)
        if self.model.config.context == 'concepts':
            return self.roll(self.encode_tokens(sequences, batch_size), windows)
        texts = [np.concatenate(sequences[a:b]) for a, b in windows]
        for index, ids, _ in rows_by_length(texts, batch_size):
            sentence = np.full(ids.shape, -1, dtype=np.int64)
            document = np.full((len(index), max(windows[i][1] - windows[i][0] for i in index)), -1, dtype=np.int64)
            for row, i in enumerate(index):
                a, b = windows[i]
                of = np.repeat(np.arange(b - a), [len(s) for s in sequences[a:b]])
                sentence[row, :len(of)], document[row, :b - a] = of, 0
            tokens, sentence, document = (torch.from_numpy(x).to(self.device) for x in (ids, sentence, document))
            with self.autocast:
                p = self.model.predict(tokens, sentence, document, self.model.masks(sentence, document)[1])
            out[index] = self._last(p, document)
        return out

    @torch.inference_mode()
    def roll(self, concepts, windows, batch_size=256, each=False) -> np.ndarray:
        """As predict_windows, from concepts (n, d), predictions among them or not: needs context='concepts'.

        Whatever their length, all count alike; fed back, predictions grow longer, and no surer. With `each` all
        hypotheses: (n, k, d).
        """
        if self.model.config.context != 'concepts':
            raise ValueError("this model reads tokens (context='tokens'): it cannot be rolled forward without text")
        out = []
        for start in range(0, len(windows), batch_size):
            part = windows[start:start + batch_size]
            width = max(b - a for a, b in part)
            at = np.array([[min(a + j, b - 1) for j in range(width)] for a, b in part])
            used = np.array([[j < b - a for j in range(width)] for a, b in part])
            document = torch.from_numpy(used).to(self.device).long() - 1
            with self.autocast:
                p = self.model.predict_concepts(unit(torch.from_numpy(concepts[at])).to(self.device), document, each)
            out.append(self._last(p, document))
        return np.concatenate(out)

    def _last(self, p, document):
        """Of predictions p (B, S, ..., D), those after each row's last sentence, to scale, as numpy (B, ..., D)."""
        read = (document >= 0).sum(1)
        p = p[torch.arange(len(p), device=p.device), read - 1]
        return self.model.scaled(p, read).float().cpu().numpy()


class ConceptDecoder:
    """Concepts to sentences. From load_decoder."""

    def __init__(self, decoder: Decoder, tokenizer, device='cpu', dtype='float32', encoder_fingerprint=None):
        self.model, self.tokenizer, self.device = decoder.to(device).eval(), tokenizer, torch.device(device)
        self.autocast = torch.autocast(self.device.type, getattr(torch, dtype), enabled=dtype != 'float32')
        self.encoder_fingerprint = encoder_fingerprint
        self.language_model = None  # evaluate.py's, to compare with

    def generate(self, concepts, temperature=0.0, top_k=0, top_p=1.0, max_tokens=64, batch_size=64, seed=0):
        """list[str]: a sentence for each of the concepts (n, d) or (d,), numpy or tensor; same seed, same samples.

        A concept's length is how sure it is: that of `encode` is 1, that of `predict` less; of 0, anything is written.
        Raises ValueError where a concept is not finite.
        """
        concepts = torch.as_tensor(np.atleast_2d(np.asarray(concepts)), dtype=torch.float32)
        if not concepts.isfinite().all():
            raise ValueError('a concept is not finite')
        generator = torch.Generator(self.device).manual_seed(seed)
        texts = []
        for start in range(0, len(concepts), batch_size):
            with self.autocast:
                part = concepts[start:start + batch_size].to(self.device)
                ids = self.model.generate(part, max_tokens, temperature, top_k, top_p, generator)
            texts += map(self.text, ids.tolist())
        return texts

    def text(self, ids):
        """What token ids (a list) say up to the end of the sentence."""
        end = ids.index(self.model.config.eos) if self.model.config.eos in ids else len(ids)
        return self.tokenizer.decode(ids[:end])

    @torch.inference_mode()
    def continue_text(self, contexts, max_tokens=64):
        """list[str]: a language model's next sentence, the likeliest token each time, after each of `contexts`.

        A context is a list of token sequences, oldest first.
        """
        net, texts = self.model, []
        none = torch.zeros(1, net.config.concept_dim, device=self.device)
        for sentences in contexts:
            with self.autocast:
                free, read = net.prefixes(none), []
                for ids in sentences:
                    read += [free, net.embedding(torch.as_tensor(np.asarray(ids, np.int64), device=self.device))[None]]
                before = torch.cat(read, 1) if read else None
                texts.append(self.text(net.generate(none, max_tokens, before=before)[0].tolist()))
        return texts

    @torch.inference_mode()
    def nll(self, sequences, concepts=None, batch_size=64) -> np.ndarray:
        """Nats (n,) that each token sequence costs given its concept (n, d), its end included; None: no concept."""
        config, out = self.model.config, np.empty(len(sequences))
        if concepts is None:
            concepts = np.zeros((len(sequences), config.concept_dim), np.float32)
        concepts = np.asarray(concepts, np.float32)
        for index, ids, lengths in rows_by_length(sequences, batch_size):
            tokens = F.pad(torch.from_numpy(ids), (config.n_prefix, 0)).to(self.device)
            inside = np.arange(tokens.shape[1]) < lengths[:, None] + config.n_prefix
            sentence = torch.from_numpy(inside).to(self.device).long() - 1
            given = torch.from_numpy(concepts[index]).to(self.device)[:, None]
            mask = self.model.mask(sentence)
            with self.autocast:
                loss = self.model.losses(tokens, sentence, given, mask)
            out[index] = loss.double().sum(1).cpu().numpy()
        return out

    @torch.inference_mode()
    def nll_in_context(self, sequences, contexts, batch_size=16) -> np.ndarray:
        """Nats (n,) that a language model gives each token sequence, its end included, after the sequences before it.

        contexts: for each a list of token sequences, oldest first.
        """
        config, out = self.model.config, np.empty(len(sequences))
        free = np.zeros(config.n_prefix, np.int64)
        texts = [[np.concatenate((free, s)) for s in (*before, last)] for before, last in zip(contexts, sequences)]
        for index, ids, _ in rows_by_length([np.concatenate(t) for t in texts], batch_size):
            sentence = np.full(ids.shape, -1)
            for row, i in enumerate(index):
                of = np.repeat(np.arange(len(texts[i])), [len(s) for s in texts[i]])
                sentence[row, :len(of)] = of
            tokens, sentence = (torch.from_numpy(x).to(self.device) for x in (ids, sentence))
            last = sentence.amax(1, keepdim=True)
            none = torch.zeros(len(index), int(last.max()) + 1, config.concept_dim, device=self.device)
            with self.autocast:
                loss = self.model.losses(tokens, sentence, none, self.model.mask(sentence.clamp(max=0)),
                                         only=sentence == last)
            out[index] = loss.double().sum(1).cpu().numpy()
        return out


def load_encoder(path, device='cpu', dtype='float32') -> SentenceEncoder:
    """The encoder saved at `path` (a file, or an out_dir). Raises FileNotFoundError or ValueError."""
    from prepare import load_tokenizer  # the tokenizer travels in the checkpoint; only text needs it
    state = load_checkpoint(path, 'encoder', device)
    jepa = JEPA(JEPAConfig(**state['config']))
    jepa.load_state_dict(state['model'])
    encoder = SentenceEncoder(jepa, load_tokenizer(state['tokenizer']), device, dtype)
    encoder.settings, encoder.tokenizer_sha256 = state['settings'], state['tokenizer']['sha256']
    return encoder


def load_decoder(path, device='cpu', dtype='float32', kind='decoder') -> ConceptDecoder:
    """The decoder, or the `kind` 'language_model', saved at `path` (a file, or an out_dir).

    Raises FileNotFoundError or ValueError.
    """
    from prepare import load_tokenizer
    state = load_checkpoint(path, kind, device)
    decoder = Decoder(DecoderConfig(**state['config']))
    decoder.load_state_dict(state['model'])
    return ConceptDecoder(decoder, load_tokenizer(state['tokenizer']), device, dtype, state['encoder_fingerprint'])
