"""What a trained model predicts, beside its baselines: report.md, report.png and metrics.json in out_dir.

    python evaluate.py --out_dir=out/demo --sts=stsb-dev.csv
    python evaluate.py --out_dir=out/demo --prompt="He went up to the city. The gates were shut." --steps=3

All on the validation split. A part of the evaluation returns {section: {row: {column: cell}}}. The row
'model' stands beside its baselines; a section's first column is its headline, where more is better. A cell is
a number, or an array of bootstrap draws whose first element is the value itself. Draws of the same items are
resampled alike, so intervals, paired differences, summary and tables all follow from them. Ties take the
worst rank: a constant model scores nothing.
"""

import csv
import json
import os
import re
import sys
import zlib
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import normalize as unit
from tqdm import tqdm

from config import UserError, as_user_error, override, write_file
from model import fit_scale, load_decoder, load_encoder, rank_me
from prepare import Corpus, clean, split_sentences

# ----------------------------------------------------------------------------------------------------
# Settings: override with --name=value
out_dir = 'out/fineweb'  # what the training scripts wrote
data_dir = ''  # what prepare.py wrote; '': what the encoder was trained on
eval_context = 8  # sentences before the one predicted that the predictor and the baselines read
max_pairs = 10_000  # (window, next sentence) pairs, at most 5 a document
max_train_sentences = 4000  # train sentences to predict: for means, scales, ridge and idf
max_generated = 200  # sentences written for BLEU, ROUGE and chrF
max_scored = 400  # sentences scored for information
sts = ''  # files of sentence pairs with a score: file[,file]; 'hub' downloads STS-B
judge = ''  # folder or name of a sentence-transformers model that compares what was written with the truth
prompt = ''  # instead of the evaluation: sentences to reconstruct and go on from; '-' reads standard input
steps = 1  # sentences to write after it, each fed back as input
num_samples = 1  # continuations to write
max_new_tokens = 64  # of a sentence
temperature = 0.0  # 0 takes the likeliest token
top_k = 0  # sample among so many likeliest; 0: all
top_p = 1.0  # and among the likeliest that make up this probability
batch_size = 32
device = 'auto'
dtype = 'float32'  # or 'bfloat16' (autocast) for the forward passes; metrics are fp32 always
seed = 1337

HORIZON = 8  # sentences that predictions are fed back for
MAX_ROLLOUTS = 200  # windows that this is done from
LESS = 'model less this'  # column of the paired differences

# ----------------------------------------------------------------------------------------------------
# Pairs: which sentences are predicted, and from which

class Pairs:
    """(window, next sentence) pairs from documents in one random order, at most per_document of each.

    sentences: token ids (N), documents end to end; document (N,): the number of each sentence's document,
    ascending; target (n,): the sentence to predict; windows (n, 2): (start, target) of the sentences read;
    owner (n,): the target's document; partner (n,): a pair of another document. Raises UserError where there
    are not two documents.
    """

    def __init__(self, data, n_pairs, rng, per_document=50):
        self.rng, self.sentences, document, windows = rng, [], [], []
        for number, d in enumerate(np.random.default_rng(0).permutation(data.n_documents)):
            ids, first = data.document(d), len(self.sentences)
            self.sentences += ids
            document += [number] * len(ids)
            drawn = first + 1 + rng.permutation(len(ids) - 1)[:per_document]
            windows += [(max(first, t - eval_context), t) for t in sorted(drawn)]
            if len(windows) >= n_pairs:
                break
        self.document, self.windows = np.array(document), np.array(windows[:n_pairs], int).reshape(-1, 2)
        self.target = self.windows[:, 1]
        self.owner = self.document[self.target]
        if len(set(self.owner)) < 2:
            raise UserError('each split needs two documents of two sentences or more: prepare more text, or '
                            'set a larger --max_pairs and --max_train_sentences')
        self.partner = partners(self.owner, rng)

    def others(self, windows):
        """Up to 31 sentences of each target's document, after it or before its window: (len(windows), 31).

        The target itself fills up the row where there are fewer.
        """
        out = np.repeat(windows[:, 1:], 31, 1)
        for row, (start, target) in zip(out, windows):
            inside = np.flatnonzero(self.document == self.document[target])
            drawn = self.rng.permutation(inside[(inside < start) | (inside > target)])[:31]
            row[:len(drawn)] = drawn
        return out

def partners(document, rng):
    """For each of the items of `document` (n,), the index of an item of another document, at random."""
    return np.array([rng.choice(np.flatnonzero(document != d)) for d in document])

def spread(items, most):
    """At most `most` places in items, evenly spaced with both ends, so never of one document only."""
    return np.unique(np.linspace(0, len(items) - 1, max(most, 2)).astype(int))

# ----------------------------------------------------------------------------------------------------
# Measures on arrays

@lru_cache
def resamples(n):
    """How often each of n documents is in each of 1,000 bootstrap samples: (1001, n), the first row ones."""
    return np.vstack((np.ones(n), np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 1000)))

def draws(values, document, weights=None):
    """sum(values) / sum(weights) over the items (n,), then in each bootstrap sample of documents: (1001,).

    Without weights a mean; 0 where the weights vanish.
    """
    _, number = np.unique(document, return_inverse=True)
    top, bottom = (resamples(number.max() + 1) @ np.bincount(number, v) for v in (values, weights))
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 1e-6)

def spearman(a, b):
    """Spearman's correlation x 100 of a and b (n,), average ranks for ties, as draws; 0 of a constant.

    Rounded to six places, so that rounding errors make no order.
    """
    x, y = (rankdata(np.round(v, 6)) for v in (a, b))
    x, y = ((v - v.mean()) / max(v.std(), 1e-9) for v in (x, y))
    return draws(200 * x * y, np.arange(len(a)), x * x + y * y)  # samples differ in their variances too

def cosine(a, b):
    """Cosines (n,) of the rows of a and b (n, d)."""
    return (unit(a) * unit(b)).sum(1)

def skill(p, z, mean, document):
    """Draws of 1 - sum |p - z|^2 / sum |mean - z|^2: the share of z's variance (n, d) that p explains."""
    size = ((mean - z) ** 2).sum(1)
    return draws(size - ((p - z) ** 2).sum(1), document, size)

def retrieved(similar, target, candidates, document):
    """Cells of how target[i] ranks among candidates[i] (n, m) by similar(rows) (len(rows), N).

    A candidate that is the target itself counts as none. Ties, within rounding, take the worst rank.
    """
    ranks = []
    for rows in np.array_split(np.arange(len(target)), len(target) // 256 + 1):
        c = torch.from_numpy(np.column_stack((target[rows], candidates[rows])))
        s = torch.as_tensor(similar(rows)).gather(1, c)
        ranks.append(1 + ((s >= s[:, :1] - 1e-6) & (c != c[:, :1])).sum(1))
    ranks = torch.cat(ranks).numpy()
    return {'MRR': draws(1 / ranks, document)} | {f'R@{k}': draws(ranks <= k, document) for k in (1, 10)}

def nearness(p, z):
    """A function of rows: cosines (len(rows), N) of those rows of p (n, d) with unit-norm z (N, d)."""
    p = unit(p)
    return lambda rows: p[rows] @ z.T

def token_sums(table, sequences):
    """Sums of the rows of table (V, d) over each sequence's tokens, at length 1: (n, d)."""
    return unit(np.stack([table[s].sum(0) for s in sequences]))

def fit_ridge(x, y, document):
    """Ridge regression of y on x (n, d) as a function; its penalty predicts held-out documents best."""
    penalties = np.array((0.1, 1, 10, 100)) * (len(x) * x.var(0).mean() + 1e-9)
    folds = GroupKFold(min(5, len(set(document)))).split(x, groups=document)
    return RidgeCV(penalties, cv=folds).fit(x, y).predict

def repeats(texts, owner):
    """Cell of the share of bigrams that stood in the same text before."""
    pairs = [list(pairwise(re.findall(r'\w+', t.lower()))) for t in texts]
    repeated = [len(p) - len(set(p)) for p in pairs]
    return {'repeated bigrams': draws(repeated, owner, list(map(len, pairs)))}

def text_scores(s, texts, truth, z, owner):
    """Cells of texts beside the truth, both (n,), whose concepts are z (n, d).

    rouge_score's F1 (ROUGE-1 is that of unigrams), sacrebleu's BLEU (13a) and chrF, x 100; cosines of E(text)
    and z, and of the judge's embeddings; the share of repeated bigrams.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    texts, truth = list(texts), list(truth)
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    rouge = [scorer.score(*pair) for pair in zip(truth, texts)]
    cells = {f'ROUGE-{k}': draws([100 * r[f'rouge{k}'].fmeasure for r in rouge], owner) for k in '12L'}
    cells['BLEU'] = sacrebleu.corpus_bleu(texts, [truth]).score
    cells['chrF'] = sacrebleu.corpus_chrf(texts, [truth]).score
    cells['round trip'] = draws(cosine(s.model.encoder.encode(texts), z), owner)
    if s.judge:
        cells['judge'] = draws(cosine(s.judge(texts), s.judge(truth)), owner)
    return cells | repeats(texts, owner)

# ----------------------------------------------------------------------------------------------------
# Files and models from outside

STS_NAMES = r'\s*(.*score|(s|sentence_?)[12ab])\s*'  # of the columns, in a header
STS_FORMAT = ('expected a score, first or last, and two sentences (in quotes where they have commas), or a '
              'header such as score,sentence1,sentence2')

def read_sts(path):
    """(score, sentence, sentence) rows of a .csv or .tsv file. Raises UserError that names the line.

    Columns are found by the names of a header (STS_NAMES). Without one, of three columns the first or the
    last, whichever is a number, is the score; of seven, as in the original STS-B, the fifth (some of its rows
    have one or two sources more).
    """
    places, pairs = {3: [(0, 1, 2), (2, 0, 1)]} | {n: [(4, 5, 6)] for n in (7, 8, 9)}, []
    with as_user_error(f'read --sts={path}', STS_FORMAT), \
            open(os.path.expanduser(path), encoding='utf-8-sig', newline='') as f:
        tabs = '\t' in f.readline()
        f.seek(0)
        reader = csv.reader(f, delimiter='\t', quoting=csv.QUOTE_NONE) if tabs else csv.reader(f)
        for cells in filter(None, reader):
            named = [i for i, cell in enumerate(cells) if re.fullmatch(STS_NAMES, cell, re.I)]
            if len(named) == 3:
                places = {len(cells): [sorted(named, key=lambda i: 'score' not in cells[i].lower())]}
                continue
            fits = [[cells[i] for i in place] for place in places.get(len(cells), ())
                    if re.fullmatch(r'\s*-?\d*\.?\d+\s*', cells[place[0]])]
            if len(fits) != 1:
                raise ValueError(f'line {reader.line_num}')
            score, *sentences = fits[0]
            pairs.append((float(score), *map(clean, sentences)))
        if not pairs:
            raise ValueError('no pairs')
    return pairs

def sts_files(names):
    """{name: rows} of the setting `sts`."""
    if names != 'hub':
        return {os.path.basename(n): read_sts(n) for n in filter(None, names.split(','))}
    with as_user_error('download STS-B', 'give --sts=<a file>'):
        from datasets import load_dataset
        splits = load_dataset('sentence-transformers/stsb')
        return {name: list(zip(*(splits[name][c] for c in ('score', 'sentence1', 'sentence2'))))
                for name in ('validation', 'test')}

def judge_encoder(name):
    """Function of a list of str to vectors (n, d) of a sentence-transformers model; None without a name."""
    if name:
        with as_user_error(f'load --judge={name}', 'it takes a folder of sentence-transformers'):
            from sentence_transformers import SentenceTransformer
            return SentenceTransformer(name, device='cpu').encode

def load(path, folder):
    """{'model', 'step 0' if it was kept: (encoder, decoder or None)}, and a language model or None.

    The encoder is at `path`, all others in `folder`. Left out is what was trained on another encoder, or has
    another size or number of steps than the decoder that it is compared with.
    """
    def beside(name, encoder, like=None, kind='decoder'):
        file = f'{folder}/{name}.pt'
        if not os.path.exists(file):
            return None
        found = load_decoder(file, device, dtype, kind)
        like = like or found
        if abs(found.fingerprint / encoder.fingerprint - 1) < 1e-6 and \
                (found.step, found.model.config) == (like.step, like.model.config):
            return found
        print(f'{file} was trained on another encoder, or has other steps or another size than decoder.pt: '
              'it is left out', file=sys.stderr)
    encoder, init = load_encoder(path, device, dtype), f'{folder}/encoder_init.pt'
    decoder = beside('decoder', encoder)
    models = {'model': (encoder, decoder)}
    if os.path.exists(init):
        untrained = load_encoder(init, device, dtype)
        same = untrained.fingerprint == encoder.fingerprint  # the encoder was frozen: one space, one decoder
        models['step 0'] = untrained, decoder if same else beside('decoder_init', untrained, decoder)
    return models, beside('language_model', encoder, decoder, 'language_model')

# ----------------------------------------------------------------------------------------------------
# What all parts read

class Space:
    """A concept space: an encoder's concepts z (N, d) of x.sentences, `truth` (n, d) those of x.target.

    x are validation pairs, t train pairs; `mean` is that of the train targets. p {name: (n, d)} are
    predictions by the encoder ('model') and by simpler predictors that read the same windows: each times the
    one scalar that brings its predictions of train pairs nearest to the truth.
    """

    def __init__(self, encoder, decoder, x, t):
        self.encoder, self.decoder = encoder, decoder
        z, self.z = (encoder.encode_tokens(pairs.sentences, batch_size) for pairs in (t, x))
        before, after = predictions(encoder, t, z), predictions(encoder, x, self.z)
        known, self.truth = z[t.target], self.z[x.target]
        self.mean = known.mean(0)
        self.p = {name: (fit_scale(before[name], known) * p).astype(np.float32) for name, p in after.items()}
        self.p['ridge'] = fit_ridge(before['window mean'], known, t.owner)(after['window mean'])

def predictions(encoder, x, z):
    """What is expected after the windows of x, whose concepts are z: {name: (n, d)}, of any length."""
    if encoder.model.config.context == 'concepts':  # at hand: not encoded again
        p = encoder.roll(z, x.windows)
    else:
        p = encoder.predict_windows(x.sentences, x.windows, batch_size)
    return {'model': p, 'copy-last': z[x.target - 1], 'window mean': window_means(x, z),
            'shuffled context': p[x.partner]}

def window_means(x, z):
    """Mean (n, d) of the rows of z in each window of x."""
    return np.stack([z[a:b].mean(0) for a, b in x.windows])

class Study(Pairs):
    """The validation pairs, and what all parts read of them.

    spaces {name: Space}: of the model and other encoders; predicted {name: (space, p (n, d))}: by the model
    and its baselines; near (n, 31): other sentences of each target's document; train: pairs to learn from.
    """

    def __init__(self, models, language_model, train_data, val_data, sts_pairs, judge):
        self.language_model, self.sts_pairs, self.judge = language_model, sts_pairs, judge
        rng = np.random.default_rng(seed)
        super().__init__(val_data, max_pairs, rng, 5)
        self.train = Pairs(train_data, max_train_sentences, rng)
        self.near = self.others(self.windows)
        self.spaces = {name: Space(*pair, self, self.train) for name, pair in models.items()}
        self.model = m = self.spaces['model']
        # whitened on as many sentences as the model's own space
        untrained = m.encoder.random(Pairs(train_data, 50 * m.encoder.dim, rng).sentences, seed)
        self.spaces['random encoder'] = Space(untrained, None, self, self.train)
        self.predicted = {name: (m, p) for name, p in m.p.items()} | {
            name: (space, space.p['model']) for name, space in self.spaces.items()}

    def text(self, sentences):
        """What the sentences of these indices say: (n,) of str."""
        return np.array([self.model.encoder.tokenizer.decode(self.sentences[i]) for i in sentences], object)

    def write(self, concepts):
        """What the model's decoder writes of concepts (n, d): (n,) of str."""
        return np.array(self.model.decoder.generate(concepts, max_tokens=max_new_tokens), object)

# ----------------------------------------------------------------------------------------------------
# The parts of the evaluation: each takes a Study and returns {section: {row: {column: cell}}}

def information(s):
    """Nats a token that the truth costs less given a concept than given the best baseline without one."""
    m, lm, some = s.model, s.language_model, spread(s.target, max_scored)
    if not m.decoder:
        return {}
    sentences, owner = [s.sentences[i] for i in s.target[some]], s.owner[some]
    tokens = np.array([len(i) + 1 for i in sentences])  # the end counts
    n_bytes = len(''.join(s.text(s.target[some])).encode())

    def nats(decoder, concepts=None, contexts=None):
        return decoder.nll(sentences, concepts, contexts, batch_size)
    shared = {'no concept': nats(m.decoder), 'mean concept': nats(m.decoder, 0 * m.truth[some] + m.mean)}
    if lm:
        shared['language model, reading nothing'] = nats(lm)
    best = min(shared.values(), key=sum)
    if lm:
        windows = [s.sentences[a:b] for a, b in s.windows[some]]
        shared['language model, reading the window'] = nats(lm, contexts=windows)
    own = {name: (space, space.truth) for name, space in s.spaces.items()}
    own['shuffled concept'] = m, m.truth[s.partner]
    out = {}
    for kind, given in (('prediction', s.predicted), ('reconstruction', own)):
        costs = {name: nats(v.decoder, c[some]) for name, (v, c) in given.items() if v.decoder} | shared
        out[f'information of a {kind}'] = {name: {
            'information': draws(best - n, owner, tokens), 'nats per token': draws(n, owner, tokens),
            'perplexity': np.exp(n.sum() / tokens.sum()), 'bits per byte': n.sum() / np.log(2) / n_bytes}
            for name, n in costs.items()}
    return out

def similarity(s):
    """Skill, and cosines with the truth, another sentence of its document and one of another document."""
    rows, near = {}, s.near[:, 0]
    beside = near != s.target  # there is another sentence in the document
    for name, (space, p) in s.predicted.items():
        value, mean = (skill(q, space.truth, space.mean, s.owner) for q in (p, space.p['window mean']))
        rows[name] = {'skill': value, "skill less the window mean's": value - mean,
                      'cosine, true': draws(cosine(p, space.truth), s.owner),
                      'in document': draws(beside * cosine(p, space.z[near]), s.owner, beside),
                      'unrelated': draws(cosine(p, space.truth[s.partner]), s.owner)}
    return {'feature similarity': rows}

def retrieval(s):
    """Where the true next sentence ranks in its document, and among one sentence of each other document."""
    order = s.rng.permutation(len(s.sentences))
    tokens = token_sums(s.model.encoder.model.target.embedding.weight.cpu().numpy(), s.sentences)
    tokens -= tokens.mean(0)
    grams = TfidfVectorizer(analyzer=lambda ids: map(str, [*ids, *pairwise(ids)]), sublinear_tf=True)
    texts = grams.fit(s.train.sentences + s.sentences).transform(s.sentences).T.tocsr()
    queries = grams.transform([np.concatenate(s.sentences[a:b]) for a, b in s.windows])
    similar = {name: nearness(p, space.z) for name, (space, p) in s.predicted.items()}
    similar['token mean'] = nearness(window_means(s, tokens), unit(tokens))
    similar['TF-IDF of the window'] = lambda rows: (queries[rows] @ texts).toarray()
    similar['chance'] = lambda rows: s.rng.random((len(rows), len(order)))
    one = order[np.unique(s.document[order], return_index=True)[1]][:10_000]  # of each document
    corpus = np.where(s.document[one] == s.owner[:, None], s.target[:, None], one)
    return {f'retrieval {where}': {name: retrieved(by, s.target, candidates, s.owner)
                                   for name, by in similar.items()}
            for where, candidates in (('in document', s.near), ('corpus', corpus))}

@torch.inference_mode()
def geometry(s):
    """How concepts fill their space, and what the order of a sentence's tokens changes."""
    rows, some = {}, s.rng.permutation(len(s.sentences))[:2000]
    sentences = [s.sentences[i] for i in some]
    shuffled = [s.rng.permutation(ids) for ids in sentences[:300]]

    def rank(v):
        return rank_me(torch.as_tensor(v - v.mean(0)))
    for name, space in s.spaces.items():
        z, means = space.z[some], [v[:, 0] for _, v in space.encoder.means(sentences, batch_size)]
        again = space.encoder.encode_tokens(shuffled)
        rows[name] = {'RankMe before whitening': rank(torch.cat(means)), 'RankMe': rank(z),
                      'dimensions': z.shape[1],
                      'cosine of random pairs': float(cosine(z, s.rng.permutation(z)).mean()),
                      'order sensitivity': 1 - float(cosine(z[:300], again).mean())}
    return {'geometry': rows | {'Gaussian': {'RankMe': rank(unit(s.rng.standard_normal(z.shape)))}}}

def text(s):
    """What the decoder writes of a sentence's own concept (reconstruct) and the predicted one (predict)."""
    some, out = spread(s.target, max_generated), {}
    if not s.model.decoder:
        return out
    target, owner, z = s.target[some], s.owner[some], s.model.truth[some]
    truth, nothing, other = s.text(target), s.write(0 * z[:1]).repeat(len(some)), partners(owner, s.rng)
    short = [len(s.sentences[i]) <= 32 for i in target]
    for kind, concepts in (('reconstruct', z), ('predict', s.model.p['model'][some])):
        written = s.write(concepts)
        texts = {'model': written, 'shuffled concept': written[other], 'no concept': nothing,
                 'copy-last': s.text(target - 1)}
        for title, kept in (('', [True] * len(some)), (', up to 32 tokens', short)):
            if any(kept):
                rows = {name: text_scores(s, t[kept], truth[kept], z[kept], owner[kept])
                        for name, t in texts.items()}
                out[f'text, {kind}{title}'] = rows | {'references': repeats(truth[kept], owner[kept])}
    return out

def sentence_pairs(s):
    """Spearman x 100 of the cosine of two sentences with the human score."""
    encoder, rows = s.model.encoder, {}
    tokenizer, train = encoder.tokenizer, s.train.sentences
    df = np.bincount(np.concatenate(list(map(np.unique, train))), minlength=tokenizer.n_vocab)
    vectors = np.random.default_rng(0).standard_normal((len(df), 256))
    weighted = vectors * np.log((1 + len(train)) / (1 + df))[:, None]
    embed = {name: space.encoder.encode_tokens for name, space in s.spaces.items()} | {
        'random token mean': partial(token_sums, vectors),
        'random token mean, idf': partial(token_sums, weighted), 'shuffled pairs': encoder.encode_tokens}
    for file, scored in s.sts_pairs.items():
        human, *sides = zip(*scored)
        sides = list(map(tokenizer.encode_batch, sides))
        for name, function in embed.items():
            a, b = map(function, sides)
            b = s.rng.permutation(b) if name == 'shuffled pairs' else b
            rows.setdefault(name, {})[file] = spearman(cosine(a, b), human)
    return {'STS, Spearman x 100': rows} if rows else {}

def rollouts(s):
    """Predictions fed back as concepts, beside the last sentence read; the farthest, the headline, first.

    The scalar of each is fitted to these windows.
    """
    m, rows, span = s.model, {}, eval_context + HORIZON - 1
    starts = np.flatnonzero(s.document[span:] == s.document[:-span])  # of long enough documents
    if not len(starts) or m.encoder.model.config.context != 'concepts':
        return {}
    target = starts[spread(starts, MAX_ROLLOUTS)] + eval_context
    owner, windows = s.document[target], eval_context * (np.arange(len(target))[:, None] + (0, 1))
    read = m.z[target[:, None] + np.arange(-eval_context, 0)]  # (n, eval_context, d)
    copied = read[:, -1]
    for h in range(HORIZON):
        p = m.encoder.roll(np.concatenate(read), windows)
        read = np.concatenate((read[:, 1:], p[:, None]), 1)
        truth, near = m.z[target + h], s.others(target[:, None] + (-eval_context, h))
        for name, q in (('model', p), ('copy-last', copied)):
            by = retrieved(nearness(q, m.z), target + h, near, owner)
            rows[name] = {f'skill, {h + 1} ahead': skill(fit_scale(q, truth) * q, truth, m.mean, owner),
                          f'MRR, {h + 1} ahead': by['MRR']} | rows.get(name, {})
    return {'rollout': rows}

PARTS = information, similarity, retrieval, geometry, text, sentence_pairs, rollouts

# ----------------------------------------------------------------------------------------------------
# Report

NOTES = """
Values are ± half of the 95 % interval by bootstrap over documents; *model less this* is the paired difference
of the first column, and *level* means that its interval holds 0.

- Information: nats per token that the true sentence costs less, its end counted, than given the best of: no
  concept, the mean concept, a language model that reads nothing.
- Skill: the share of the concepts' variance that a prediction explains. Collapsed: cosines at 1, skill at 0.
- Retrieval: among up to 31 sentences of the document from outside the window, and among one of each other
  document. High in the corpus and at chance in the document: topic only.
- Geometry: RankMe near 1, or random pairs at cosine 1: collapsed. Order sensitivity: 1 - cosine of a sentence
  and its tokens shuffled.
- Text: reconstruct is written from the sentence's own concept, predict from the predicted one. ROUGE-1 is F1
  of unigrams. Round trip: cosine of the concept of what was written and that of the truth.
- STS, published for STS-B: mean of GloVe 58.0 (test), next-sentence contrast from BERT 67.1 (dev), SimCSE
  76.9 (test).
"""

def interval(cell):
    """[value, low, high], at 95 %, of draws."""
    return [cell[0], *np.quantile(cell[1:], (0.025, 0.975))]

def number(cell):
    """A cell as text, with half of its interval."""
    if not isinstance(cell, np.ndarray):
        return f'{cell:.3g}'
    value, low, high = interval(cell)
    return f'{value:.3g} ± {(high - low) / 2:.2g}'

def compare(sections):
    """Add the column LESS: by how much the first column of the model is ahead of the row's, paired.

    Returns the summary: what the model is ahead of, level with and behind; what training added; signs of
    collapse.
    """
    lines, added = [], []
    for title, rows in sections.items():
        column, own = next(iter(rows['model'].items()))
        places = {'ahead of': [], 'level with': [], 'behind': []}
        for name, row in rows.items():
            if name != 'model' and isinstance(row.get(column), np.ndarray):
                row[LESS] = own - row[column]
                _, low, high = interval(row[LESS])
                places['ahead of' if low > 0 else 'behind' if high < 0 else 'level with'].append(name)
        said = [f'{place} {", ".join(names)}' for place, names in places.items() if names]
        lines.append('; '.join([f'{title}: {column} {number(own)}', *said]))
        if LESS in rows.get('step 0', ()):
            added.append(f'{title}, {column} {number(rows["step 0"][LESS])}')
    g = sections['geometry']['model']
    signs = {'random pairs have a cosine above .5': g['cosine of random pairs'] > 0.5,
             'RankMe before whitening is below 5 % of the width':
                 g['RankMe before whitening'] < 0.05 * g['dimensions'],
             'skill is not above 0': interval(sections['feature similarity']['model']['skill'])[1] <= 0}
    return [*lines, f'Training added to step 0: {"; ".join(added) or "unknown, without encoder_init.pt"}',
            f'Signs of collapse: {"; ".join(sign for sign, seen in signs.items() if seen) or "none"}']

def table(rows):
    """Lines of a table of {row: {column: cell}}."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [['', *columns], ['---'] * (len(columns) + 1)]
    lines += [[name, *(number(row[c]) if c in row else '' for c in columns)] for name, row in rows.items()]
    return [f'| {" | ".join(line)} |' for line in lines]

def shown(text):
    """Text for a terminal: control bytes, which a decoder can write, replaced."""
    return re.sub(r'[\x00-\x1f\x7f-\x9f]', '\ufffd', clean(text))

def samples(s):
    """Sentences, their reconstructions, the next ones as predicted and in truth: four lines a sample."""
    some = spread(s.target, 12)
    target = s.target[some]
    columns = {'sentence': s.text(target - 1), 'reconstruction': s.write(s.model.z[target - 1]),
               'predicted next': s.write(s.model.p['model'][some]), 'true next': s.text(target)}
    return [[f'{what}: {shown(text)}' for what, text in zip(columns, row)] for row in zip(*columns.values())]

def picture(folder):
    """Draw report.png: how training went, by the evaluations that it made."""
    import pandas
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.5), layout='constrained')
    for axis, (file, *columns) in zip(figure.subplots(1, 2), (
            ('metrics.csv', 'val_skill', 'train_skill', 'val_copy_skill', 'val_window_skill'),
            ('metrics_decoder.csv', 'val_loss', 'val_shuffled', 'val_unconditional'))):
        if os.path.exists(path := f'{folder}/{file}'):
            log = pandas.read_csv(path).dropna(subset=columns)
            if len(log):  # a run that was killed early has none
                log.plot('step', columns, ax=axis, title=file)
    figure.savefig(f'{folder}/report.png')

# ----------------------------------------------------------------------------------------------------
# A prompt's answer, or the evaluation

def answer(folder, encoder, decoder, val):
    """Print what the models make of the sentences of the prompt.

    Concepts of validation sentences are kept in `folder`, for the next prompt.
    """
    given = sys.stdin.buffer.read().decode('utf-8', 'replace') if prompt == '-' else prompt
    read = split_sentences(given)
    if not read or (steps > 1 and not decoder):
        raise UserError('--prompt needs a sentence, and --steps above 1 a decoder')
    sentences = Pairs(val, 2000, np.random.default_rng(seed)).sentences
    path, tokens = f'{folder}/val.npz', np.concatenate([[len(ids), *ids] for ids in sentences])
    key, kept = [encoder.fingerprint, zlib.crc32(tokens)], {}
    with suppress(Exception):  # there is none yet, or it is damaged
        kept = dict(np.load(path))
    if not np.array_equal(kept.get('key', []), key):
        kept = {'key': key, 'z': encoder.encode_tokens(sentences, batch_size)}
        with suppress(OSError):  # where the folder cannot be written
            write_file(path, lambda f: np.savez(f, **kept))
    near = kept['z']

    def look(what, z, seed=seed):
        """Print validation sentences near the concept z, and what the decoder writes of it: returned."""
        print(what)
        for i in np.argsort(-(near @ z))[:3]:
            print(f'  near: {shown(encoder.tokenizer.decode(sentences[i]))}')
        if decoder:
            written, = decoder.generate(z, temperature, top_k, top_p, max_new_tokens, seed=seed)
            print(f'  written: {shown(written)}')
            return written
    for sentence, z in zip(read, encoder.encode(read)):
        look(f'sentence: {shown(sentence)}', z)
    for n in range(num_samples):
        story = list(read)
        for step in range(steps):
            z = encoder.predict_next(story[-eval_context:])
            story.append(look(f'sample {n + 1}, next sentence {step + 1}', z, seed + n * steps + step))

def main():
    """Answer the prompt, or evaluate."""
    folder, sections = out_dir if os.path.isdir(out_dir) else os.path.dirname(out_dir) or '.', {}
    models, language_model = load(out_dir, folder)
    encoder, decoder = models['model']
    train, val = (Corpus(data_dir or encoder.settings['data_dir'], split) for split in ('train', 'val'))
    if val.meta['tokenizer']['sha256'] != encoder.tokenizer.spec['sha256']:
        raise UserError(f'the data have another tokenizer than {out_dir} was trained with: give --data_dir')
    if prompt:
        return answer(folder, encoder, decoder, val)
    s = Study(models, language_model, train, val, sts_files(sts), judge_encoder(judge))
    for part in tqdm(PARTS, 'evaluate.py'):
        sections |= part(s)
    lines, shows = compare(sections), samples(s) if decoder else []
    out = [f'# {folder}, step {encoder.step}', '', *(f'- {line}' for line in lines), '',
           f'{len(s.target):,} pairs of {len(set(s.owner)):,} validation documents.', NOTES]
    for title, rows in sections.items():
        out += [f'### {title}', '', *table(rows), '']
    out.append('![report](report.png)')
    for sample in shows:
        out += ['', *('- ' + re.sub(r'([^\w\s.,;:\'"?])', r'\\\1', line) for line in sample)]
    picture(folder)
    write_file(f'{folder}/report.md', '\n'.join([*out, '']))
    metrics = {'summary': lines, 'metrics': sections, 'settings': settings}
    write_file(f'{folder}/metrics.json', json.dumps(metrics, indent=1, default=interval))
    for sample in shows[:3]:
        print(*sample, '', sep='\n')
    print(*lines, f'{folder}/report.md has all tables and samples', sep='\n')

if __name__ == '__main__':
    settings = override(globals(), positive=(
        'eval_context', 'max_pairs', 'max_train_sentences', 'max_generated', 'max_scored',
        'batch_size', 'steps', 'num_samples', 'max_new_tokens', 'top_p'))
    main()
