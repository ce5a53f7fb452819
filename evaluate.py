"""Every metric beside its baselines: a table, metrics.json and report.md with samples and pictures.

    python evaluate.py --out_dir=out/demo
    python evaluate.py --out_dir=out/demo --sts=stsb-dev.csv
    python evaluate.py --out_dir=out/demo --prompt="He went up to the city. The gates were shut."

All on the validation split. The definitions stand with the functions; ties take the worst rank, so that a constant
model scores nothing.
"""

import csv
import json
import os
import sys
import warnings

import numpy as np
import torch
from tqdm import tqdm

import model as lib
from config import override
from prepare import Corpus, split_sentences

# ---------------------------------------------------------------------------------------------------------------
# Settings: override with --name=value
out_dir = 'out/fineweb'  # encoder.pt, and decoder.pt where there is one
data_dir = ''  # what prepare.py wrote; '': what the encoder was trained on
eval_context = 8  # sentences before the one predicted that the predictor and the baselines read
max_pairs = 10_000  # (context, next sentence) pairs, at most 5 a document
max_train_sentences = 20_000  # train sentences read for mean, scalars, ridge and idf
max_generated = 500  # sentences written for BLEU, ROUGE and chrF
max_scored = 2000  # sentences scored for perplexity
n_samples = 12  # samples in the report, chosen by seed
sts = ''  # files of sentence pairs with a score: file[,file]; 'hub' downloads STS-B
judge = ''  # folder or name of a sentence encoder of transformers that compares what was written with the truth
prompt = ''  # sentences to reconstruct and go on from, instead of the evaluation
steps = 1  # of --prompt: sentences to go on for, each read as it was written
temperature = 0.0  # of --prompt; 0 takes the likeliest token
top_k = 0
top_p = 1.0
batch_size = 64
device = 'auto'
dtype = 'float32'  # or 'bfloat16' (autocast) for the forward passes; metrics are fp32 always
seed = 1337


HORIZON = 8  # sentences that predictions are fed back for
MAX_ROLLOUTS = 200  # windows that this is done from


class Mistake(Exception):
    """What the user can mend: printed as one line, exit code 1."""


# ---------------------------------------------------------------------------------------------------------------
# Items: which sentences are predicted from which, and what they are told from

class Items:
    """Sentences of some documents and the pairs drawn from them.

    sentences: token ids, all documents end to end; document (N,): of each sentence; target (n,): the sentence to be
    predicted; start (n,): the first sentence of its window, which ends before the target.
    """

    def __init__(self, corpus, rng, n_pairs, n_sentences=None, context=8, each=5):
        self.sentences, document, target, start = [], [], [], []
        for number, d in enumerate(rng.permutation(corpus.n_documents)):
            ids, base = corpus.document(d), len(self.sentences)
            self.sentences += ids
            document += [number] * len(ids)
            if len(ids) > 1:
                for i in np.sort(rng.permutation(len(ids) - 1)[:each]) + 1:
                    target.append(base + i)
                    start.append(base + max(i - context, 0))
            if len(target) >= n_pairs or (n_sentences and len(self.sentences) >= n_sentences):
                break
        if not target:
            raise Mistake('no document of the split has two sentences')
        self.document, self.target, self.start = np.array(document), np.array(target), np.array(start)
        self.windows = list(zip(self.start, self.target))

    def candidates(self, rng, context, others=31):
        """Candidate sentences of each pair, -1 where there are fewer, the true one first: (a), (b), corpus."""
        first = np.searchsorted(self.document, np.arange(self.document[-1] + 2))
        one = rng.integers(first[:-1], first[1:])  # a sentence of each document
        if len(one) > 10_000:
            one = one[np.sort(rng.permutation(len(one))[:10_000])]
        n = len(self.target)
        repeats = np.full((n, 1 + others + context), -1)
        corpus = np.empty((n, 1 + len(one)), np.int32)
        for i, (t, s) in enumerate(zip(self.target, self.start)):
            d = self.document[t]
            pool = np.concatenate((np.arange(first[d], s), np.arange(t + 1, first[d + 1])))
            repeats[i, 0] = corpus[i, 0] = t
            repeats[i, 1:1 + min(others, len(pool))] = rng.permutation(pool)[:others]
            repeats[i, 1 + others:1 + others + t - s] = np.arange(s, t)
            corpus[i, 1:] = np.where(self.document[one] == d, -1, one)
        return {'a': repeats[:, :1 + others], 'b': repeats, 'corpus': corpus}


# ---------------------------------------------------------------------------------------------------------------
# Measures on arrays

def unit(x):
    """x (..., d) at length 1, float32; a zero vector stays zero."""
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def bootstrap(values, document, weights=None, n=1000, seed=0):
    """Mean of values (n,), weighted, and its 95 % interval by resampling documents: (mean, low, high)."""
    weights = np.ones(len(values)) if weights is None else weights
    _, of = np.unique(document, return_inverse=True)
    top, bottom = np.bincount(of, values * weights), np.bincount(of, weights)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(top), np.full(len(top), 1 / len(top)), size=n)
    means = (times @ top) / np.maximum(times @ bottom, 1e-12)
    return float(top.sum() / bottom.sum()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def ranks(similar, candidates):
    """Worst ranks (n,) of candidates[:, 0] by similarity; similar(rows) gives (len(rows), N); and the top one (n,)."""
    out, top = [], []
    for at in np.array_split(np.arange(len(candidates)), max(len(candidates) // 256, 1)):
        c = torch.from_numpy(candidates[at]).long()
        s = torch.as_tensor(similar(at)).gather(1, c.clamp(min=0))
        out.append(lib.worst_ranks(s, torch.zeros(len(at), dtype=torch.long), c >= 0))
        top.append(c.gather(1, s.masked_fill(c < 0, -torch.inf).argmax(1, keepdim=True))[:, 0])
    return torch.cat(out).numpy(), torch.cat(top).numpy()


def chance(candidates):
    """R@1 and MRR of a draw by lot."""
    n = (candidates >= 0).sum(1)
    harmonic = np.cumsum(1 / np.arange(1, n.max() + 1))
    return float((1 / n).mean()), float((harmonic[n - 1] / n).mean())


def skills(p, z, mean, scale, document, base=None):
    """Skill, 1 - sum |scale p - z|^2 / sum |mean - z|^2, with its interval over documents (z of unit norm).

    With `base`, predictions times their scale: how much more skill p has than they, on the same resampled documents.
    """
    size = ((mean - z) ** 2).sum(1)
    if size.mean() < 1e-9:
        return 0.0, 0.0, 0.0
    from_ = size if base is None else ((base - z) ** 2).sum(1)
    return bootstrap((from_ - ((scale * p - z) ** 2).sum(1)) / np.maximum(size, 1e-12), document, size)


def ridge(x, y, penalty=0.1):
    """Weights and offset of ridge regression y ~ x w + b; the penalty is a share of the mean variance of x."""
    mx, my = x.mean(0), y.mean(0)
    c = (x - mx).T @ (x - mx)
    w = np.linalg.solve(c + (penalty * np.trace(c) / len(c) + 1e-9) * np.eye(len(c)), (x - mx).T @ (y - my))
    return w, my - mx @ w


def fit_ridge(x, y, document):
    """Weights, offset and scale of the ridge regression whose penalty does best on the last fifth of the documents."""
    held = document >= np.quantile(document, 0.8)
    held[:1] = False  # one document or two: the first pair is for fitting
    best = None
    for penalty in (0.1, 1.0, 10.0, 100.0):
        w, b = ridge(x[~held], y[~held], penalty)
        p, z = (x[held] @ w + b, y[held]) if held.any() else (x @ w + b, y)
        scale = (p * z).sum() / max((p * p).sum(), 1e-12)
        error = ((scale * p - z) ** 2).sum()
        if best is None or error < best[0]:
            best = error, (w, b), scale
    return best[1:]


def spearman(a, b):
    """Spearman's correlation, average ranks for ties; 0, not NaN, where one is constant."""
    def rank(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    a, b = rank(np.asarray(a)), rank(np.asarray(b))
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-12 else 0.0


def geometry(x, rng):
    """How a cloud of unit vectors x (n, d) fills its space."""
    t = torch.from_numpy(x)
    s = torch.linalg.svdvals(t - t.mean(0)).double() ** 2
    a, b = x[rng.permutation(len(x))], x[rng.permutation(len(x))]
    return {'rank_centred': lib.rank_me(t - t.mean(0)), 'rank': lib.rank_me(t),
            'participation': float(s.sum() ** 2 / (s ** 2).sum()) if s.sum() > 1e-9 else 1.0,
            'cos_random': float((a * b).sum(1).mean()),
            'uniformity': float(np.log(np.exp(-2 * ((a - b) ** 2).sum(1)).mean())),
            'std': float(x.std(0).mean() * x.shape[1] ** 0.5), 'sentences': len(x), 'dimensions': x.shape[1]}


def tfidf(sentences, idf_from, width=2**18):
    """Unit-norm sparse vectors of token 1- and 2-grams, hashed to `width`: function of lists of sentence indices.

    Returns (matrix of all sentences as torch sparse CSR (N, width), vector(list of ids) -> (indices, values)).
    """
    def grams(ids):
        ids = np.asarray(ids, dtype=np.int64)
        pairs = (ids[:-1] * 1_000_003 + ids[1:] * 7_919 + 17) % (width // 2) + width // 2
        return np.concatenate((ids % (width // 2), pairs))
    seen = np.zeros(width)
    for ids in idf_from:
        seen[np.unique(grams(ids))] += 1
    idf = np.log((1 + len(idf_from)) / (1 + seen)) + 1

    def vector(ids):
        index, count = np.unique(grams(ids), return_counts=True)
        value = (1 + np.log(count)) * idf[index]
        return index, value / max(np.linalg.norm(value), 1e-12)
    parts = [vector(ids) for ids in sentences]
    with warnings.catch_warnings(action='ignore'):  # torch calls its sparse tensors beta
        matrix = torch.sparse_csr_tensor(torch.from_numpy(np.cumsum([0, *(len(i) for i, _ in parts)])),
                                         torch.from_numpy(np.concatenate([i for i, _ in parts])),
                                         torch.from_numpy(np.concatenate([v for _, v in parts])).float(),
                                         (len(sentences), width), check_invariants=False)
    return matrix, vector


# ---------------------------------------------------------------------------------------------------------------
# Baseline encoders and STS

def random_encoder(encoder, sentences, seed):
    """The same architecture and pooling with random weights, whitened on `sentences`: all that it knows of text.

    Not the trained one at step 0: its embeddings start from their neighbours, which is learned from text too.
    """
    torch.manual_seed(seed)
    jepa = lib.JEPA(encoder.model.config)
    jepa.token_weight.copy_(encoder.model.token_weight)
    out = lib.SentenceEncoder(jepa, encoder.tokenizer, encoder.device)
    out.autocast = encoder.autocast
    with torch.inference_mode():
        means = []
        for _, tokens, inside in out.batches(sentences):
            sentence = inside.long() - 1
            own = jepa.masks(sentence, sentence[:, :1])[0]
            means.append(jepa.target_means(tokens, sentence, 1, own))
        z = torch.cat(means)
        mean, cov, _ = lib.moments(z[:, 0])
        jepa.whitening.update(mean, cov)
        jepa.whitening.refresh()
    return out


def token_means(table, sentences, weight=None):
    """Mean of the rows of table (V, d) over each sentence's tokens, weighted by weight (V,): (n, d)."""
    out = np.zeros((len(sentences), table.shape[1]), np.float32)
    for i, ids in enumerate(sentences):
        if len(ids):
            w = np.ones(len(ids)) if weight is None else weight[ids]
            out[i] = (table[ids] * w[:, None]).sum(0) / max(w.sum(), 1e-12)
    return out


def read_sts(path):
    """(score, sentence, sentence) rows of a .csv or .tsv file, score first or last, header or none.

    Raises Mistake, naming the line, where a row is not of that form.
    """
    try:
        with open(path, encoding='utf-8', newline='') as f:
            head = f.readline()
            f.seek(0)
            tabs = '\t' in head
            table = list(csv.reader(f, delimiter='\t', quoting=csv.QUOTE_NONE) if tabs else csv.reader(f))
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f'cannot read --sts={path}: {error}') from None
    rows, at = [], None
    for number, row in enumerate(table, 1):
        if not row:
            continue
        def score(i, row=row):
            try:
                value = float(row[i])
            except (ValueError, IndexError):
                return None
            return value if np.isfinite(value) else None
        if at is None:
            at = next((i for i in (len(row) - 1, 0) if len(row) >= 3 and score(i) is not None), None)
            if at is None:
                if number == 1:
                    continue  # a header
                raise Mistake(f'{path}, line {number}: expected score, sentence, sentence or sentence, sentence, score')
        if score(0 if at == 0 else -1) is None or len(row) < 3:
            raise Mistake(f'{path}, line {number}: no score where the other lines have it')
        rows.append((score(0 if at == 0 else -1), *(row[1:3] if at == 0 else row[-3:-1])))
    if not rows:
        raise Mistake(f'{path}: no pair of sentences in it')
    return rows


def sts_files(names):
    """{name: rows} of the setting `sts`."""
    if names != 'hub':
        return {os.path.basename(n): read_sts(n) for n in names.split(',')}
    try:
        import datasets
        return {f'STS-B {split}': [(r['score'], r['sentence1'], r['sentence2']) for r in
                                   datasets.load_dataset('sentence-transformers/stsb', split=split)]
                for split in ('validation', 'test')}
    except Exception as error:  # the client raises dozens of kinds for a hub that is out of reach
        raise Mistake(f'cannot download STS-B ({type(error).__name__}): give --sts=<file of score, s1, s2>') from None


def sts_scores(rows, encoder, random, idf):
    """Spearman x 100 of the cosine of each pair with the human score, for the encoder and its baselines."""
    tokens = [encoder.tokenizer.encode_batch([r[i] for r in rows]) for i in (1, 2)]
    human = [r[0] for r in rows]
    rng = np.random.default_rng(0)
    lot = rng.standard_normal((encoder.model.config.vocab_size, 256)).astype(np.float32)
    own = encoder.model.target.embedding.weight.detach().cpu().numpy()

    def measure(embed):
        a, b = embed(tokens[0]), embed(tokens[1])
        return 100 * spearman((unit(a) * unit(b)).sum(1), human)

    def centred_own(t):
        return token_means(own, t) - token_means(own, tokens[0] + tokens[1]).mean(0)
    a, b = (encoder.encode_tokens(t) for t in tokens)
    return {'model': 100 * spearman((a * b).sum(1), human), 'random encoder': measure(random.encode_tokens),
            'random token mean': measure(lambda t: token_means(lot, t)),
            'random token mean, idf': measure(lambda t: token_means(lot, t, idf)),
            'own token mean, centred': measure(centred_own),
            'shuffled pairs': 100 * spearman((a * b[rng.permutation(len(b))]).sum(1), human)}


def judge_encoder(name):
    """Function of a list of str to unit-norm vectors (n, d): mean over tokens of a `transformers` model, in fp32."""
    try:
        import transformers  # optional: pip install transformers
        tokenizer, net = (kind.from_pretrained(name) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    except ImportError:
        raise Mistake('--judge needs `pip install transformers`') from None
    except (OSError, ValueError) as error:
        raise Mistake(f'cannot load --judge={name}: {str(error).splitlines()[0]}') from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def embed(texts):
        out = []
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(texts[start:start + batch_size], padding=True, truncation=True, return_tensors='pt')
            inside = inputs['attention_mask'][..., None].float()
            h = net.eval()(**inputs).last_hidden_state.float()
            out.append((h * inside).sum(1) / inside.sum(1).clamp(min=1))
        return unit(torch.cat(out).numpy())
    return embed


# ---------------------------------------------------------------------------------------------------------------
# The evaluation

def load(path):
    """Encoder, decoder or None, and corpora of a run; raises Mistake."""
    if dtype not in ('float32', 'bfloat16'):
        raise Mistake(f"--dtype={dtype}: expected 'float32' or 'bfloat16'")
    where = ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device
    try:
        if torch.device(where).type == 'cuda' and not torch.cuda.is_available():
            raise Mistake(f'--device={device}: this machine, or this build of torch, has no CUDA')
    except (RuntimeError, TypeError):
        raise Mistake(f"--device={device}: expected 'auto', 'cpu', 'cuda' or 'cuda:1'") from None
    try:
        encoder = lib.load_encoder(path, where, dtype)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        decoder = None
        if os.path.exists(os.path.join(folder, 'decoder.pt')):
            decoder = lib.load_decoder(folder, where, dtype)
            said, is_ = decoder.encoder_fingerprint, lib.fingerprint(encoder.model)
            if abs(said - is_) > 1e-6 * abs(is_):
                print(f'{folder}/decoder.pt was trained on another encoder than {path}: it is left out')
                decoder = None
        if decoder and os.path.exists(os.path.join(folder, 'language_model.pt')):
            decoder.language_model = lib.load_decoder(folder, where, dtype, 'language_model')
        where = data_dir or encoder.settings['data_dir']
        train, val = Corpus(where, 'train'), Corpus(where, 'val')
    except (OSError, ValueError, ImportError) as error:
        raise Mistake(str(error)) from None
    if val.tokenizer_spec['sha256'] != encoder.tokenizer_sha256:
        raise Mistake(f'{where} was prepared with another tokenizer than {path} was trained on: give its --data_dir')
    return encoder, decoder, train, val


def evaluate(encoder, decoder, train_corpus, corpus, sts_pairs, judged_by=None):
    """All metrics as {section: {row: {column: number}}}, and what the samples and pictures need."""
    rng = np.random.default_rng(seed)
    steps = tqdm(total=10 if decoder else 7, desc='evaluate', disable=not sys.stderr.isatty())

    def progress(name):
        steps.set_description(name)
        steps.update(1)
        if steps.disable:  # a log
            print(f'evaluate.py: {name}', file=sys.stderr, flush=True)

    # concepts, predictions and their baselines
    items = Items(corpus, rng, max_pairs, context=eval_context)
    train = Items(train_corpus, rng, np.inf, max_train_sentences, eval_context, each=None)
    z_all, z_train_all = (encoder.encode_tokens(x.sentences, batch_size, False) for x in (items, train))
    document = items.document[items.target]
    progress('predict')

    z, z_train = z_all[items.target], z_train_all[train.target]
    mean_target = z_train.mean(0)

    def predictions(by, x, concepts):
        if by.model.config.context == 'concepts':  # at hand: not encoded again
            return by.roll(concepts, x.windows)
        return by.predict_windows(x.sentences, x.windows, batch_size)

    def predictors(x, z_all):
        mean = unit(np.stack([z_all[a:b].mean(0) for a, b in x.windows]))
        p = predictions(encoder, x, z_all)
        return {'model': p, 'copy-last': z_all[x.target - 1], 'context mean': mean,
                'shuffled context': np.roll(p, len(p) // 3, 0),
                'mean target': np.repeat(unit(mean_target)[None], len(p), 0)}
    train_p, p_by = predictors(train, z_train_all), predictors(items, z_all)
    scale = {k: float((p * z_train).sum() / (p * p).sum()) for k, p in train_p.items()}
    (w, b), scale['ridge'] = fit_ridge(train_p['context mean'], z_train, train.document[train.target])
    p_by['ridge'] = (p_by['context mean'] @ w + b).astype(np.float32)

    candidates = items.candidates(rng, eval_context)
    other = candidates['a'][:, 1]  # another sentence of the document
    far = np.roll(items.target, len(z) // 2)
    far_ok, near_ok = items.document[far] != document, other >= 0
    sections = {'feature similarity': {}, 'retrieval in document': {}, 'retrieval corpus': {}}
    for name, p in p_by.items():
        value, low, high = skills(p, z, mean_target, scale[name], document)
        p = unit(p)
        sections['feature similarity'][name] = {
            'skill': value, 'skill_low': low, 'skill_high': high, 'cos_true': float((p * z).sum(1).mean()),
            'cos_in_document': float((p * z_all[other]).sum(1)[near_ok].mean()) if near_ok.any() else 0.0,
            'cos_unrelated': float((p * z_all[far]).sum(1)[far_ok].mean()) if far_ok.any() else 0.0}

    # retrieval: the same items for all, each in its own space
    progress('retrieval')
    random = random_encoder(encoder, train.sentences[:4000], seed + 1)
    r_all = random.encode_tokens(items.sentences, batch_size, False)
    table = encoder.model.target.embedding.weight.detach().cpu().numpy()
    t_all = token_means(table, items.sentences)
    t_all = unit(t_all - t_all.mean(0))
    matrix, vector = tfidf(items.sentences, train.sentences)

    def dense(query, all_):
        return lambda at: torch.from_numpy(query[at]) @ torch.from_numpy(all_).T

    def sparse(at):
        out = []
        for part in np.array_split(at, max(len(at) // 64, 1)):
            q = torch.zeros(matrix.shape[1], len(part))
            for j, i in enumerate(part):
                index, value = vector(np.concatenate(items.sentences[items.start[i]:items.target[i]]))
                q[torch.from_numpy(index), j] = torch.from_numpy(value).float()
            out.append((matrix @ q).T)
        return torch.cat(out)

    def window_mean(all_):
        return unit(np.stack([all_[a:b].mean(0) for a, b in items.windows]))
    spaces = {name: dense(unit(p), z_all) for name, p in p_by.items() if name != 'mean target'}
    spaces |= {'random encoder': dense(predictions(random, items, r_all), r_all),
               'token mean': dense(window_mean(t_all), t_all), 'TF-IDF of the window': sparse}
    place = {}
    for name, similar in spaces.items():
        place[name] = {k: ranks(similar, c) for k, c in candidates.items()}
        (a, _), (b, top), (c, _) = (place[name][k] for k in ('a', 'b', 'corpus'))
        row = sections['retrieval in document'][name] = {}
        for column, values in (('R@1', a == 1), ('MRR', 1 / a)):
            row[column], row[column + '_low'], row[column + '_high'] = bootstrap(values, document)
        row |= {'R@1 (b)': float((b == 1).mean()), 'MRR (b)': float((1 / b).mean()),
                'copy rate': float(((top >= items.start) & (top < items.target)).mean())}
        row = sections['retrieval corpus'][name] = {'R@1': float((c == 1).mean()), 'R@10': float((c <= 10).mean())}
        row['MRR'], row['MRR_low'], row['MRR_high'] = bootstrap(1 / c, document)
    gain = sections['what is learned'] = {}
    copy = scale['copy-last'] * p_by['copy-last']
    more = {'skill over copy-last': skills(p_by['model'], z, mean_target, scale['model'], document, copy)}
    for key, where in (('a', 'in document'), ('corpus', 'in corpus')):
        ours, untrained = (1 / place[k][key][0] for k in ('model', 'random encoder'))
        more[f'MRR {where} over the random encoder'] = bootstrap(ours - untrained, document)
    for name, values in more.items():
        gain[name] = dict(zip(('gain', 'gain_low', 'gain_high'), values))
    for section, key in (('retrieval in document', 'a'), ('retrieval corpus', 'corpus')):
        one, mrr = chance(candidates[key])
        sections[section]['chance'] = {'R@1': one, 'MRR': mrr}

    progress('geometry')
    few = rng.permutation(len(z_all))[:20_000]
    noise = unit(rng.standard_normal((len(few), z_all.shape[1])))
    sections['geometry'] = {'model': geometry(z_all[few], rng), 'random encoder': geometry(r_all[few], rng),
                            'Gaussian': geometry(noise, rng)}

    # large concept model's measures (Barrault et al. 2024, arXiv:2412.08821)
    p = p_by['model']
    sections['contrast'] = {}
    rand = z[rng.permutation(len(z))]
    for name, q in p_by.items():
        q = unit(q)
        near = np.array([(z_all[a:b] @ q[i]).max() / max((z_all[a:b] @ z[i]).max(), 0.05)
                         for i, (a, b) in enumerate(items.windows)])
        sections['contrast'][name] = {'CA': float((((q - z) ** 2).sum(1) < ((q - rand) ** 2).sum(1)).mean()),
                                      'PAR': float(np.median(near))}
    progress('STS')
    df = np.zeros(encoder.model.config.vocab_size)
    for ids in train.sentences:
        df[np.unique(ids)] += 1
    idf = np.log((1 + len(train.sentences)) / (1 + df))
    if sts_pairs:
        sections['STS, Spearman x 100'] = {}
        for name, rows in sts_pairs.items():
            for row, value in sts_scores(rows, encoder, random, idf).items():
                sections['STS, Spearman x 100'].setdefault(row, {})[name] = value

    keep = {'items': items, 'z_all': z_all, 'p': p, 'texts': None, 'r_all': r_all}
    progress('rollout')
    if encoder.model.config.context == 'concepts':
        rows = horizons(encoder, decoder, train, items, z_train_all, z_all, mean_target, rng)
        sections |= {'rollout, sentences ahead': rows} if rows else {}
    if decoder:
        sections |= decode(decoder, encoder, items, z, p, z_all, mean_target, scale['mean target'], document, rng,
                           progress, keep, judged_by)
    steps.close()
    counts = {'pairs': len(z), 'documents': int(items.document[-1]) + 1, 'sentences': len(z_all),
              'train sentences read': len(z_train_all), 'train pairs': len(z_train)}
    return sections, counts, keep


def decode(decoder, encoder, items, z, p, z_all, mean_target, mean_sure, document, rng, progress, keep,
           judged_by):
    """Sections of what the decoder writes, and of what it says about the true sentences."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    at = np.sort(rng.permutation(len(z))[:max_generated])
    text = encoder.tokenizer.decode
    truth = [text(items.sentences[i]) for i in items.target[at]]
    progress('write')
    shuffled = np.roll(np.arange(len(at)), len(at) // 2)
    concepts = unit(z[at])
    with torch.inference_mode(), decoder.autocast:
        none = decoder.model.generate(torch.zeros(1, z.shape[1], device=decoder.device),
                                      sure=torch.zeros(1, device=decoder.device))[0].tolist()
    eos = decoder.model.config.eos
    none = decoder.tokenizer.decode(none[:none.index(eos)] if eos in none else none)
    sure = decoder.prediction_sure
    rebuilt = decoder.generate(concepts, batch_size=batch_size)
    predicted = decoder.generate(p[at], batch_size=batch_size, sure=sure)
    wrote = {'reconstruct': rebuilt, 'reconstruct, shuffled concept': [rebuilt[i] for i in shuffled],
             'predict': predicted, 'predict, shuffled concept': [predicted[i] for i in shuffled],
             'no concept': [none] * len(at),
             'copy-last': [text(items.sentences[i - 1]) for i in items.target[at]]}
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    out = {'text': {}, 'perplexity': {}, 'round trip': {}}
    for name, texts in wrote.items():
        rouge = [scorer.score(t, w) for t, w in zip(truth, texts)]
        out['text'][name] = {'BLEU': sacrebleu.corpus_bleu(texts, [truth]).score,
                             'chrF': sacrebleu.corpus_chrf(texts, [truth]).score}
        for kind in ('1', '2', 'L'):
            f1 = np.mean([r[f'rouge{kind}'].fmeasure for r in rouge])
            out['text'][name][f'ROUGE-{kind}'] = 100 * float(f1)
    if judged_by:
        said = judged_by(truth)
        out['judge'] = {name: dict(zip(('cosine', 'cosine_low', 'cosine_high'),
                                       bootstrap((judged_by(texts) * said).sum(1), document[at])))
                        for name, texts in wrote.items()}
    keep['texts'] = {'at': at, 'truth': truth, 'reconstruct': rebuilt, 'predict': predicted}

    progress('perplexity')
    some = np.sort(rng.permutation(len(z))[:max_scored])
    sentences = [items.sentences[i] for i in items.target[some]]
    tokens = np.array([len(s) + 1 for s in sentences])  # the end of the sentence counts
    size = np.array([len(text(s).encode()) for s in sentences])
    roll = np.roll(some, len(some) // 2)
    given = {'D(z)': z[some], 'D(z), shuffled': z[roll], 'D(p)': p[some], 'D(p), shuffled': p[roll],
             'mean concept': np.repeat(unit(mean_target)[None], len(some), 0), 'no concept': None}
    as_sure = {'D(p)': sure, 'D(p), shuffled': sure, 'mean concept': min(max(mean_sure, 0), 1)}
    nats = {name: decoder.nll(sentences, c, batch_size, as_sure.get(name, 1.0)) for name, c in given.items()}
    if decoder.language_model:
        before = [items.sentences[items.start[i]:items.target[i]] for i in some]
        nats['language model, reading the window'] = decoder.language_model.nll_in_context(sentences, before)
    for name, n in nats.items():
        mean, low, high = bootstrap(n / tokens, document[some], tokens)
        gain, gain_low, gain_high = bootstrap((nats['no concept'] - n) / tokens, document[some], tokens)
        out['perplexity'][name] = {'nats per token': mean, 'low': low, 'high': high, 'perplexity': float(np.exp(mean)),
                                   'bits per byte': float(n.sum() / np.log(2) / size.sum()), 'information': gain,
                                   'information_low': gain_low, 'information_high': gain_high}
    progress('round trip')
    again = {'D(z)': encoder.encode(rebuilt), 'D(p)': encoder.encode(predicted)}
    out['round trip']['cos(E(D(z)), z)'] = {'model': float((again['D(z)'] * z[at]).sum(1).mean()),
                                            'shuffled': float((again['D(z)'] * z[at][shuffled]).sum(1).mean())}
    gap = np.linalg.norm(again['D(p)'] - z[at], axis=1) - np.linalg.norm(p[at] - z[at], axis=1)
    out['round trip']['‖E(D(p)) − z‖ − ‖p − z‖'] = {'model': float(gap.mean())}
    return out


def roll_out(items, z_all, starts, predict, feed, context):
    """Concepts expected 1 to HORIZON sentences after the windows of the pairs `starts`: (HORIZON, n, d).

    predict(concepts, windows) reads at most `context` concepts, first those of a window, then what feed(p) makes of the
    predictions so far: themselves, or the concepts of the sentences they were written as.
    """
    read, out = [z_all[items.start[i]:items.target[i]] for i in starts], []
    for _ in range(HORIZON):
        read = [r[-context:] for r in read]
        ends = np.cumsum([len(r) for r in read])
        p = predict(np.concatenate(read), list(zip(ends - [len(r) for r in read], ends)))
        out.append(p)
        read = [np.concatenate((r, f[None])) for r, f in zip(read, feed(p))]
    return np.stack(out)


def horizons(encoder, decoder, train, items, z_train_all, z_all, mean_target, rng):
    """The section of predictions that are fed back, as concepts and as text, beside the last sentence read."""
    rows, starts, context = {}, [], max(items.target - items.start)
    for x in (train, items):
        far = np.minimum(x.target + HORIZON - 1, len(x.document) - 1)
        whole = np.flatnonzero((x.document[far] == x.document[x.target]) & (far - x.target == HORIZON - 1))
        starts.append(np.sort(rng.permutation(whole)[:MAX_ROLLOUTS]))
    if not all(map(len, starts)):
        return rows  # no document is long enough
    written = []

    def as_text(p):
        texts = decoder.generate(p, sure=decoder.prediction_sure, batch_size=batch_size)
        written.append(texts)
        return encoder.encode(texts)
    feeds = {'concepts': lambda p: p} | ({'text': as_text} if decoder else {})
    found = [{kind: roll_out(x, z, at, encoder.roll, feed, context) for kind, feed in feeds.items()}
             | {'copy-last': np.repeat(z[x.target[at] - 1][None], HORIZON, 0)}
             for x, z, at in zip((train, items), (z_train_all, z_all), starts)]
    at = starts[1]
    document = items.document[items.target[at]]
    first = np.searchsorted(items.document, np.arange(items.document[-1] + 2))
    for h in range(HORIZON):
        true = items.target[at] + h
        # the true one, and others of its document that were neither read nor passed over
        pools = [np.concatenate((np.arange(first[d], s), np.arange(t + 1, first[d + 1])))
                 for d, s, t in zip(document, items.start[at], true)]
        candidates = np.full((len(at), 32), -1)
        candidates[:, 0] = true
        for i, pool in enumerate(pools):
            candidates[i, 1:1 + min(31, len(pool))] = rng.permutation(pool)[:31]
        for kind in found[1]:
            (p_train, p), z = (f[kind][h] for f in found), z_all[true]
            z_train = z_train_all[train.target[starts[0]] + h]
            scale = float((p_train * z_train).sum() / max((p_train * p_train).sum(), 1e-12))
            row = rows[f'{kind}, {h + 1}'] = dict(zip(('skill', 'skill_low', 'skill_high'),
                                                      skills(p, z, mean_target, scale, document)))
            rank, _ = ranks(lambda i, p=p: torch.from_numpy(unit(p[i])) @ torch.from_numpy(z_all).T, candidates)
            row['MRR'], row['MRR_low'], row['MRR_high'] = bootstrap(1 / rank, document)
            row['chance'] = chance(candidates)[1]
            if kind == 'text':
                stories = list(zip(*written[HORIZON:HORIZON + h + 1]))  # of validation; those of training come first
                pairs = [[pair for text in story for pair in zip(text.split(), text.split()[1:])] for story in stories]
                row['distinct-2'] = float(np.mean([len(set(b)) / max(len(b), 1) for b in pairs]))
                row['repeated'] = float(np.mean([story[-1] in story[:-1] for story in stories]))
    return rows


def verdict(sections):
    """('learns' | 'topic only' | 'collapsed', the rule that gave it), and the baselines that beat the model."""
    f, g = sections['feature similarity'], sections['geometry']['model']
    inside, corpus, gain = (sections[k] for k in ('retrieval in document', 'retrieval corpus', 'what is learned'))
    share = g['rank_centred'] / g['dimensions']
    beaten = [f'{name} on {column} of {section}' for section, column in
              (('feature similarity', 'skill'), ('retrieval in document', 'MRR'), ('retrieval corpus', 'MRR'),
               ('STS, Spearman x 100', None)) if section in sections
              for column in ([column] if column else sections[section]['model'])
              for name, row in sections[section].items() if row[column] > sections[section]['model'][column]]
    if g['cos_random'] > 0.5 or share < 0.05 or f['model']['skill_high'] <= 0:
        return 'collapsed', (f"unrelated sentences have cosine {g['cos_random']:.2f} (rule: above .5), centred rank is "
                             f"{100 * share:.0f} % of the width (below 5 %), or skill {f['model']['skill']:.3f} is not "
                             'above 0'), beaten
    if inside['model']['MRR_low'] > inside['chance']['MRR'] and f['model']['skill_low'] > 0 and \
            all(row['gain_low'] > 0 for row in gain.values()):
        return 'learns', ('skill is above 0 and above copy-last, retrieval in the document above chance, and there and '
                          'in the corpus above the same model with random weights, by 95 % intervals'), beaten
    return 'topic only', (f"retrieval over the corpus has MRR {corpus['model']['MRR']:.3f} (chance "
                          f"{corpus['chance']['MRR']:.3f}), but skill over copy-last, or retrieval in the document "
                          'over chance and over the same model with random weights, is not shown by 95 % '
                          'intervals'), beaten


# ---------------------------------------------------------------------------------------------------------------
# Report

def number(v):
    return f'{v:,}' if isinstance(v, int) else f'{v:.3f}' if abs(v) < 10 else f'{v:.1f}'


def markdown(sections):
    """The tables; an interval stands behind its number."""
    out = []
    for title, rows in sections.items():
        columns = list(dict.fromkeys(c for r in rows.values() for c in r if not c.endswith(('low', 'high'))))
        out += [f'### {title}', '', '| |' + ' | '.join(columns) + ' |', '|---|' + '---:|' * len(columns)]
        for name, row in rows.items():
            cells = []
            for c in columns:
                low = row.get(f'{c}_low', row.get('low') if c == 'nats per token' else None)
                high = row.get(f'{c}_high', row.get('high') if c == 'nats per token' else None)
                interval = f' ({number(low)} to {number(high)})' if low is not None else ''
                cells.append(number(row[c]) + interval if c in row else '')
            out.append(f'| {name} | ' + ' | '.join(cells) + ' |')
        out.append('')
    return '\n'.join(out)


def escape(text):
    """Text that markdown shows as it is."""
    return ''.join('\\' + c if c in '\\`*_{}[]<>()#+-!|~' else c for c in text.replace('\n', ' '))


def samples(encoder, keep, rng):
    """A dozen samples, chosen by seed."""
    items, texts, text = keep['items'], keep['texts'], encoder.tokenizer.decode
    pool = texts['at'] if texts else np.arange(len(items.target))
    out = []
    for j in np.sort(rng.permutation(len(pool))[:n_samples]):
        i = pool[j]
        near = np.argsort(-(keep['z_all'] @ keep['p'][i]), kind='stable')[:3]
        lines = [('context', ' / '.join(text(s) for s in items.sentences[items.start[i]:items.target[i]][-3:])),
                 ('true next', text(items.sentences[items.target[i]]))]
        if texts:
            lines += [('reconstruction', texts['reconstruct'][j]), ('prediction', texts['predict'][j])]
        lines += [(f'nearest {k + 1}', text(items.sentences[n])) for k, n in enumerate(near)]
        out.append('\n'.join(f'- **{k}**: {escape(v)}' for k, v in lines))
    return '\n\n---\n\n'.join(out)


def pictures(folder, sections, keep):
    """Retrieval against baselines, singular values, and cosines; returns their file names."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'figure.figsize': (7, 3.6), 'figure.dpi': 110, 'axes.grid': True, 'grid.alpha': 0.3,
                         'axes.spines.top': False, 'axes.spines.right': False, 'savefig.bbox': 'tight'})
    names = []

    def save(name):
        plt.savefig(os.path.join(folder, name), metadata={'Software': None})
        plt.close()
        names.append(name)
    rows = {k: v for k, v in sections['retrieval corpus'].items() if 'MRR_low' in v}
    y = np.arange(len(rows))[::-1]
    _, axes = plt.subplots(1, 2, sharey=True)
    for axis, section, title in zip(axes, ('retrieval in document', 'retrieval corpus'), ('in document (a)', 'corpus')):
        r = [sections[section][k] for k in rows]
        m = np.array([v['MRR'] for v in r])
        axis.barh(y, m, xerr=[m - [v['MRR_low'] for v in r], [v['MRR_high'] for v in r] - m], capsize=2,
                  color=['0.25'] + ['0.75'] * (len(rows) - 1), edgecolor='black')
        axis.axvline(sections[section]['chance']['MRR'], color='black', linestyle=':', label='chance')
        axis.set(title=title, xlabel='mean reciprocal rank, 95 % interval', yticks=y, yticklabels=list(rows))
    axes[1].legend(frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1.12))
    save('retrieval.png')

    plt.figure()
    for name, x, style in (('model', keep['z_all'], '-'), ('random encoder', keep['r_all'], '--'),
                           ('Gaussian', unit(np.random.default_rng(0).standard_normal(keep['z_all'].shape)), ':')):
        s = torch.linalg.svdvals(torch.from_numpy(x - x.mean(0))).numpy()
        plt.semilogy(np.arange(1, len(s) + 1), s / max(s.sum(), 1e-12), style, color='black', label=name)
    plt.xlabel('singular value, by size')
    plt.ylabel('share of their sum')
    plt.legend(frameon=False)
    save('spectrum.png')

    items, p, z_all = keep['items'], keep['p'], keep['z_all']
    plt.figure()
    for label, q, hatch in (('true next', items.target, ''), ('same document', items.start, '///'),
                            ('unrelated', np.roll(items.target, len(p) // 2), '...')):
        plt.hist((p * z_all[q]).sum(1), bins=np.linspace(-0.6, 1, 65), density=True, histtype='step', hatch=hatch,
                 label=label, color={'': 'black', '///': '0.4', '...': '0.65'}[hatch])
    plt.xlabel('cosine of prediction and concept')
    plt.ylabel('density')
    plt.legend(frameon=False)
    save('cosines.png')

    ahead = sections.get('rollout, sentences ahead', {})
    if ahead:
        x = np.arange(1, HORIZON + 1)
        _, axes = plt.subplots(1, 2)
        for kind, style in (('concepts', 'o-'), ('text', 's--'), ('copy-last', '^:')):
            rows = [ahead[f'{kind}, {h}'] for h in x if f'{kind}, {h}' in ahead]
            for axis, column in zip(axes, ('skill', 'MRR')):
                if rows:
                    axis.plot(x, [r[column] for r in rows], style, color='black', markersize=4, label=kind)
        axes[1].plot(x, [ahead[f'copy-last, {h}']['chance'] for h in x], color='0.7', label='chance')
        axes[0].set(xlabel='sentences ahead', ylabel='skill')
        axes[1].set(xlabel='sentences ahead', ylabel='MRR in the document')
        axes[1].legend(frameon=False)
        plt.tight_layout()
        save('horizon.png')

    path = os.path.join(folder, 'metrics.csv')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            log = [r for r in csv.DictReader(f) if r['val_mrr']]
        if len(log) > 1:
            x = [int(r['tokens']) / 1e6 for r in log]
            _, axes = plt.subplots(1, 2)
            for axis, pair, label in ((axes[0], ('val_mrr', 'val_copy_mrr'), 'MRR, validation rows'),
                                      (axes[1], ('val_skill', 'val_copy_skill'), 'skill')):
                for key, style, name in zip(pair, ('-', '--'), ('model', 'copy-last')):
                    axis.plot(x, [float(r[key]) for r in log], style, color='black', label=name)
                axis.set(xlabel='million tokens of training', ylabel=label)
                axis.legend(frameon=False)
            plt.tight_layout()
            save('training.png')
    return names


def answer(encoder, decoder, corpus, text):
    """Print what the models make of the sentences of a prompt."""
    sentences = split_sentences(text)
    if not sentences:
        raise Mistake('--prompt holds no sentence')
    items = Items(corpus, np.random.default_rng(seed), max_pairs, 20_000, eval_context)
    z_all, z = encoder.encode_tokens(items.sentences), encoder.encode(sentences)
    write = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'seed': seed}

    def nearest(v):
        for i in np.argsort(-(z_all @ v), kind='stable')[:3]:
            print(f'    {z_all[i] @ v:.2f}  {encoder.tokenizer.decode(items.sentences[i])}')
    for i, sentence in enumerate(sentences):
        print(f'sentence: {sentence}')
        if decoder:
            print(f'  reconstruction: {decoder.generate(z[i:i + 1], **write)[0]}')
        print('  nearest in validation:')
        nearest(z[i])
    if steps > 1 and not decoder:
        raise Mistake(f'--steps={steps} needs a decoder to write with: train_decoder.py makes one')
    for step in range(steps):
        p = encoder.predict(sentences)
        words = decoder and decoder.generate(p[None], sure=decoder.prediction_sure, **write | {'seed': seed + step})[0]
        print(f'next sentence, in words: {words}' if decoder else 'next sentence:')
        print('  nearest in validation:')
        nearest(p)
        sentences.append(words)


def main():
    """Evaluate, or answer a prompt."""
    encoder, decoder, train_corpus, corpus = load(out_dir)
    folder = out_dir if os.path.isdir(out_dir) else os.path.dirname(out_dir)
    if any(a.startswith('--prompt=') for a in sys.argv):  # an empty one too: a mistake, not minutes of evaluation
        answer(encoder, decoder, corpus, prompt)
        return
    if not decoder:
        print(f'no decoder in {folder}: text and perplexity are left out, and what --judge says of them '
              '(train_decoder.py makes one)')
    if not sts:
        print('STS is left out: --sts=<file of score, s1, s2>, or --sts=hub')
    judged_by = judge_encoder(judge) if judge else None  # a mistake in these two is told before minutes of work
    sections, counts, keep = evaluate(encoder, decoder, train_corpus, corpus, sts_files(sts) if sts else {}, judged_by)
    word, rule, beaten = verdict(sections)
    table = markdown(sections)
    names = pictures(folder, sections, keep)
    behind = 'Baselines ahead of the model: ' + ('; '.join(beaten) if beaten else 'none') + '.'
    report = '\n\n'.join([f'# {word}', f'Rule: {rule}.', behind,
                          ', '.join(f'{v:,} {k}' for k, v in counts.items())
                          + '. In brackets: 95 % intervals over documents.',
                          '## Metrics', table, '## Pictures', '\n'.join(f'![{n[:-4]}]({n})' for n in names),
                          '## Samples', samples(encoder, keep, np.random.default_rng(seed))]) + '\n'
    with open(os.path.join(folder, 'report.md'), 'w', encoding='utf-8') as f:
        f.write(report)
    with open(os.path.join(folder, 'metrics.json'), 'w', encoding='utf-8') as f:
        json.dump({'verdict': word, 'rule': rule, 'ahead of the model': beaten, 'counts': counts, 'metrics': sections,
                   'settings': settings}, f, indent=1)
    print(table)
    print(f'{behind}\n{word}: {rule}.\n{folder}/report.md has samples and pictures')


if __name__ == '__main__':
    settings = override(globals(), limits={
        **dict.fromkeys(('eval_context', 'max_pairs', 'max_train_sentences', 'max_generated', 'max_scored', 'n_samples',
                         'batch_size', 'steps'), (1, np.inf)),
        **dict.fromkeys(('temperature', 'top_k', 'seed'), (0, np.inf)), 'top_p': (1e-6, 1)})
    try:
        main()
    except (Mistake, OSError) as error:
        raise SystemExit(f'evaluate.py: {error}') from None
    except KeyboardInterrupt:
        print('evaluate.py: interrupted, nothing was written', file=sys.stderr)
        raise SystemExit(130) from None
