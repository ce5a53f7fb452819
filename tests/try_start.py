"""What the start can and cannot do: variants of it on bags of words, without a transformer, a minute each.

    python tests/try_start.py --data_dir=data/openstax --sts=<STS-B dev>

A sentence is the mean of its tokens' embeddings, weighted and whitened as the encoder's; embeddings come from
neighbour_embeddings' iteration, done on sparse matrices (tests/test_model.py holds the two equal); what comes next is
predicted by a mean of the concepts so far that fades. Rows are variants, their numbers means over seeds and half of a
95 % interval, each less the first row's of the same seed. Writes tests/results/start.csv.
"""

import argparse
import csv
import os
import sys
import time

import numpy as np
import scipy.sparse as sp
import torch
from scipy.stats import t as student

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]

import evaluate  # noqa: E402
import model as lib  # noqa: E402
import prepare  # noqa: E402

WINDOW = 8  # sentences that a prediction reads


class Text:
    """The sentences of a split: token ids, the document of each (N,), and pairs: i with i + 1 in its document."""

    def __init__(self, data):
        documents = [data.document(i) for i in range(data.n_documents)]
        self.sentences = [np.asarray(s, np.int64) for d in documents for s in d]
        self.document = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
        self.pairs = np.flatnonzero(self.document[1:] == self.document[:-1])


class Bags:
    """Features of sentences, their tokens and, if asked, their bigrams, as sparse matrices."""

    def __init__(self, train, weight, bigrams=0, share=0.3, a=1e-3):
        """weight (V,): of tokens in a mean; bigrams: how often one must come; share: of a token's weight, a bigram's."""
        self.V, self.known = len(weight), np.zeros(0, np.int64)
        if bigrams:
            self.known, n = np.unique(np.concatenate([self.pair(s) for s in train.sentences]), return_counts=True)
            self.known, n = self.known[n >= bigrams], n[n >= bigrams]
            rare = a / (a + n / sum(map(len, train.sentences)))
            weight = np.concatenate((weight, share * rare / (a / (a + 1e-4))))
        self.weight = weight.astype(np.float32)

    def pair(self, s):
        return s[:-1] * self.V + s[1:]

    def features(self, s):
        at = np.searchsorted(self.known, self.pair(s))
        return np.concatenate((s, self.V + at[self.known[np.minimum(at, len(self.known) - 1)] == self.pair(s)])) \
            if len(self.known) else s

    def matrices(self, sentences):
        """(Weighted means, plain means): (N, features) each, over the number of tokens."""
        ids = [self.features(s) for s in sentences]
        row, length = np.repeat(np.arange(len(ids)), [len(i) for i in ids]), np.array([max(len(s), 1) for s in sentences])
        ids, shape = np.concatenate(ids), (len(sentences), len(self.weight))
        return (sp.csr_matrix(((values / length[row]).astype(np.float32), (row, ids)), shape)
                for values in (self.weight[ids], np.ones(len(ids))))


def whitening(z):
    """(mean, W) of the rows of z (n, D), with Whitening's floor."""
    space = lib.Whitening(z.shape[1])
    space.update(*lib.moments(torch.from_numpy(z))[:2])
    space.refresh()
    return space.mean.numpy(), space.W.numpy()


def concepts(z, space):
    return evaluate.unit((z - space[0]) @ space[1])


def start(bags, document, random, passes=4, own=0.3):
    """Embeddings (features, D) after so many passes over the sentences of `bags`, a pair of matrices."""
    means, counts = bags
    table, follows = random * random.shape[1] ** 0.5, (document[1:] == document[:-1])[:, None]
    for _ in range(passes):
        z = means @ table
        z = concepts(z, whitening(z))
        around = np.zeros_like(z)
        around[1:] += z[:-1] * follows
        around[:-1] += z[1:] * follows
        table = evaluate.unit((1 - own) * evaluate.unit(counts.T @ around) + own * random) * random.shape[1] ** 0.5
    return table


def fading(z, document, fade):
    """(N, D): of each sentence, the mean of its concept and those before, of WINDOW at most; longer where they agree."""
    total, weights = np.zeros_like(z), np.zeros((len(z), 1), np.float32)
    for k in range(WINDOW):
        same = (document[k:] == document[:len(document) - k])[:, None] * np.float32(np.exp(-fade * k))
        total[k:] += same * z[:len(z) - k]
        weights[k:] += same
    return total / weights


def measure(p, z, text, scale, mean, n=2000):
    """Of p[i] as a prediction of z[i + 1], both (N, D): corpus MRR among n, MRR in the document, skill."""
    rng = np.random.default_rng(0)
    at = np.sort(rng.permutation(text.pairs)[:n])
    q, true, document = p[at], z[at + 1], text.document[at]
    similar = q @ true.T
    beaten = (similar >= similar.diagonal()[:, None]) & (document[:, None] != document)
    inside = []
    for i, s in zip(at, evaluate.cosine(q, true)):
        first, end = np.searchsorted(text.document, [text.document[i], text.document[i] + 1])
        pool = np.concatenate((np.arange(first, max(i + 1 - WINDOW, first)), np.arange(i + 2, end)))
        if len(pool):
            pool = rng.permutation(pool)[:31]
            inside.append(1 / (1 + (z[pool] @ p[i] >= s).sum()))
    return [(1 / (1 + beaten.sum(1))).mean(), np.mean(inside), evaluate.skills(q, true, mean, scale, document)[0]]


def contrast(x, z, document, pairs, rng, in_document, steps=200, batch=1024):
    """A linear map (D', D) of x, by InfoNCE against sentences of other documents, or of its own from the next one on."""
    a = torch.nn.Parameter(torch.cat((torch.zeros(x.shape[1] - z.shape[1], z.shape[1]), torch.eye(z.shape[1]))))
    sharp = torch.nn.Parameter(torch.tensor(2.3))
    optimizer, x, z = torch.optim.AdamW([a, sharp], weight_decay=0), torch.from_numpy(x), torch.from_numpy(z)
    starts = pairs[np.r_[True, np.diff(document[pairs]) > 0]]
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - step / steps)
        at = rng.permutation(pairs)[:batch]
        if in_document:  # runs of a document's sentences
            at = np.concatenate([np.arange(s, s + 64) for s in rng.permutation(starts)[:batch // 16]])
            at = np.sort(at[np.isin(at, pairs)][:batch])
        same = torch.from_numpy(document[at][:, None] == document[at])
        order = torch.from_numpy(at[:, None] < at)
        out = same & ~torch.eye(len(at), dtype=torch.bool) & (~order if in_document else torch.ones_like(order))
        logits = lib.unit(x[at] @ a) @ z[at + 1].T * sharp.exp()
        loss = torch.nn.functional.cross_entropy(logits.masked_fill(out, -1e4), torch.arange(len(at)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return a.detach().numpy()


def variants(train, val, pairs_of_sts, tokens, seed, dim):
    """Yields (name, [corpus MRR, in-document MRR, skill, STS-B or nan]) of one seed."""
    rng, human = np.random.default_rng(seed), [r[0] for r in pairs_of_sts]
    half = rng.random(train.document[-1] + 1)[train.document] < 0.5  # documents that a start of half of the text reads

    def space(bags, seen=slice(None), random=None, **how):
        """Concepts of train and val from a start on the sentences `seen`, and its STS-B."""
        made, (held, _) = list(bags.matrices(train.sentences)), bags.matrices(val.sentences)
        if random is None:
            random = evaluate.unit(np.random.default_rng(seed).standard_normal((len(bags.weight), dim)))
        table = start([m[seen] for m in made], train.document[seen], random, **how)
        z, z_val = made[0] @ table, held @ table
        mean_w = whitening(z[seen])
        sts = float('nan')
        if human:
            a, b = (concepts(next(iter(bags.matrices(t))) @ table, mean_w) for t in tokens)
            sts = evaluate.spearman(evaluate.cosine(a, b), human, n=1)[0]
        return concepts(z, mean_w), concepts(z_val, mean_w), sts

    def judged(z, z_val, p, p_val, sts, at=train.pairs):
        return [*measure(p_val, z_val, val, lib.fit_scale(p[at], z[at + 1]), z.mean(0)), sts]

    def ahead(z, fade=0.4, unit=False):
        return [evaluate.unit(p) if unit else p for p in (fading(z[0], train.document, fade), fading(z[1], val.document, fade))]
    plain = Bags(train, tokens_weight(train))
    z, z_val, sts = space(plain)
    yield 'four passes, fade .4', judged(z, z_val, *ahead((z, z_val)), sts)
    yield 'predictions at one length', judged(z, z_val, *ahead((z, z_val), unit=True), sts)
    for fade in (0.1, 0.2, 0.8):
        yield f'fade {fade}'.replace('0.', '.'), judged(z, z_val, *ahead((z, z_val), fade), sts)
    yield 'copy-last', judged(z, z_val, z, z_val, sts)
    for name, how in (('one pass', {'passes': 1}), ('two passes', {'passes': 2}), ('own .15', {'own': 0.15}), ('own .5', {'own': 0.5})):
        *s, sts_ = space(plain, **how)
        yield name, judged(*s, *ahead(s), sts_)
    *s, sts_ = space(Bags(train, tokens_weight(train), bigrams=10))
    yield 'bigrams that come ten times', judged(*s, *ahead(s), sts_)
    for read, seen in (('all', np.ones_like(half)), ('half', half)):
        z, z_val, sts = (z, z_val, sts) if read == 'all' else space(plain, seen)
        p, p_val = ahead((z, z_val))
        both, both_val = np.hstack((z, p)), np.hstack((z_val, p_val))
        if read == 'half':
            yield 'the start reads half', judged(z, z_val, p, p_val, sts, train.pairs[half[train.pairs]])
        for where, of in (('', seen), (' of what it has not read', ~half)) if read == 'half' else (('', seen),):
            at = train.pairs[of[train.pairs]]
            gram = both[at].T @ both[at]
            ridge = np.linalg.solve(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)), both[at].T @ z[at + 1]).astype(np.float32)
            maps = {'scale': np.vstack((np.zeros((dim, dim), np.float32), np.eye(dim, dtype=np.float32))), 'ridge': ridge,
                    'contrast': contrast(both, z, train.document, at, rng, False), 'contrast in the document': contrast(both, z, train.document, at, rng, True)}
            for name, a in maps.items():
                if name != 'scale' or where:
                    yield f'the start reads {read}; {name} fitted on pairs{where}', judged(z, z_val, both @ a, both_val @ a, sts, at)


def tokens_weight(train):
    counts = np.bincount(np.concatenate(train.sentences), minlength=int(max(s.max() for s in train.sentences if len(s))) + 1)
    return lib.sif_weights(torch.from_numpy(counts)).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='data/openstax')
    parser.add_argument('--sts', default='')
    parser.add_argument('--dim', type=int, default=256)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--results', default=os.path.join(ROOT, 'tests', 'results'))
    chosen = parser.parse_args()
    corpora = [prepare.Corpus(chosen.data_dir, split) for split in ('train', 'val')]
    train, val = map(Text, corpora)
    rows = evaluate.read_sts(chosen.sts) if chosen.sts else []
    tokens = [[np.asarray(t, np.int64) for t in corpora[0].tokenizer.encode_batch([r[i] for r in rows])] for i in (1, 2)]
    found = {}
    for seed in range(chosen.seeds):
        began = time.time()
        for name, values in variants(train, val, rows, tokens, seed, chosen.dim):
            found.setdefault(name, []).append(values)
            print(f'seed {seed}, {time.time() - began:.0f} s: {name}: ' + ' '.join(f'{v:.4f}' for v in values), flush=True)
    columns = ['corpus MRR', 'in-document MRR', 'skill', 'STS-B']
    first, n = np.array(next(iter(found.values()))), chosen.seeds
    with open(os.path.join(chosen.results, 'start.csv'), 'w', newline='') as f:
        table = csv.writer(f, lineterminator='\n')
        table.writerow(['variant', *(x for c in columns for x in (c, f'{c} ±')), 'seeds'])
        for i, (name, values) in enumerate(found.items()):
            values = np.array(values) - (first if i else 0)
            half = student.ppf(0.975, n - 1) * values.std(0, ddof=1) / n ** 0.5 if n > 1 else np.full(len(columns), np.nan)
            table.writerow([name, *(f'{v:.4f}' for pair in zip(values.mean(0), half) for v in pair), n])


if __name__ == '__main__':
    main()
