"""LANG-JEPA's models: an encoder and a predictor that work on sentences, and a decoder that writes them back.

    h = encoder(tokens, view)   sentence view: a token sees its own sentence (context='concepts', the default)
                                context view: its own and all earlier ones of its document (context='tokens')
    c = whiten(weighted mean of h over each sentence)
    p = predictor(c)            causal over the sentences of a document; p[i] predicts sentence i + 1
    z = the same mean of target(tokens, sentence view), no gradient; target = moving average of the encoder
    concept = whiten(z) = normalize((z - mu) W)
    loss = 1 - cos(p[i], concept[i + 1])    for neighbours in one document

The whitening prevents collapse: without it EMA and cosine collapse within 150 steps. Training centres targets
on the mean of their micro-batch, inputs on the running mean; afterwards both are centred on the running mean.
W is always a running one. With context='concepts' the predictor learns from two inputs: c, and the targets'
own concepts, which it reads after training.

Letters in shapes: B rows, T tokens in a row, S sentences in a row, D the width of a concept, V the
vocabulary. A row comes from prepare.Corpus: `tokens` (B, T), `sentence` (B, T) the sentence of each token or
-1 for padding, `document` (B, S) the document of each sentence or -1 where the row has fewer.
"""

import copy
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

from config import UserError
from config.run import all_sum, autocast, load_checkpoint, pick_device
from prepare import load_tokenizer

# ----------------------------------------------------------------------------------------------------
# Masks: who sees whom

def build_mask(group, causal=False, order=None, path='mask'):
    """The attention mask of one rule: a position sees those of its `group`, and where `causal` none after it.

    group (B, T): the sentence or document of each position; padding, -1, sees itself alone. order (B, T):
    positions of a greater one are not seen. `path` 'flex' gives a BlockMask, 'mask' a boolean (B, 1, T, T),
    'spans' Spans where there is no order.
    """
    B, T = group.shape
    if path == 'spans' and order is None:
        return Spans(group, causal)
    b, t = torch.arange(B, device=group.device)[:, None, None], torch.arange(T, device=group.device)
    group = torch.where(group < 0, -1 - t, group)  # each padding a group of its own

    def seen(b, h, q, k):
        inside = group[b, q] == group[b, k]
        if order is not None:
            return inside & (order[b, k] <= order[b, q])
        return inside & (k <= q) if causal else inside
    if path == 'flex':  # with autograd and autocast off, so that it is compiled once
        with torch.no_grad(), torch.autocast('cuda', enabled=False):
            return compiled_block_mask(seen, B, None, T, T, device=group.device)
    return seen(b, 0, t[:, None], t)[:, None]

compiled_block_mask = torch.compile(create_block_mask)

def document_of(sentence, document):
    """The document (B, T) of each token, -1 for padding, of sentence (B, T) and document (B, S)."""
    return torch.where(sentence < 0, -1, document.gather(1, sentence.clamp(min=0)))

def pairs(document):
    """Boolean (B, S - 1): sentence i + 1 follows sentence i in the same document, of document (B, S)."""
    return (document[:, :-1] == document[:, 1:]) & (document[:, 1:] >= 0)

def place_in_sentence(sentence):
    """Place (B, T), from 0, of each position in its sentence, of sentence (B, T)."""
    place = torch.arange(sentence.shape[1], device=sentence.device).expand_as(sentence)
    first = F.pad(sentence[:, 1:] != sentence[:, :-1], (1, 0), value=True)
    return place - torch.where(first, place, 0).cummax(1).values

def attention_path(device_type, compiled):
    """How masks are best built: 'flex' on CUDA, compiled; 'spans' on a CPU, not compiled; or 'mask'.

    FlexAttention needs compute capability 8 and has no backward on a CPU; spans have no fixed shape.
    """
    if device_type == 'cuda' and compiled and torch.cuda.get_device_capability() >= (8, 0):
        return 'flex'
    return 'spans' if device_type == 'cpu' and not compiled else 'mask'

class Spans:
    """Replaces the mask on a CPU: a position attends within its run of equal `group` (B, T), causally or not.

    A row has some twenty sentences, so a mask over it is nearly all False, and a CPU computes all of it. Here
    runs of like length are padded to the same power of two and attend in a batch of their own: 2.7 times as
    fast, forward and backward, in rows of 512. The output at padding, -1, means nothing.
    """

    def __init__(self, group, causal=False):
        first = (place_in_sentence(group) == 0).flatten().nonzero()[:, 0]  # position of each run, in B T
        length, used = first.diff(append=torch.tensor([group.numel()])), group.flatten()[first] >= 0
        width, order = (2 ** length.clamp(min=16).log2().ceil().long()).clamp(max=group.shape[1])[used].sort()
        first, length = first[used][order], length[used][order]
        run = torch.repeat_interleave(width)  # of each slot
        place = torch.arange(len(run)) - (width.cumsum(0) - width)[run]
        self.causal, self.inside = causal, place < length[run]  # the others are padding
        self.slot = first[run] + place * self.inside  # the position that each slot holds
        self.position = torch.zeros(group.numel(), dtype=torch.long)  # the slot of each position
        self.position[self.slot[self.inside]] = self.inside.nonzero()[:, 0]
        self.widths, n = (x.tolist() for x in width.unique(return_counts=True))
        self.sizes = [a * b for a, b in zip(self.widths, n)]  # slots of each width

    def attend(self, qkv, rope, n_head):
        """Attention output (B, T, D) of queries, keys and values qkv (B, T, 3 D)."""
        x, out = qkv.flatten(0, 1).index_select(0, self.slot), []
        for w, inside, part in zip(self.widths, self.inside.split(self.sizes), x.split(self.sizes)):
            q, k, v = part.view(len(part) // w, w, 3, n_head, -1).permute(2, 0, 3, 1, 4)
            q, k = (rotate(x, rope[0][:w], rope[1][:w]) for x in (q, k))  # places in the run
            later = torch.ones(w, w, dtype=torch.bool).triu(1)
            score = (q @ k.mT).float() * q.shape[-1] ** -0.5
            score = score.masked_fill(later if self.causal else ~inside.view(-1, 1, 1, w), -torch.inf)
            out.append((score.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(len(part), -1))
        return torch.cat(out).index_select(0, self.position).view(*qkv.shape[:2], -1)

# ----------------------------------------------------------------------------------------------------
# Transformer: pre-norm, rotary positions, RMSNorm, no biases. Encoder, predictor and decoder are made of it.

def rotary(positions, dim, base=10_000.0):
    """Cosines and sines (len(positions), dim / 2) of rotary embedding (Su et al. 2021, arXiv:2104.09864)."""
    rate = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * rate
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn the halves of each head of x (B, H, T, dim) by the angles of its positions; computed in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)

class Block(nn.Module):
    """Attention and a feed-forward layer of 4 D with GELU, each on a normalised copy of the residual stream.

    It reads n_embd, n_head and dropout of `config`, and starts by the depth n_layer that it is part of; with
    `identity`, its output projections start as zeros, so that it starts as the identity.
    """

    def __init__(self, config, n_layer, identity=False):
        super().__init__()
        dim, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        if dim % self.n_head or dim // self.n_head % 2:
            raise UserError(f'n_embd={dim} must be an even multiple of n_head={self.n_head}')
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        for layer in (self.qkv, self.up):
            nn.init.normal_(layer.weight, std=dim ** -0.5)
        for layer in (self.proj, self.down):  # the residual stream keeps its scale
            nn.init.normal_(layer.weight, std=0.0 if identity else (2 * n_layer * layer.in_features) ** -0.5)

    def forward(self, x, rope, mask, cache=None):
        """x (B, T, D); mask as build_mask gives it, or None; cache as in `attend`."""
        qkv = self.qkv(self.norm1(x))
        spans = isinstance(mask, Spans)
        y = mask.attend(qkv, rope, self.n_head) if spans else self.attend(qkv, rope, mask, cache)
        x = x + F.dropout(self.proj(y), self.dropout, self.training)
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(y, self.dropout, self.training)

    def attend(self, qkv, rope, mask, cache):
        """Attention output (B, T, D) of queries, keys and values qkv (B, T, 3 D).

        The cache (2, B, H, length, dim) has the keys and values of all positions so far; the last T are new.
        """
        B, T, D = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache[..., -T:, :] = torch.stack((k, v))
            k, v = cache
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(B, T, D // 3)

class Transformer(nn.ModuleList):
    """n_layer Blocks and their rotary positions; arguments as of Block."""

    def __init__(self, config, n_layer, identity=False):
        super().__init__(Block(config, n_layer, identity) for _ in range(n_layer))
        self.head_dim = config.n_embd // config.n_head

    def forward(self, x, mask, caches=None, start=0):
        """x (B, T, dim), from position `start` on -> (B, T, dim); caches (n_layer, 2, B, H, length, dim)."""
        end = start + x.shape[1]
        rope = rotary(torch.arange(start, end, device=x.device), self.head_dim)
        for i, block in enumerate(self):
            x = block(x, rope, mask, caches and caches[i][..., :end, :])
        return x

class Encoder(nn.Module):
    """Tokens to states. Attention is set by the mask, so both views share the weights.

    Its blocks start as the identity: it starts as the embeddings, whose start means something
    (neighbour_embeddings), and random blocks would only blur them.
    """

    def __init__(self, config):
        super().__init__()
        # N(0, 1): in smaller ones what all have in common dominates
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = Transformer(config, config.n_layer, identity=True)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)

    def forward(self, tokens, mask):
        """tokens (B, T), mask as build_mask gives it -> states (B, T, D)."""
        return self.norm(self.blocks(self.embedding(tokens), mask))

class HFEncoder(nn.Module):
    """A model of `transformers` in Encoder's place, of the configuration config.hf: same call, own positions.

    Masked language models attend both ways, as Encoder does; causal ones only to what came
    before. Raises UserError for a model that cannot be used.
    """

    def __init__(self, config):
        super().__init__()
        import transformers  # optional: pip install transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
        config = {name: config.dropout if name.endswith(('dropout', 'dropout_prob', '_pdrop')) else value
                  for name, value in json.loads(config.hf).items()}
        config = transformers.AutoConfig.for_model(config.pop('model_type'), **config | {'use_cache': False})
        layers = set(getattr(config, 'layer_types', None) or ['full_attention'])
        self.net = transformers.AutoModel.from_config(config, attn_implementation='sdpa')
        if 'position_ids' not in inspect.signature(self.net.forward).parameters or \
                layers - {'full_attention', 'sliding_attention'}:
            raise UserError(f'a {config.model_type} model takes no positions or masks in some layer: '
                            'it cannot read packed sentences')
        self.net.pooler = None  # of the first token; where there is one, it would have no gradient
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

        Positions count from the first token that a token attends to, up to the model's last one.
        """
        t = torch.arange(tokens.shape[1], device=tokens.device)
        position = (t - mask[:, 0].byte().argmax(-1)).clamp(max=self.max_positions - 1) + self.first_position
        if self.causal:
            mask = mask & (t <= t[:, None])
        if self.window:
            reach = self.window - self.causal  # transformers counts the token itself in a causal window
            near = (t - t[:, None]).abs() <= reach
            mask = {'full_attention': mask, 'sliding_attention': mask & near}
        return self.net(input_ids=tokens, attention_mask=mask, position_ids=position).last_hidden_state

def pretrained(name, tokenizer):
    """(entries of JEPAConfig, fp32 weights for HFEncoder.net) of a `transformers` model: its name or folder.

    Raises UserError where there is none, or the data have another tokenizer (meta.json's `tokenizer`).
    """
    try:
        import transformers  # optional
        net = transformers.AutoModel.from_pretrained(os.path.expanduser(name), dtype=torch.float32,
                                                     trust_remote_code=False)
    except ImportError:
        raise UserError(f'--init_from=hf:{name} needs `pip install transformers`') from None
    except (OSError, ValueError) as error:
        raise UserError(f'--init_from=hf:{name}: {str(error).splitlines()[0]}') from None
    config = net.config
    if not hasattr(config, 'vocab_size'):
        raise UserError(f'hf:{name} is a {config.model_type} model: it does not read text alone')
    known = tokenizer['name'] == f'hf:{name}' or (config.model_type, tokenizer['name']) == ('gpt2', 'gpt2')
    if not known or tokenizer['n_vocab'] > config.vocab_size:
        raise UserError(f"the data have {tokenizer['n_vocab']:,} tokens of '{tokenizer['name']}', the model "
                        f'{config.vocab_size:,} of its own: prepare with --tokenizer=hf:{name}')
    entries = {'hf': config.to_json_string(use_diff=False), 'n_layer': config.num_hidden_layers,
               'n_head': config.num_attention_heads, 'n_embd': config.hidden_size}
    return entries, {k: v for k, v in net.state_dict().items() if not k.startswith('pooler.')}

# ----------------------------------------------------------------------------------------------------
# Sentence means and the space of concepts

def sif_weights(counts, a=1e-3):
    """Weights (V,) of tokens in a sentence's mean, of their counts (V,): a / (a + frequency), 1 on average.

    Smooth inverse frequency (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence
    embeddings"): without it, the words that every sentence has make up most of its mean.
    """
    frequency = counts.float() / counts.sum()
    weights = a / (a + frequency)
    return weights / (weights * frequency).sum()

def sentence_mean(h, weights, sentence, n_sentences):
    """Mean (B, S, D) over each sentence's tokens of states h (B, T, D) times weights (B, T).

    fp32, TF32 on CUDA; zero where there is no such sentence. A matrix product, not scatter_add: that one adds
    in no fixed order on CUDA.
    """
    ids = torch.arange(n_sentences, device=h.device)
    member = (sentence[:, None, :] == ids[None, :, None]).float()  # (B, S, T)
    with torch.autocast(h.device.type, enabled=False):
        return ((member * weights[:, None]) @ h.float()) / member.sum(-1, keepdim=True).clamp(min=1)

class Whitening(nn.Module):
    """Running mean and covariance of the targets' sentence means, and W = C^-1/2.

    In a whitened space every direction has the same variance, so the mean direction, the easiest thing to
    predict, is gone, and a collapsed model predicts nothing. Eigenvalues are at least `floor` of their mean.
    """

    def __init__(self, dim, rate=0.99, mean_rate=0.97, floor=0.01):
        super().__init__()
        self.rate, self.mean_rate, self.floor = rate, mean_rate, floor
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('cov', torch.eye(dim))
        self.register_buffer('W', torch.eye(dim))

    def forward(self, z, used=None):
        """Sentence means z (B, S, D) -> unit-norm concepts (B, S, D), fp32; shorter where z is the mean.

        Centred on the running mean, or on z's own over the sentences `used` (B, S).
        """
        mean = self.mean if used is None else (z * used[..., None]).sum((0, 1)) / used.sum().clamp(min=1)
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize((z - mean) @ self.W, dim=-1, eps=0.1)  # most are sqrt(D) long

    @torch.no_grad()
    def moments(self, z, used):
        """Sum (1 + D, 1 + D) of the outer products of (1, row) of the rows of z (B, S, D) `used` (B, S).

        About the running mean and in float64, as W divides by small eigenvalues. Moments add up
        over batches and ranks. [0, 0] counts the rows.
        """
        x = F.pad(z - self.mean, (1, 0), value=1.0) * used[..., None]
        x = x.flatten(0, 1).double()
        return x.T @ x

    @torch.no_grad()
    def update(self, moments, share=None):
        """Take a step's moments into the running ones, by `share`, or 1 - rate and 1 - mean_rate."""
        moments = moments / moments[0, 0].clamp(min=1)
        mean, cov = moments[0, 1:], moments[1:, 1:]
        # a higher rate: a mean that lags leaves all concepts a component in common
        self.mean += mean.float() * (share or 1.0 - self.mean_rate)
        self.cov.lerp_((cov - mean.outer(mean)).float(), share or 1.0 - self.rate)

    @torch.no_grad()
    def refresh(self):
        """Recompute W from the covariance, in fp32."""
        value, vector = torch.linalg.eigh(self.cov)
        # rounding leaves about 1e-8 of the mean's square where all sentences are equal: floored too
        floor = self.floor * value.mean() + 1e-8 * self.mean.square().sum()
        self.W.copy_((vector * value.clamp(min=floor.clamp(min=1e-12)).rsqrt()) @ vector.T)

    def fit(self, batches):
        """Start from 50 sentences a dimension, or all, of this rank's batches: (z, used) as in `moments`."""
        total = 0
        for z, used in batches:
            total = total + all_sum(self.moments(z, used))
            if total[0, 0] >= 50 * len(self.mean):
                break
        self.update(total, share=1.0)
        self.refresh()

@torch.no_grad()
def neighbour_embeddings(batches, weight, dim, passes, own=0.3):
    """Token embeddings (V, dim) to start from, sqrt(dim) long: each points to the sentences around its own.

    A sentence's mean of embeddings, times `weight` (V,), is whitened to a concept; a token's embedding
    becomes the sum of the concepts before and after the sentences it comes in, each over its sentence's
    length (without that, STS-B is a point lower), and a share `own` of a random vector, which keeps words of
    one topic apart; this is repeated `passes` times. The loss would pull embeddings there if the encoder
    were linear: orthogonal iteration towards what neighbouring sentences share (canonical correlation,
    Hotelling 1936, the words' covariance taken as diagonal, as in Dhillon et al. 2015, "Eigenwords"). A pass
    takes seconds where gradient steps take an hour to come as far.

    `batches()` yields this rank's batches (tokens, sentence, document) of one pass.
    """
    random = unit(torch.randn(len(weight), dim, device=weight.device))
    table = random * dim ** 0.5

    def means(tokens, sentence, document):
        return sentence_mean(table[tokens], weight[tokens], sentence, document.shape[1])
    for _ in range(passes):
        whitening = Whitening(dim).to(weight.device)
        whitening.fit((means(*batch), batch[2] >= 0) for batch in batches())
        total = torch.zeros_like(table)
        for tokens, sentence, document in batches():
            z = whitening(means(tokens, sentence, document))  # (B, S, D)
            follows = pairs(document)[..., None]
            around = torch.zeros_like(z)
            around[:, 1:] += z[:, :-1] * follows
            around[:, :-1] += z[:, 1:] * follows
            ids = torch.arange(document.shape[1], device=sentence.device)[:, None]
            around /= (sentence[:, None] == ids).sum(-1, keepdim=True).clamp(min=1)
            row, position = (sentence >= 0).nonzero(as_tuple=True)
            total.index_add_(0, tokens[row, position], around[row, sentence[row, position]])
        table = unit((1 - own) * unit(all_sum(total)) + own * random) * dim ** 0.5
    return table

# ----------------------------------------------------------------------------------------------------
# Predictor and training step

class Predictor(nn.Module):
    """Causal transformer over the sentences of a document: p[i] is the concept expected at i + 1.

    It starts as the last concept plus 8 times a mean of the concepts so far, weighted exp(-fade) for each
    sentence of distance: the output projections are zero but for the first attention. The last concept is the
    local context, the mean the topic. Attention scores fall with distance by a slope that is learned for each
    head, the same in all blocks (those of ALiBi, Press et al. 2022, arXiv:2108.12409, are fixed).
    """

    def __init__(self, config):
        super().__init__()
        self.slope = nn.Parameter(torch.full((config.n_head,), config.fade))
        self.blocks = Transformer(config, config.predictor_layer, identity=True)
        first, same = self.blocks[0], torch.eye(config.n_embd)
        with torch.no_grad():
            first.qkv.weight[:2 * config.n_embd] *= 0.1  # scores near 0: nearly equal attention
            first.qkv.weight[2 * config.n_embd:] = same
            first.proj.weight.copy_(8 * same)

    def forward(self, concepts, document):
        """Unit-norm concepts (B, S, D), document (B, S) -> predictions (B, S, D), fp32, of any length."""
        position = torch.arange(document.shape[1], device=document.device)
        distance, seen = position[:, None] - position, build_mask(document, causal=True)
        mask = torch.where(seen, -self.slope[:, None, None] * distance, -torch.inf)  # (B, H, S, S)
        return self.blocks(concepts * concepts.shape[-1] ** 0.5, mask).float()

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
    fade: float = 0.4  # initial slope of the predictor's attention, per sentence of distance
    hf: str = ''  # configuration, as json, of a transformers model in the encoder's place

class JEPA(nn.Module):
    """Encoder, its exponential moving average (the target), whitening and predictor."""

    def __init__(self, config: JEPAConfig):
        super().__init__()
        self.config, self.objective = config, Objective()
        self.encoder = HFEncoder(config) if config.hf else Encoder(config)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.whitening = Whitening(config.n_embd)
        self.predictor = Predictor(config)
        self.register_buffer('token_weight', torch.ones(config.vocab_size))  # in a mean: sif_weights
        self.register_buffer('prediction_scale', torch.ones(()))  # makes a prediction's length its confidence

    def train(self, mode=True):
        super().train(mode)
        self.target.eval()  # no dropout in the target
        return self

    def masks(self, sentence, document, path='mask'):
        """(sentence view's mask, the mask of the encoder's context); built outside the compiled region."""
        own = build_mask(sentence, path=path)  # nothing but the sentence itself can reach a target
        if self.config.context == 'concepts':
            return own, own
        return own, build_mask(document_of(sentence, document), order=sentence, path=path)

    def means(self, net, tokens, sentence, document, mask):
        """Sentence means (B, S, D), fp32, not whitened, of the states of `net`: the encoder or the target."""
        return sentence_mean(net(tokens, mask), self.token_weight[tokens], sentence, document.shape[1])

    @torch.no_grad()
    def targets(self, tokens, sentence, document, own):
        """Sentence means z (B, S, D) of the target encoder, no gradient."""
        return self.means(self.target, tokens, sentence, document, own)

    def predict(self, tokens, sentence, document, mask):
        """Predictions (B, S, D), of any length, of the concept of sentence i + 1, from the online encoder."""
        c = self.whitening(self.means(self.encoder, tokens, sentence, document, mask))
        return self.predictor(c, document)

    def expected(self, tokens, sentence, document, z):
        """What is predicted of each sentence from those before it (B, S, D); zeros where there is none.

        As after training: from the targets' own concepts, their means z whitened, or by context='tokens'.
        """
        p = self.predictor(self.whitening(z), document) if self.config.context == 'concepts' else \
            self.predict(tokens, sentence, document, self.masks(sentence, document)[1])
        return F.pad(p[:, :-1] * pairs(document)[..., None], (0, 0, 1, 0))

    def forward(self, tokens, sentence, document, z, concepts, mask):
        """The loss, summed over pairs of neighbours, of predicting `concepts` (B, S, D): z, whitened."""
        alone = self.config.context == 'concepts'
        means = z if alone and self.objective.frozen else \
            self.means(self.encoder, tokens, sentence, document, mask)
        read = [c := self.whitening(means)]
        if self.objective.target == 'shared':  # the targets are the inputs, with gradient
            concepts = c
        elif alone and not self.objective.frozen:
            read.append(self.whitening(z))
        kind, follows = self.objective.loss, pairs(document)
        predictions = [self.predictor(x, document) for x in read]
        with torch.autocast(means.device.type, enabled=False):
            losses = [pair_loss(p, concepts, document, kind) for p in predictions]
            loss = (sum(losses) / len(losses) * follows).sum()
            return loss + follows.sum() * self.objective.penalty(means.flatten(0, 1), document.flatten() >= 0)

    @torch.no_grad()
    def update_target(self, momentum):
        """target = momentum * target + (1 - momentum) * encoder, in fp32."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1.0 - momentum)

    def fingerprint(self, *more) -> float:
        """A number that tells one concept space (target, whitening, or `more` tensors) from another."""
        tensors = [*self.target.parameters(), *(more or (self.whitening.mean, self.whitening.W))]
        return sum((i + 1) * t.double().abs().mean().item() for i, t in enumerate(tensors))

# ----------------------------------------------------------------------------------------------------
# Objectives: what training minimises. One switch each, compared in tests/ablate.py. The whitening's switch
# and the centring of targets are in train_encoder.py's loop, the predictor's inputs in JEPA.forward.

@dataclass
class Objective:
    """The settings of the same names in train_encoder.py."""
    loss: str = 'cosine'  # or 'mse', 'infonce'
    target: str = 'ema'  # or 'stopgrad': the encoder as it is; 'shared': that, and with gradient
    reg: str = 'none'  # or 'vicreg', 'sigreg': of the online encoder's sentence means
    reg_weight: float = 1.0
    frozen: bool = False  # the encoder, freeze_encoder: only the predictor learns

    def penalty(self, x, used):
        """The regulariser of the rows of x (N, D) that are `used` (N,), times its weight."""
        if self.reg == 'none':
            return 0.0
        return self.reg_weight * (vicreg if self.reg == 'vicreg' else sigreg)(x, used)

def pair_loss(p, concepts, document, loss):
    """Loss (B, S - 1), fp32, of predictions p[i] and concepts[i + 1], both (B, S, D); document (B, S).

    mse is a mean over dimensions, with concepts of length sqrt(D), as the predictor reads them, and a tenth
    of the prediction: it starts about ten times as long.
    """
    p, z = p[:, :-1], concepts[:, 1:]
    if loss == 'infonce':
        return infonce(p, concepts, document)
    if loss == 'mse':
        return F.mse_loss(0.1 * p, z * z.shape[-1] ** 0.5, reduction='none').mean(-1)
    return 1 - (unit(p) * z).sum(-1)

def infonce(p, concepts, document, temperature=0.1):
    """Cross-entropy (B, S - 1) of finding concepts[i + 1] among the batch's, given p[i] (arXiv:1807.03748).

    Cosine similarity over the temperature. Sentences of the document up to i are no negatives: they would
    teach the model not to repeat what it read.
    """
    B, S, _ = concepts.shape
    logits = unit(p).flatten(0, 1) @ concepts.flatten(0, 1).T / temperature
    index, document = torch.arange(B * S, device=p.device).view(B, S), document.flatten()
    query = index[:, :-1].reshape(-1, 1)
    left_out = (document < 0) | ((document[query] == document) & (index.flatten() <= query))
    logits = logits.masked_fill(left_out, -1e4)  # finite: where all are left out the gradient is 0, not NaN
    return F.cross_entropy(logits, index[:, 1:].flatten(), reduction='none').view(B, S - 1)

class SumOverRanks(torch.autograd.Function):
    """x summed over ranks; its gradient likewise, because each rank's loss reads the x of all."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_sum(gradient.clone())

over_ranks = SumOverRanks.apply

def vicreg(x, used):
    """Variance and covariance terms of VICReg (Bardes et al. 2022, arXiv:2105.04906) of the used x (N, D).

    The hinge that holds each dimension's standard deviation at 1 or more, and a 25th, the paper's share, of
    the squared covariances off the diagonal over D. Statistics are over all ranks.
    """
    used = used.float()[:, None]
    n = over_ranks(used.sum())
    x = (x - over_ranks((x * used).sum(0)) / n) * used
    cov = over_ranks(x.T @ x) / (n - 1).clamp(min=1)
    spread = F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean()
    return spread + (cov - cov.diagonal().diag()).square().sum() / len(cov) / 25

def sigreg(x, used, directions=256, points=17, reach=5.0):
    """Sketched isotropic Gaussian regularisation (Balestriero & LeCun 2025, arXiv:2511.08544) of x (N, D).

    The Epps-Pulley statistic over random directions: n times the integral over t of |mean exp(i t x) -
    exp(-t^2 / 2)|^2 exp(-t^2 / 2), by the trapezoid rule, n being the used rows of all ranks, which draw the
    same directions: train_encoder.py seeds each step.
    """
    used = used.float()[:, None, None]
    n = over_ranks(used.sum())
    a = F.normalize(torch.randn(x.shape[1], directions, device=x.device), dim=0)
    t = torch.linspace(-reach, reach, points, device=x.device)
    angle = (x @ a)[..., None] * t  # (N, directions, points)
    real, imaginary = (over_ranks((f(angle) * used).sum(0)) / n for f in (torch.cos, torch.sin))
    gauss = torch.exp(-t.square() / 2)
    return n * torch.trapezoid(((real - gauss).square() + imaginary.square()) * gauss, t).mean()

# ----------------------------------------------------------------------------------------------------
# Optimizer groups; measures of a concept space that training prints too (evaluate.py has the others)

def optimizer_groups(model, embedding_scale=1.0, predictor_scale=1.0):
    """Parameter groups for AdamW, by what their weights are: each one, once.

    `scale`: what the group's learning rate is multiplied by; embeddings and the predictor have their own.
    `decays`: whether weight decay is for it; it is for matrices, not for embeddings, gains and lone vectors.
    """
    tables, groups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = id(p) in tables, name.startswith('predictor.'), p.dim() >= 2
            groups.setdefault(key, []).append(p)
    return [{'params': part, 'decays': matrix and not table,
             'scale': embedding_scale if table else predictor_scale if predictor else 1.0}
            for (table, predictor, matrix), part in groups.items()]

def unit(x):
    """x (..., D) in fp32 at length 1; a zero vector stays zero."""
    return F.normalize(x.float(), dim=-1)

def fit_scale(p, z):
    """The scalar a that minimises sum |a p - z|^2 over rows of p, z (n, D), tensors or arrays."""
    return (p * z).sum() / ((p * p).sum() + 1e-12)

def skill(p, z, mean):
    """1 - sum |p - z|^2 / sum |mean - z|^2 for p and unit-norm z (n, D) and the train targets' mean (D,).

    Above 0: better than always predicting the mean. A constant or a collapsed space gets 0 or less.
    """
    error, base = (p - z).square().sum(), (mean - z).square().sum()
    return (1 - error / base).item() if base > 1e-9 * len(z) else 0.0  # no variance: nothing explained

def rank_me(x):
    """RankMe (Garrido et al. 2023, arXiv:2210.02885) of x (n, D): exp of its singular values' entropy."""
    s = torch.linalg.eigvalsh(x.double().T @ x.double()).clamp(min=0).sqrt()
    p = s / s.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item() if s.sum() > 1e-6 else 1.0

# ----------------------------------------------------------------------------------------------------
# The decoder: a causal transformer writes the sentence after a few prefix positions made of the concept.
# The concept, less the tokens written so far, also goes straight to the logits.

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

def at_positions(x, index):
    """x[b, index[b, t]] of x (B, N, D) and index (B, T): (B, T, D)."""
    row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + row).flatten()).unflatten(0, index.shape)

class HeadCrossEntropy(torch.autograd.Function):
    """Sum of counted (N,) times the cross-entropy in nats of target (N,): the head (V, D) reads x (N, D).

    A chunk of positions at a time, and with `learn` the gradient made on the way: all logits at once, in
    fp32, are most of the memory of a small model with a large vocabulary, and on a CPU moving them costs as
    much as making them. The vocabulary is padded to a multiple of 64: an odd one slows products on a GPU.
    """

    @staticmethod
    def forward(ctx, x, head, target, counted, learn):
        kind, V = x.device.type, len(head)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        chunk = 8192 if kind == 'cuda' else 1024
        low = F.pad(head.to(dtype), (0, 0, 0, -V % 64))
        total, gx, gh = torch.zeros((), device=x.device), [], torch.zeros_like(low, dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            for states, goal, weight in zip(x.to(dtype).split(chunk), target[:, None].split(chunk),
                                            counted[:, None].float().split(chunk)):
                logits = (states @ low.T).float()
                logits[:, V:] = -torch.inf
                whole = logits.logsumexp(-1, keepdim=True)
                total += ((whole - logits.gather(1, goal)) * weight).sum()
                if learn:  # (softmax - one-hot) times weight
                    logits.sub_(whole).exp_().mul_(weight)
                    logits.scatter_add_(1, goal, -weight)  # one a row: in any order the same
                    slope = logits.to(dtype)
                    gx.append((slope @ low).to(x.dtype))
                    gh += slope.T @ states
        if learn:
            ctx.save_for_backward(torch.cat(gx), gh[:V])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gx, gh = ctx.saved_tensors
        return gx * gradient, gh * gradient, None, None, None

class Decoder(nn.Module):
    """Causal transformer over [prefix of the concept, tokens of the sentence], many sentences in a row.

    A concept's direction is its content, its length the confidence: 1 (longer counts as 1) for a
    sentence's own, less for a prediction, 0 for no concept.

    logits = E (norm(x) + confidence * (P direction - emitted_gain * emitted_sum)), with E the table of token
    embeddings, tied, and emitted_sum the sum of those of the tokens so far, weighted as in a sentence's mean.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim, width = config.n_embd, config.concept_dim
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.prefix = nn.Linear(width, config.n_prefix * dim, bias=False)
        self.no_concept = nn.Parameter(0.2 * torch.randn(config.n_prefix * dim))  # the prefix without one
        self.blocks = Transformer(config, config.n_layer)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.direct = nn.Linear(width, dim, bias=False)  # P
        self.emitted_gain = nn.Parameter(torch.full((dim,), 2.0))
        self.register_buffer('token_weight', torch.ones(config.vocab_size))  # the encoder's
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.prefix.weight, std=0.2 * width ** -0.5)
        nn.init.normal_(self.direct.weight, std=0.02 * width ** -0.5)

    @torch.no_grad()
    def start_from(self, concepts, token_weight, normalise=True):
        """Start E and P from concepts (V, concept_dim) that stand for tokens: E P c is c's bag of words.

        P are their principal directions, as many as n_embd has room for; E is each token in them, to
        `normalise` 1 long on average. token_weight (V,) is the encoder's. Without this a decoder needs
        thousands of steps to find out which direction stands for which word.
        """
        concepts = concepts - concepts.mean(0)
        vectors = torch.linalg.eigh(concepts.double().T @ concepts.double()).eigenvectors
        directions = vectors.flip(1)[:, :self.config.n_embd].T.float()  # the largest first
        words = concepts @ directions.T
        if normalise:
            words /= words.norm(dim=-1).mean().clamp(min=1e-6)
        self.embedding.weight.zero_()[:, :len(directions)] = words
        self.direct.weight.zero_()[:len(directions)] = directions
        self.token_weight.copy_(token_weight)

    def token_vectors(self, tokens):
        """What tokens (...) add to emitted_sum: (..., n_embd)."""
        return self.embedding(tokens) * self.token_weight[tokens][..., None]

    def read_concepts(self, concepts):
        """Of concepts (..., concept_dim): prefix (..., n_prefix, n_embd), P direction, confidence."""
        confidence = concepts.norm(dim=-1, keepdim=True).clamp(max=1)
        direction = unit(concepts) * self.config.concept_dim ** 0.5
        prefix = torch.lerp(self.no_concept, self.prefix(direction).float(), confidence)
        return prefix.unflatten(-1, (self.config.n_prefix, -1)), self.direct(direction), confidence

    def states(self, tokens, sentence, concepts, mask):
        """What the head reads (B, T, n_embd), its targets and which of them count (B, T).

        tokens, sentence (B, T) from Corpus.batch(prefix=n_prefix), with n_prefix free positions before each
        sentence; concepts (B, S, concept_dim). The last prefix position predicts the first token, each token
        the next one, the last one the end of the sentence.
        """
        n_prefix, place, own = self.config.n_prefix, place_in_sentence(sentence), sentence.clamp(min=0)
        last = F.pad(place[:, 1:] == 0, (0, 1), value=True)
        target = torch.where(last, self.config.eos, F.pad(tokens[:, 1:], (0, 1)))
        counted = (sentence >= 0) & (place >= n_prefix - 1)
        prefix, direct, confidence = self.read_concepts(concepts)
        prefix = at_positions(prefix.flatten(1, 2), own * n_prefix + place.clamp(max=n_prefix - 1))
        x = torch.where((place < n_prefix)[..., None], prefix, self.embedding(tokens))
        x = self.blocks(x, mask)
        total = (self.token_vectors(tokens) * (place >= n_prefix)[..., None]).cumsum(1)
        first = torch.arange(tokens.shape[1], device=x.device) - place  # of each sentence: has no token
        emitted_sum = total - at_positions(total, first)
        direct, confidence = at_positions(direct, own), at_positions(confidence, own)
        return self.norm(x) + confidence * (direct - self.emitted_gain * emitted_sum), target, counted

    def forward(self, tokens, sentence, concepts, mask):
        """Cross-entropy in nats, summed over the positions that count: the loss. Arguments as in `states`."""
        x, target, counted = self.states(tokens, sentence, concepts, mask)
        x, target, counted = (v.flatten(0, 1) for v in (x, target, counted))
        return HeadCrossEntropy.apply(x, self.embedding.weight, target, counted, torch.is_grad_enabled())

    @torch.inference_mode()
    def generate(self, concepts, max_tokens=64, temperature=0.0, top_k=0, top_p=1.0, generator=None,
                 no_repeat_ngram_size=2):
        """Token ids (n, at most max_tokens) of concepts (n, concept_dim), eos and what follows it included.

        temperature 0 takes the likeliest token; otherwise samples, among the top_k likeliest (0: all) and the
        likeliest that make up top_p of the probability. No n-gram of no_repeat_ngram_size tokens comes twice.
        """
        config, n = self.config, len(concepts)
        x, direct, confidence = self.read_concepts(concepts)
        mask = build_mask(torch.zeros(1, config.n_prefix, device=x.device), causal=True)
        shape = 2, n, config.n_head, config.n_prefix + max_tokens, self.blocks.head_dim
        caches = [direct.new_empty(shape) for _ in self.blocks]  # of autocast's type
        out, emitted_sum, length = [], 0, 0
        done = torch.zeros(n, dtype=torch.bool, device=x.device)
        while len(out) < max_tokens and not done.all():
            x = self.blocks(x, mask, caches, length)
            state = self.norm(x[:, -1]) + confidence * (direct - self.emitted_gain * emitted_sum)
            logits = F.linear(state, self.embedding.weight).float()
            ban_repeats(logits, out, no_repeat_ngram_size)
            token = sample(logits, temperature, top_k, top_p, generator)
            out.append(token)
            done |= token == config.eos
            emitted_sum, length, mask = emitted_sum + self.token_vectors(token), length + x.shape[1], None
            x = self.embedding(token)[:, None]
        return torch.stack(out, 1)

def ban_repeats(logits, written, size):
    """Set logits (n, V) to -inf where a token would repeat an n-gram of `size` of `written`, each (n,)."""
    if 0 < size <= len(written):
        written = torch.stack(written, 1)  # (n, i)
        grams = written.unfold(1, size, 1)  # (n, i - size + 1, size)
        newest = written[:, None, written.shape[1] - size + 1:]
        row, place = (grams[..., :-1] == newest).all(-1).nonzero(as_tuple=True)
        logits[row, grams[row, place, -1]] = -torch.inf

def sample(logits, temperature, top_k, top_p, generator=None):
    """One token id a row of logits (n, V); see Decoder.generate."""
    if temperature < 1e-6:  # or what fp32 cannot divide by
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -torch.inf
    if top_p < 1:
        value, index = logits.sort(descending=True)
        p = value.softmax(-1)
        before = p.cumsum(-1) - p  # mass of the likelier ones
        logits = logits.scatter(-1, index, value.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

# ----------------------------------------------------------------------------------------------------
# What other programs use: text in, arrays or text out

def is_sequence(x):
    """Whether x is an iterable, but no str, bytes, mapping, array without dimensions or data frame."""
    return (isinstance(x, Iterable) and not isinstance(x, (str, bytes, Mapping)) and not hasattr(x, 'columns')
            and getattr(x, 'ndim', 1) > 0)

def as_texts(given, name, inside=False):
    """A list of str from a str, any iterable of str, or {'text': str or list} as MTEB and datasets give it.

    Raises UserError, naming the place, for anything else, a sequence `inside` a sequence too.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) and 'text' in given:
        return as_texts(given['text'], f"{name}['text']")
    if inside or not is_sequence(given):
        raise UserError(f'{name} is a {type(given).__name__}: expected a str, or one sequence of str')
    return [text for i, item in enumerate(given) for text in as_texts(item, f'{name}[{i}]', inside=True)]

def packed(documents, batch_size, device, prefix=0):
    """Documents, lists of id arrays, one a row, those of like length together.

    Yields indices of documents (n,), and on the device tokens (n, T) and the sentence (n, T) of each, -1 in
    padding. `prefix` free positions precede each sentence.
    """
    if batch_size < 1:
        raise UserError(f'batch_size={batch_size}: expected 1 or more')
    lengths = np.array([sum(prefix + len(ids) for ids in d) for d in documents], np.int64)
    order = np.argsort(-lengths, kind='stable')  # longest first: what does not fit in memory fails at once
    for index in (order[start:start + batch_size] for start in range(0, len(order), batch_size)):
        tokens = np.zeros((len(index), max(lengths[index[0]], 1)), np.int64)
        sentence = np.full_like(tokens, -1)
        for row, i in enumerate(index):
            end = 0
            for number, ids in enumerate(documents[i]):
                start, end = end, end + prefix + len(ids)
                sentence[row, start:end], tokens[row, start + prefix:end] = number, ids
        yield index, torch.from_numpy(tokens).to(device), torch.from_numpy(sentence).to(device)

class SentenceEncoder:
    """Sentences to concepts, and windows of sentences to the concept expected next. From load_encoder."""

    mteb_model_meta = None  # MTEB asks for it

    def __init__(self, jepa: JEPA, tokenizer, device='cpu', dtype='float32'):
        self.model, self.tokenizer, self.dtype = jepa.eval(), tokenizer, dtype
        self.dim, self.max_seq_length = jepa.config.n_embd, 512  # tokens past it are cut
        self.to(device)

    def to(self, device):
        """The same encoder on another device."""
        self.device = pick_device(device)
        self.model.to(self.device)
        self.autocast = autocast(self.device, self.dtype)
        return self

    def get_sentence_embedding_dimension(self) -> int:
        return self.dim

    def encode(self, sentences, batch_size=64, show_progress_bar=None, convert_to_tensor=False,
               normalize_embeddings=True, *, task_metadata=None, hf_split=None, hf_subset=None,
               prompt_type=None):
        """Concepts of `sentences`: float32 (n, d) of unit norm, in the order given; (d,) of a single str.

        Takes a str, any sequence of str, or MTEB's batches, whose four last keywords are not used; white
        space is folded as in training. Raises UserError for anything else.
        """
        tokens = self.tokenizer.encode_batch(as_texts(sentences, 'sentences'))
        out = self.encode_tokens(tokens, batch_size, show_progress_bar)
        out = out[0] if isinstance(sentences, str) else out
        return torch.from_numpy(out) if convert_to_tensor else out

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
        """As encode, from token ids. After 3 seconds a bar is shown, by default on a terminal alone."""
        out = np.empty((len(sequences), self.dim), dtype=np.float32)
        hide = None if show_progress_bar is None else not show_progress_bar
        with tqdm(total=len(sequences), desc='encode', delay=3, disable=hide, leave=False) as bar:
            for index, z in self.means(sequences, batch_size):
                out[index] = self.model.whitening(z)[:, 0].cpu().numpy()
                bar.update(len(index))
        return out

    def means(self, sequences, batch_size=64):
        """Yields (indices, sentence means (n, 1, d), not whitened), one sentence a row."""
        documents = [[s[:self.max_seq_length]] for s in sequences]
        for index, tokens, sentence in packed(documents, batch_size, self.device):
            with self.autocast:
                z = self.model.targets(tokens, sentence, sentence[:, :1], build_mask(sentence))
            yield index, z

    @torch.inference_mode()
    def keep_means(self, corpus, compute=True, chunk=8192):
        """Give the Corpus the means of its sentences, float16, not whitened, from a file in its folder.

        What is missing there, all or what a run that was stopped left, is computed, or the Corpus gets none.
        """
        name = f'means_{self.model.fingerprint(self.model.token_weight):.9g}_{corpus.n_tokens}.{corpus.split}'
        path, n, row = corpus.path(name), corpus.n_sentences, 2 * self.dim
        kept = os.path.getsize(path) // row if os.path.exists(path) else 0
        if kept < n and not compute:
            return
        for start in tqdm(range(kept, n, chunk), f'means of {corpus.split}', leave=False, disable=None):
            part = corpus.sentences(start, min(start + chunk, n))
            out = np.empty((len(part), self.dim), np.float16)
            for index, z in self.means(part):
                out[index] = z[:, 0].cpu()
            with open(path, 'ab'), open(path, 'r+b') as f:  # the first makes it where there is none
                f.seek(row * start)  # where two processes do this, they write the same
                f.write(out.tobytes())
        corpus.means = np.memmap(path, np.float16, 'r', shape=(n, self.dim))

    def predict_next(self, sentences) -> np.ndarray:
        """The concept expected after `sentences`, oldest first: float32 (d,); of a list of such lists (n, d).

        Its length, mostly under 1, says how sure it is. Raises UserError where there is no sentence.
        """
        given = list(sentences) if is_sequence(sentences) else [sentences]
        many = given and all(map(is_sequence, given))
        windows = [as_texts(w, 'sentences') for w in (given if many else [given])]
        if not all(windows):
            raise UserError('predict_next needs at least one sentence')
        tokens = self.tokenizer.encode_batch([text for w in windows for text in w])
        ends = np.cumsum([0, *map(len, windows)])
        out = self.predict_windows(tokens, list(pairwise(ends)))
        return out if many else out[0]

    @torch.inference_mode()
    def predict_windows(self, sequences, windows, batch_size=64) -> np.ndarray:
        """As predict_next, after sequences[start:end], for each (start, end) of `windows`: (n, d).

        `sequences` are the token ids of sentences; a window, not empty, counts as one document.
        """
        if self.model.config.context == 'concepts':
            return self.roll(self.encode_tokens(sequences, batch_size), windows)

        def predict(tokens, sentence, document):
            mask = self.model.masks(sentence, document)[1]
            return self.model.predict(tokens, sentence, document, mask)
        documents = [[s[:self.max_seq_length] for s in sequences[a:b]] for a, b in windows]
        return self.after(windows, documents, predict, batch_size)

    @torch.inference_mode()
    def roll(self, concepts, windows, batch_size=256) -> np.ndarray:
        """As predict_windows, from concepts (n, d), predictions among them or not: needs context='concepts'.

        Inputs are normalised: fed back as they are, predictions grow longer and no better.
        """
        if self.model.config.context != 'concepts':
            raise UserError("a model of context='tokens' cannot be rolled forward without text")
        read, rows = unit(torch.from_numpy(concepts).to(self.device)), [[np.arange(*w)] for w in windows]
        return self.after(windows, rows, lambda i, _, document: self.model.predictor(read[i], document),
                          batch_size)

    def after(self, windows, documents, predict, batch_size):
        """The prediction after each window, scaled, by predict(tokens, sentence, document) of packed rows."""
        out, n = np.empty((len(windows), self.dim), np.float32), np.array([b - a for a, b in windows])
        for index, *row in packed(documents, batch_size, self.device):
            document = torch.zeros(len(index), n[index].max(), dtype=torch.long, device=self.device)
            with self.autocast:
                p = predict(*row, document)[np.arange(len(index)), n[index] - 1]
            out[index] = (self.model.prediction_scale * p).cpu().numpy()
        return out

    @torch.inference_mode()
    def random(self, sequences, seed):
        """A baseline: architecture and pooling with random weights, whitened on `sequences` (token ids).

        Not the trained one at step 0: its embeddings start from their neighbours, which is learned too.
        """
        torch.manual_seed(seed)
        config = self.model.config
        jepa = JEPA(config if config.hf else replace(config, n_layer=0))  # layers start as the identity
        jepa.token_weight.copy_(self.model.token_weight)
        out = SentenceEncoder(jepa, self.tokenizer, self.device, self.dtype)
        jepa.whitening.fit((z, torch.ones_like(z[..., 0])) for _, z in out.means(sequences))
        return out

class ConceptDecoder:
    """Concepts to sentences. From load_decoder."""

    def __init__(self, decoder: Decoder, tokenizer, device='cpu', dtype='float32'):
        self.device, self.tokenizer = pick_device(device), tokenizer
        self.model = decoder.eval().to(self.device)
        self.autocast = autocast(self.device, dtype)

    def generate(self, concepts, temperature=0.0, top_k=0, top_p=1.0, max_tokens=64, batch_size=64, seed=0,
                 no_repeat_ngram_size=2):
        """list[str]: a sentence for each of the concepts (n, d) or (d,); same seed, same samples.

        A concept's length is how sure it is: that of `encode` is 1, that of `predict_next` less; of 0,
        anything is written. No n-gram of no_repeat_ngram_size tokens comes twice in a sentence; 0: any may.
        Raises UserError on a wrong shape or value.
        """
        net, width, eos = self.model, self.model.config.concept_dim, self.model.config.eos
        try:
            concepts = list(concepts) if isinstance(concepts, Iterator) else concepts
            concepts = torch.from_numpy(np.atleast_2d(np.asarray(concepts, dtype=np.float32)))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f'concepts: expected numbers, (n, {width}): {error}') from None
        if concepts.shape[1:] != (width,) or not concepts.isfinite().all():
            raise UserError(f'concepts {tuple(concepts.shape)}: expected finite numbers, (n, {width})')
        least = min(temperature, top_k, max_tokens - 1, batch_size - 1, no_repeat_ngram_size)
        if not (least >= 0 < top_p <= 1):  # nor NaN
            raise UserError('expected temperature and top_k of 0 or more, top_p above 0 and at most 1, '
                            'max_tokens and batch_size of 1 or more')
        generator, texts = torch.Generator(self.device).manual_seed(seed), []
        for part in concepts.split(batch_size) if len(concepts) else ():
            with self.autocast:
                ids = net.generate(part.to(self.device), max_tokens, temperature, top_k, top_p, generator,
                                   no_repeat_ngram_size)
            for row in ids.tolist():
                texts.append(self.tokenizer.decode(row[:[*row, eos].index(eos)]))
        return texts

    @torch.inference_mode()
    def nll(self, sequences, concepts=None, contexts=None, batch_size=64) -> np.ndarray:
        """Nats (n,) that each token sequence and its end cost given its concept (n, d); None: given none.

        contexts: for each sequence the sequences before it, oldest first, which a language model reads.
        """
        net, out = self.model, np.empty(len(sequences))
        documents = [[*before, own] for before, own in zip(contexts or [[]] * len(sequences), sequences)]
        for index, tokens, sentence in packed(documents, batch_size, self.device, net.config.n_prefix):
            last = sentence.amax(1, keepdim=True)
            given = torch.zeros(len(index), last.max() + 1, net.config.concept_dim, device=self.device)
            if concepts is not None:
                given[:, 0] = torch.as_tensor(concepts[index], dtype=torch.float32)
            with self.autocast:
                mask = build_mask(sentence.clamp(max=0), causal=True)  # a row is one document
                x, target, counted = net.states(tokens, sentence, given, mask)
                counted &= sentence == last
                logits = F.linear(x[counted], net.embedding.weight)
            loss = torch.zeros_like(target, dtype=torch.float32)
            loss[counted] = F.cross_entropy(logits.float(), target[counted], reduction='none')
            out[index] = loss.double().sum(1).cpu().numpy()
        return out

def with_weights(wrapper, net, state, device, dtype):
    """The wrapper (SentenceEncoder or ConceptDecoder) of `net`, with what its checkpoint `state` holds."""
    net.load_state_dict(state['model'])
    out = wrapper(net, load_tokenizer(state['tokenizer']), device, dtype)
    out.settings, out.step = state['settings'], state['step']
    out.fingerprint = state.get('fingerprint') or net.fingerprint()  # a decoder keeps that of its encoder
    return out

def load_encoder(path, device='auto', dtype='float32') -> SentenceEncoder:
    """The encoder saved at `path`, a file or an out_dir. Raises UserError, also for a device not there."""
    state = load_checkpoint(path, 'encoder')
    return with_weights(SentenceEncoder, JEPA(JEPAConfig(**state['config'])), state, device, dtype)

def load_decoder(path, device='auto', dtype='float32', kind='decoder') -> ConceptDecoder:
    """The decoder, or `kind` 'language_model', saved at `path`, a file or an out_dir. Raises UserError."""
    state = load_checkpoint(path, kind)
    return with_weights(ConceptDecoder, Decoder(DecoderConfig(**state['config'])), state, device, dtype)
