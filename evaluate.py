"""Every metric beside its baselines: a table, metrics.json and report.md with samples and pictures.

    python evaluate.py --out_dir=out/demo --sts=stsb-dev.csv
    python evaluate.py --out_dir=out/demo --prompt="He went up to the city. The gates were shut." --steps=3
    python evaluate.py --out_dir=out/demo --interpolate="He went up to the city. || The gates were shut."

All on the validation split. PARTS lists what is measured; ties take the worst rank, so that a constant model
scores nothing.
"""

import csv
import os
import sys
from json import dumps

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from tqdm import tqdm

import model as lib
from config import override
from prepare import Corpus, Mistake, read_file, split_sentences, write_json, write_text

# ---------------------------------------------------------------------------------------------------------------
# Settings: override with --name=value
out_dir = 'out/fineweb'  # encoder.pt, and decoder.pt where there is one
data_dir = ''  # what prepare.py wrote; '': what the encoder was trained on
eval_context = 8  # sentences before the one predicted that the predictor and the baselines read
max_pairs = 10_000  # (context, next sentence) pairs, at most 5 a document
max_train_sentences = 20_000  # train sentences read for mean, scalars, ridge, idf and probes
max_generated = 500  # sentences written for BLEU, ROUGE and chrF
max_scored = 2000  # sentences scored for perplexity
n_samples = 12  # samples in the report, chosen by seed
sts = ''  # files of sentence pairs with a score: file[,file]; 'hub' downloads STS-B
judge = ''  # folder or name of a sentence-transformers model that compares what was written with the truth
# instead of the evaluation: sentences to reconstruct and go on from
prompt = ''  # '-' reads standard input
prompt_file = ''
steps = 1  # sentences to go on for, each read as it was written
num_samples = 1  # such continuations
interpolate = ''  # 'one sentence || another': sentences from between their concepts
corpus = ''  # file of texts to find the nearest sentences in; '': the validation split
json = False  # print json: the answer, or what metrics.json holds
max_new_tokens = 64  # of a sentence
temperature = 0.0  # 0 takes the likeliest token
top_k = 0  # sample among so many likeliest; 0: all
top_p = 1.0  # and among the likeliest that make up this probability
batch_size = 64
device = 'auto'
dtype = 'float32'  # or 'bfloat16' (autocast) for the forward passes; metrics are fp32 always
seed = 1337

HORIZON = 8  # sentences that predictions are fed back for
MAX_ROLLOUTS = 200  # windows that this is done from
PROBED = 6000  # sentences of each split that probes read


# ---------------------------------------------------------------------------------------------------------------
# Items: which sentences are predicted from which, and what they are told from

class Items:
    """Sentences of some documents and the pairs drawn from them.

    sentences: token ids, all documents end to end; document (N,): of each sentence; target (n,): the sentence to be
    predicted; start (n,): the first sentence of its window, which ends before the target.
    """

    def __init__(self, data, rng, n_pairs, n_sentences=None, context=8, each=5):
        self.sentences, document, target, start = [], [], [], []
        for number, d in enumerate(rng.permutation(data.n_documents)):
            ids, base = data.document(d), len(self.sentences)
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
        self.first = np.searchsorted(self.document, np.arange(self.document[-1] + 2))  # sentence of each document

    def others(self, rng, start, target, n=31):
        """Up to n sentences of the document of `target`, neither in start..target nor the target itself."""
        d = self.document[target]
        pool = np.concatenate((np.arange(self.first[d], start), np.arange(target + 1, self.first[d + 1])))
        return rng.permutation(pool)[:n]

    def candidates(self, rng, context, others=31):
        """Candidate sentences of each pair, -1 where there are fewer, the true one first: (a), (b), corpus."""
        one = rng.integers(self.first[:-1], self.first[1:])  # a sentence of each document
        one = one[np.sort(rng.permutation(len(one))[:10_000])]
        n = len(self.target)
        repeats = np.full((n, 1 + others + context), -1)
        corpus = np.empty((n, 1 + len(one)), np.int32)
        for i, (s, t) in enumerate(self.windows):
            pool = self.others(rng, s, t, others)
            repeats[i, 0] = corpus[i, 0] = t
            repeats[i, 1:1 + len(pool)] = pool
            repeats[i, 1 + others:1 + others + t - s] = np.arange(s, t)
            corpus[i, 1:] = np.where(self.document[one] == self.document[t], -1, one)
        return {'a': repeats[:, :1 + others], 'b': repeats, 'corpus': corpus}


# ---------------------------------------------------------------------------------------------------------------
# Measures on arrays

def unit(x):
    """x (..., d) at length 1, float32; a zero vector stays zero."""
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def cosine(a, b):
    """Cosines (n,) of the rows of a and b (n, d) of unit norm."""
    return (a * b).sum(1)


def bootstrap(values, document, weights=None, n=1000, seed=0):
    """Mean of values (n,), weighted, and its 95 % interval by resampling documents: (mean, low, high)."""
    weights = np.ones(len(values)) if weights is None else weights
    _, of = np.unique(document, return_inverse=True)
    top, bottom = np.bincount(of, values * weights), np.bincount(of, weights)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(top), np.full(len(top), 1 / len(top)), size=n)
    means = (times @ top) / np.maximum(times @ bottom, 1e-12)
    return float(top.sum() / bottom.sum()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def cells(column, values):
    """Cells of a table's row of (value, low, high)."""
    return dict(zip((column, f'{column}_low', f'{column}_high'), values))


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
    """Skill, 1 - sum |scale p - z|^2 / sum |mean - z|^2, with its interval over documents.

    With `base`, predictions times their scale: how much more skill p has than they, on the same resampled documents.
    """
    size = ((mean - z) ** 2).sum(1)
    if size.mean() < 1e-9:
        return 0.0, 0.0, 0.0
    from_ = size if base is None else ((base - z) ** 2).sum(1)
    return bootstrap((from_ - ((scale * p - z) ** 2).sum(1)) / np.maximum(size, 1e-12), document, size)


def fit_ridge(x, y, document):
    """(predict, scale): ridge regression of y on x (n, d), its penalty and scale the best on documents held out."""
    splits = GroupKFold(min(5, len(np.unique(document))))
    if splits.n_splits < 2:
        return Ridge().fit(x, y).predict, 1.0
    size = len(x) * float(x.var(0).mean())
    search = GridSearchCV(Ridge(), {'alpha': [(size + 1e-9) * a for a in (0.1, 1, 10, 100)]}, cv=splits,
                          scoring='neg_mean_squared_error').fit(x, y, groups=document)
    held_out = cross_val_predict(search.best_estimator_, x, y, groups=document, cv=splits)
    return search.predict, lib.fit_scale(held_out, y)


def spearman(a, b, n=1000):
    """Spearman's correlation x 100, average ranks for ties, with its 95 % interval over pairs: (value, low, high).

    0, not NaN, where one is constant; to six places, since what a product rounds differently is no order.
    """
    rng, (a, b) = np.random.default_rng(0), (np.round(np.asarray(v, float), 6) for v in (a, b))

    def correlation(at):
        x, y = (rankdata(v[at]) - (len(at) + 1) / 2 for v in (a, b))
        return 100 * float(x @ y / max(np.sqrt((x @ x) * (y @ y)), 1e-9))
    drawn = [correlation(rng.integers(0, len(a), len(a))) for _ in range(n)]
    return correlation(np.arange(len(a))), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def geometry(x, rng):
    """How a cloud of unit vectors x (n, d) fills its space."""
    t = torch.from_numpy(x)
    s = torch.linalg.svdvals(t - t.mean(0)).double() ** 2
    a, b = x[rng.permutation(len(x))], x[rng.permutation(len(x))]
    return {'RankMe, centred': lib.rank_me(t - t.mean(0)), 'RankMe': lib.rank_me(t),
            'participation': float(s.sum() ** 2 / (s ** 2).sum()) if s.sum() > 1e-9 else 1.0,
            'cosine of random pairs': float(cosine(a, b).mean()),
            'uniformity': float(np.log(np.exp(-2 * ((a - b) ** 2).sum(1)).mean())),
            '√d × deviation': float(x.std(0).mean() * x.shape[1] ** 0.5), 'sentences': len(x), 'dimensions': x.shape[1]}


def text_scores(texts, truth):
    """BLEU (13a, 95 % interval over sentences) and chrF of sacrebleu, mean ROUGE F1 x 100 of rouge_score."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF
    bleu = BLEU().corpus_score(texts, [truth], n_bootstrap=1000)
    scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    rouge = [scorer.score(t, w) for t, w in zip(truth, texts)]
    return cells('BLEU', (bleu.score, bleu._mean - bleu._ci, bleu._mean + bleu._ci)) | \
        {'chrF': CHRF().corpus_score(texts, [truth]).score} | \
        {f'ROUGE-{k}': 100 * float(np.mean([r[f'rouge{k}'].fmeasure for r in rouge])) for k in '12L'}


def roll_out(windows, predict, feed, context):
    """Concepts expected 1 to HORIZON sentences after each of the `windows`, lists of what is read: (HORIZON, n, d).

    predict(read, windows) reads at most `context` of them, first those of a window, then what feed(p) makes of the
    predictions so far: themselves, or the sentences they were written as.
    """
    read, out = [list(w) for w in windows], []
    for _ in range(HORIZON):
        read = [r[-context:] for r in read]
        ends = np.cumsum([len(r) for r in read])
        p = predict([x for r in read for x in r], list(zip(ends - [len(r) for r in read], ends)))
        out.append(p)
        for r, f in zip(read, feed(p)):
            r.append(f)
    return np.stack(out)


# ---------------------------------------------------------------------------------------------------------------
# Baselines, and what is read from outside

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
            out[i] = np.average(table[ids], 0, None if weight is None else weight[ids] + 1e-12)
    return out


def tfidf(idf_from):
    """Function of lists of token ids to sparse unit-norm rows of hashed 1- and 2-grams, their idf from `idf_from`."""
    def as_text(sequences):
        return [' '.join(map(str, ids)) for ids in sequences]
    counts = HashingVectorizer(token_pattern=r'\S+', ngram_range=(1, 2), alternate_sign=False, norm=None)
    fitted = make_pipeline(counts, TfidfTransformer(sublinear_tf=True)).fit(as_text(idf_from))
    return lambda sequences: fitted.transform(as_text(sequences))


def read_sts(path):
    """(score, sentence, sentence) rows of a .csv or .tsv file, score first or last, header or none.

    Raises Mistake, naming the line, where a row is not of that form.
    """
    def is_score(text):
        try:
            return bool(np.isfinite(float(text)))
        except ValueError:
            return False
    rows, last = [], None
    try:
        with open(path, encoding='utf-8', newline='') as f:
            tabs = '\t' in f.readline()
            f.seek(0)
            reader = csv.reader(f, delimiter='\t', quoting=csv.QUOTE_NONE) if tabs else csv.reader(f)
            for row in filter(None, reader):
                if last is None and len(row) >= 3 and (is_score(row[-1]) or is_score(row[0])):
                    last = is_score(row[-1])
                if last is None and reader.line_num == 1:
                    continue  # a header
                right = len(row) == 3 or (tabs and len(row) > 3)
                if last is None or not right or not is_score(row[-1] if last else row[0]):
                    raise Mistake(f'{path}, line {reader.line_num}: expected a score, first or last in every row, and '
                                  'two sentences (in quotes where they have commas)')
                rows.append((float(row[-1]), *row[-3:-1]) if last else (float(row[0]), *row[1:3]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Mistake(f'cannot read --sts={path}: {error}') from None
    if not rows:
        raise Mistake(f'{path}: no pair of sentences in it')
    return rows


def sts_files(names):
    """{name: rows} of the setting `sts`."""
    if names != 'hub':
        return {os.path.basename(n): read_sts(n) for n in filter(None, names.split(','))}
    try:
        import datasets
        return {f'STS-B {split}': [(r['score'], r['sentence1'], r['sentence2']) for r in
                                   datasets.load_dataset('sentence-transformers/stsb', split=split)]
                for split in ('validation', 'test')}
    except Exception as error:  # the client raises dozens of kinds for a hub that is out of reach
        raise Mistake(f'cannot download STS-B ({type(error).__name__}): give --sts=<file of score, s1, s2>') from None


def judge_encoder(name):
    """Function of a list of str to unit-norm vectors (n, d) of a sentence-transformers model; None without a name."""
    if not name:
        return None
    try:
        from sentence_transformers import SentenceTransformer  # optional: pip install sentence-transformers
        net = SentenceTransformer(name, device='cpu')
    except ImportError:
        raise Mistake('--judge needs `pip install sentence-transformers`') from None
    except (OSError, ValueError) as error:
        raise Mistake(f'cannot load --judge={name}: {str(error).splitlines()[0]} (give a folder)') from None
    return lambda texts: net.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def load(path):
    """Encoder, decoder or None, and corpora of a run; raises Mistake."""
    if dtype not in ('float32', 'bfloat16'):
        raise Mistake(f"--dtype={dtype}: expected 'float32' or 'bfloat16'")
    folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    try:
        where = lib.pick_device(device)
        encoder, decoder = lib.load_encoder(path, where, dtype), None
        if os.path.exists(os.path.join(folder, 'decoder.pt')):
            decoder = lib.load_decoder(folder, where, dtype)
            if abs(decoder.encoder_fingerprint / lib.fingerprint(encoder.model) - 1) > 1e-6:
                print(f'{folder}/decoder.pt was trained on another encoder than {path}: it is left out (remove it '
                      'and decoder_best.pt, and train it again)', file=sys.stderr)
                decoder = None
        if decoder and os.path.exists(os.path.join(folder, 'language_model.pt')):
            decoder.language_model = lib.load_decoder(folder, where, dtype, 'language_model')
        data = data_dir or encoder.settings['data_dir']
        train, val = Corpus(data, 'train'), Corpus(data, 'val')
    except (OSError, ValueError, ImportError) as error:
        raise Mistake(str(error)) from None
    if val.tokenizer_spec['sha256'] != encoder.tokenizer_sha256:
        raise Mistake(f'{data} was prepared with another tokenizer than {path} was trained on: give its --data_dir')
    return encoder, decoder, train, val


# ---------------------------------------------------------------------------------------------------------------
# The parts of the evaluation: each takes a Study and returns {section: {row: {column: number}}}

class Study:
    """What all parts read: sentences, their concepts, the model's predictions and those of its baselines."""

    def __init__(self, encoder, decoder, train_data, val_data, sts_pairs=None, judged_by=None):
        self.encoder, self.decoder, self.sts_pairs, self.judged_by = encoder, decoder, sts_pairs or {}, judged_by
        rng = np.random.default_rng(seed)
        self.items = Items(val_data, rng, max_pairs, context=eval_context)
        self.train = Items(train_data, rng, np.inf, max_train_sentences, eval_context, each=None)
        self.z_all, self.z_train_all = (self.concepts(encoder, x.sentences) for x in (self.items, self.train))
        self.random = random_encoder(encoder, self.train.sentences[:4000], seed + 1)
        self.r_all = self.concepts(self.random, self.items.sentences)
        self.document = self.items.document[self.items.target]
        self.z, z_train = self.z_all[self.items.target], self.z_train_all[self.train.target]
        self.mean = z_train.mean(0)
        train_p = self.predictors(self.train, self.z_train_all)
        self.p_by = self.predictors(self.items, self.z_all)
        self.scale = {k: lib.fit_scale(p, z_train) for k, p in train_p.items()}
        ridge, self.scale['ridge'] = fit_ridge(train_p['context mean'], z_train, self.train.document[self.train.target])
        self.p_by['ridge'] = ridge(self.p_by['context mean']).astype(np.float32)
        self.p, self.train_p = self.p_by['model'], train_p['model']
        self.candidates = self.items.candidates(rng, eval_context)
        self.texts = {}  # what the decoder wrote for the pairs `generated`
        self.generated = np.sort(rng.permutation(len(self.z))[:max_generated])
        self.counts = {'pairs': len(self.z), 'documents': int(self.items.document[-1]) + 1,
                       'sentences': len(self.z_all), 'train sentences read': len(self.z_train_all),
                       'train pairs': len(z_train)}

    @staticmethod
    def concepts(by, sentences):
        return by.encode_tokens(sentences, batch_size, False)

    @staticmethod
    def predictions(by, x, concepts):
        """Of the pairs of x, by the encoder `by`, whose concepts of x.sentences these are."""
        if by.model.config.context == 'concepts':  # at hand: not encoded again
            return by.roll(concepts, x.windows)
        return by.predict_windows(x.sentences, x.windows, batch_size)

    def predictors(self, x, z_all):
        p = self.predictions(self.encoder, x, z_all)
        return {'model': p, 'copy-last': z_all[x.target - 1], 'context mean': window_means(x, z_all),
                'shuffled context': np.roll(p, len(p) // 3, 0), 'mean target': np.tile(self.mean, (len(p), 1))}

    def text(self, ids):
        return self.encoder.tokenizer.decode(ids)

    def write(self, concepts):
        return self.decoder.generate(concepts, max_tokens=max_new_tokens, batch_size=batch_size)


def window_means(x, z_all):
    """Of the pairs of x, the mean of the z_all (N, d) of the window's sentences: longer where they agree."""
    return np.stack([z_all[a:b].mean(0) for a, b in x.windows])


def leak(s):
    """Distance of predictions from those with other sentences after them: 0, or the answer was read.

    Of the encoder as used here, given the window alone, and of its model on rows that go on, as training's do.
    """
    net, distances = s.encoder.model, []
    for i in np.random.default_rng(seed).permutation(len(s.z))[:64]:
        a, b = s.items.windows[i]
        window, last, found = s.items.sentences[a:b], b - a - 1, []
        for after in (s.items.sentences[b:b + 2], s.items.sentences[:2]):
            row = [*window, *after]
            tokens, sentence = (torch.from_numpy(x)[None].to(s.encoder.device) for x in (
                np.concatenate(row).astype(np.int64), np.repeat(np.arange(len(row)), [len(r) for r in row])))
            document = torch.zeros(1, len(row), dtype=torch.long, device=s.encoder.device)
            with torch.inference_mode(), s.encoder.autocast:
                p = net.predict(tokens, sentence, document, net.masks(sentence, document)[1])[0, last]
            found.append(unit(np.stack((p.float().cpu().numpy(), s.encoder.predict_windows(row, [(0, b - a)])[0]))))
        distances.append(np.linalg.norm(found[0] - found[1], axis=1).max())
    return float(np.mean(distances))


def similarity(s):
    near = s.candidates['a'][:, 1]  # another sentence of the document
    far = np.roll(s.items.target, len(s.z) // 2)
    far_ok, near_ok = s.items.document[far] != s.document, near >= 0
    rows = {}
    for name, p in s.p_by.items():
        rows[name] = cells('skill', skills(p, s.z, s.mean, s.scale[name], s.document))
        p = unit(p)
        rows[name] |= {'cosine, true': float(cosine(p, s.z).mean()),
                       'in document': float(cosine(p, s.z_all[near])[near_ok].mean()) if near_ok.any() else 0.0,
                       'unrelated': float(cosine(p, s.z_all[far])[far_ok].mean()) if far_ok.any() else 0.0}
    return {'feature similarity': rows, 'leak': {'model': {'distance': leak(s)}}}


def retrieval(s):
    x, document = s.items, s.document
    table = s.encoder.model.target.embedding.weight.detach().cpu().numpy()
    t_all = token_means(table, x.sentences)
    t_all = unit(t_all - t_all.mean(0))
    vectors = tfidf(s.train.sentences)
    queries, bags = vectors([np.concatenate(x.sentences[a:b]) for a, b in x.windows]), vectors(x.sentences).T.tocsr()

    def dense(query, all_):  # each in its own space
        return lambda at: torch.from_numpy(query[at]) @ torch.from_numpy(all_).T
    spaces = {name: dense(unit(p), s.z_all) for name, p in s.p_by.items() if name != 'mean target'}
    spaces |= {'random encoder': dense(unit(s.predictions(s.random, x, s.r_all)), s.r_all),
               'token mean': dense(unit(window_means(x, t_all)), t_all),
               'TF-IDF of the window': lambda at: (queries[at] @ bags).toarray()}
    inside, corpus, found = {}, {}, {}
    for name, similar in spaces.items():
        (a, _), (b, top), (c, _) = (ranks(similar, s.candidates[k]) for k in ('a', 'b', 'corpus'))
        own = found[name] = {'in-document R@1': 1.0 * (a == 1), 'in-document MRR': 1 / a, 'corpus MRR': 1 / c}
        first, mean, over = (cells(column, bootstrap(values, document)) for column, values in
                             zip(('R@1', 'MRR', 'MRR'), own.values()))
        inside[name] = first | mean | {
            'R@1 (b)': float((b == 1).mean()), 'MRR (b)': float((1 / b).mean()),
            'copy rate': float(((top >= x.start) & (top < x.target)).mean())}
        corpus[name] = {'R@1': float((c == 1).mean()), 'R@10': float((c <= 10).mean())} | over
    for rows, key in ((inside, 'a'), (corpus, 'corpus')):
        rows['chance'] = dict(zip(('R@1', 'MRR'), chance(s.candidates[key])))
    ahead = {name: {} for name in found if name != 'model'}
    for name, row in ahead.items():
        if name in s.p_by:
            row |= cells('skill', skills(s.p, s.z, s.mean, s.scale['model'], document, s.scale[name] * s.p_by[name]))
        for what, values in found[name].items():
            row |= cells(what, bootstrap(found['model'][what] - values, document))
    return {'retrieval in document': inside, 'retrieval corpus': corpus, 'model minus baseline': ahead}


def shape(s):
    rng = np.random.default_rng(seed)
    few = rng.permutation(len(s.z_all))[:20_000]
    clouds = {'model': s.z_all[few], 'random encoder': s.r_all[few],
              'Gaussian': unit(rng.standard_normal((len(few), s.z_all.shape[1])))}
    return {'geometry': {name: geometry(x, rng) for name, x in clouds.items()}}


def contrast(s):
    rows, other = {}, s.z[np.random.default_rng(seed).permutation(len(s.z))]
    for name, q in s.p_by.items():
        q = unit(q)
        near = [(s.z_all[a:b] @ q[i]).max() / max((s.z_all[a:b] @ s.z[i]).max(), 0.05)
                for i, (a, b) in enumerate(s.items.windows)]
        closer = ((q - s.z) ** 2).sum(1) < ((q - other) ** 2).sum(1)
        rows[name] = cells('CA', bootstrap(closer, s.document)) | {'PAR': float(np.median(near))}
    return {'contrast': rows}


def probes(s):
    """What a linear map reads from a single concept, trained on one part of the sentences and tested on another."""
    x, t = s.items, s.train
    n, m = min(PROBED, len(x.sentences)), min(PROBED, len(t.sentences))
    clouds = {'model': (s.z_train_all[:m], s.z_all[:n]),
              'random encoder': (s.concepts(s.random, t.sentences[:m]), s.r_all[:n])}

    def facts(y, size):
        ids, of = y.sentences[:size], y.document[:size]
        place = (np.arange(size) - y.first[of]) / np.maximum(y.first[of + 1] - y.first[of] - 1, 1)
        return {'length, R²': np.log1p([len(i) for i in ids]), 'position, R²': place,
                'first token': np.array([i[0] if len(i) else -1 for i in ids])}
    learn, test = facts(t, m), facts(x, n)
    common = np.unique(learn['first token'], return_counts=True)
    common = common[0][np.argsort(-common[1], kind='stable')[:20]]
    of, even = x.document[:n], np.arange(n) % 2 == 0
    fit, held = (np.flatnonzero((of < 100) & half) for half in (even, ~even))
    rows = {name: {} for name in (*clouds, 'guess')}
    for name, (a, b) in clouds.items():
        a, b = (v * v.shape[1] ** 0.5 for v in (a, b))
        for what in ('length, R²', 'position, R²'):
            y, truth = (v[what][:, None] for v in (learn, test))
            guess = Ridge(100.0).fit(a, y).predict(b).reshape(-1, 1)
            rows[name] |= cells(what, skills(guess, truth, y.mean(0), 1.0, of))
            rows['guess'][what] = 0.0
        seen, asked = (np.flatnonzero(np.isin(v['first token'], common)) for v in (learn, test))
        for what, one, y, two, truth, docs in (
                ('first token', a[seen], learn['first token'][seen], b[asked], test['first token'][asked], of[asked]),
                ('document', b[fit], of[fit], b[held], of[held], of[held])):
            if len(np.unique(y)) > 1 and len(truth):
                right = RidgeClassifier(100.0).fit(one, y).predict(two) == truth
                rows[name] |= cells(f'{what}, accuracy', bootstrap(right, docs))
                values, often = np.unique(y, return_counts=True)
                rows['guess'][f'{what}, accuracy'] = float((truth == values[often.argmax()]).mean())
    return {'probes': rows}


def sentence_pairs(s):
    """Spearman x 100 of the cosine of each pair with the human score, for the encoder and its baselines."""
    vocabulary = s.encoder.model.config.vocab_size
    df = np.bincount(np.concatenate([np.unique(ids) for ids in s.train.sentences]), minlength=vocabulary)
    idf = np.log((1 + len(s.train.sentences)) / (1 + df))
    own = s.encoder.model.target.embedding.weight.detach().cpu().numpy()
    lot = np.random.default_rng(0).standard_normal((vocabulary, 256)).astype(np.float32)
    section = {}
    for file, rows in s.sts_pairs.items():
        tokens = [s.encoder.tokenizer.encode_batch([r[i] for r in rows]) for i in (1, 2)]
        mean = token_means(own, tokens[0] + tokens[1]).mean(0)
        ways = {'model': s.encoder.encode_tokens, 'random encoder': s.random.encode_tokens,
                'random token mean': lambda t: token_means(lot, t),
                'random token mean, idf': lambda t: token_means(lot, t, idf),
                'own token mean, centred': lambda t, mean=mean: token_means(own, t) - mean}
        human = [r[0] for r in rows]
        for name, embed in ways.items():
            a, b = (unit(embed(t)) for t in tokens)
            section.setdefault(name, {}).update(cells(file, spearman(cosine(a, b), human)))
            if name == 'model':
                b = b[np.random.default_rng(0).permutation(len(b))]
                section.setdefault('shuffled pairs', {}).update(cells(file, spearman(cosine(a, b), human)))
    return {'STS, Spearman x 100': section} if section else {}


def rollouts(s):
    """Predictions fed back, as concepts and as text, beside the last sentence read."""
    rng = np.random.default_rng(seed)
    starts = []
    for x in (s.train, s.items):
        end = np.minimum(x.target + HORIZON - 1, len(x.document) - 1)
        whole = (x.document[end] == x.document[x.target]) & (end - x.target == HORIZON - 1)
        starts.append(np.sort(rng.permutation(np.flatnonzero(whole))[:MAX_ROLLOUTS]))
    if not all(map(len, starts)):
        return {}  # no document is long enough
    stories, of_concepts = [], s.encoder.model.config.context == 'concepts'

    def as_text(p):
        texts = s.write(p)
        stories.append(texts)
        return s.encoder.encode(texts) if of_concepts else s.encoder.tokenizer.encode_batch(texts)

    def predict(read, windows):
        return s.encoder.roll(np.stack(read), windows) if of_concepts else s.encoder.predict_windows(read, windows)
    feeds = ({'concepts': lambda p: p} if of_concepts else {}) | ({'text': as_text} if s.decoder else {})
    found = []
    for x, z, at in zip((s.train, s.items), (s.z_train_all, s.z_all), starts):
        windows = [(z if of_concepts else x.sentences)[x.start[i]:x.target[i]] for i in at]
        stories.clear()  # of training; those of validation stay
        found.append({kind: roll_out(windows, predict, feed, eval_context) for kind, feed in feeds.items()}
                     | {'copy-last': np.repeat(z[x.target[at] - 1][None], HORIZON, 0)})
    x, at, rows = s.items, starts[1], {}
    for h in range(HORIZON):
        true, document = x.target[at] + h, s.document[at]
        candidates = np.full((len(at), 32), -1)  # the true one, and others that were neither read nor passed over
        for i, (start, t) in enumerate(zip(x.start[at], true)):
            pool = x.others(rng, start, t)
            candidates[i, 0], candidates[i, 1:1 + len(pool)] = t, pool
        for kind in found[1]:
            p_train, p = (f[kind][h] for f in found)
            scale = lib.fit_scale(p_train, s.z_train_all[s.train.target[starts[0]] + h])
            rank, _ = ranks(lambda i, p=p: torch.from_numpy(unit(p[i]) @ s.z_all.T), candidates)
            row = rows[f'{kind}, {h + 1}'] = cells('skill', skills(p, s.z_all[true], s.mean, scale, document)) | \
                cells('MRR', bootstrap(1 / rank, document)) | {'chance': chance(candidates)[1]}
            if kind == 'text':
                so_far = list(zip(*stories[:h + 1]))
                bigrams = [[pair for t in story for pair in zip(t.split(), t.split()[1:])] for story in so_far]
                row['distinct-2'] = float(np.mean([len(set(b)) / max(len(b), 1) for b in bigrams]))
                row['repeated'] = float(np.mean([story[-1] in story[:-1] for story in so_far]))
    return {'rollout, sentences ahead': rows}


def several(s):
    """Of several hypotheses: what the best of k says, which is told from the truth, beside k others.

    Any k concepts have a better one among them. So: k that lie around the prediction at random, and k between it and
    the k nearest targets of training, both as far from their mean, in cosine, as hypotheses are.
    """
    if not s.encoder.model.hypotheses or s.encoder.model.config.context != 'concepts':
        return {}
    rng = np.random.default_rng(seed)
    few = np.sort(rng.permutation(len(s.train.target))[:4000])  # for the scale
    targets = s.z_train_all[s.train.target]
    singles, truth = (unit(s.train_p[few]), unit(s.p)), (targets[few], s.z)
    each = [unit(s.encoder.roll(z, windows, each=True)) for z, windows in
            ((s.z_train_all, [s.train.windows[i] for i in few]), (s.z_all, s.items.windows))]
    k = each[0].shape[1]

    def nearest(p, own=None):
        out = []
        for at in np.array_split(np.arange(len(p)), max(len(p) // 256, 1)):
            similar = p[at] @ targets.T
            if own is not None:  # the truth itself is not to be found
                similar[np.arange(len(at)), own[at]] = -2
            out.append(targets[np.argpartition(-similar, k, axis=1)[:, :k]])
        return np.concatenate(out)

    def spread(found):
        return float((found * unit(found.mean(1))[:, None]).sum(2).mean())
    ways = {'the prediction': [q[:, None] for q in singles], 'hypotheses': each}
    for name, towards in (('around the prediction, at random', [unit(rng.standard_normal(e.shape)) for e in each]),
                          ('towards targets of training', [nearest(singles[0], few), nearest(singles[1])])):
        low, high = 0.0, 16.0
        for _ in range(30):
            far = (low + high) / 2
            narrow = spread(unit(singles[1][:, None] + far * towards[1])) > spread(each[1])
            low, high = (far, high) if narrow else (low, far)
        ways[name] = [unit(q[:, None] + far * v) for q, v in zip(singles, towards)]
    rows = {}
    for name, found in ways.items():
        best = [(f * z[:, None]).sum(2).argmax(1) for f, z in zip(found, truth)]
        (train_p, p), (train_z, z) = (f[np.arange(len(f)), b] for f, b in zip(found, best)), truth
        row = rows[name] = cells('skill', skills(p, z, s.mean, lib.fit_scale(train_p, train_z), s.document))
        for column, key in (('MRR in document', 'a'), ('MRR', 'corpus')):
            rank = np.min([ranks(lambda i, q=q: torch.from_numpy(q[i] @ s.z_all.T), s.candidates[key])[0]
                           for q in found[1].swapaxes(0, 1)], axis=0)
            row |= cells(column, bootstrap(1 / rank, s.document))
        share = np.bincount(best[1], minlength=found[1].shape[1]) / len(z)
        row |= {'cosine of the best': float(cosine(p, z).mean()), 'with their mean': spread(found[1]),
                'used': float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()))}
        row |= {f'best {j + 1}': float(v) for j, v in enumerate(share)} if name == 'hypotheses' else {}
    return {'best of several': rows}


def text(s):
    """What the decoder writes: from the sentence's own concept (reconstruct) and from the predicted one (predict)."""
    if not s.decoder:
        return {}
    at = s.generated
    truth = [s.text(s.items.sentences[i]) for i in s.items.target[at]]
    shuffled = np.roll(np.arange(len(at)), len(at) // 2)
    rebuilt, predicted = s.write(s.z[at]), s.write(s.p[at])
    none, = s.write(np.zeros((1, s.z.shape[1])))
    s.texts = {'reconstruct': rebuilt, 'reconstruct, shuffled concept': [rebuilt[i] for i in shuffled],
               'predict': predicted, 'predict, shuffled concept': [predicted[i] for i in shuffled],
               'no concept': [none] * len(at),
               'copy-last': [s.text(s.items.sentences[i - 1]) for i in s.items.target[at]]}
    out = {'text': {name: text_scores(texts, truth) for name, texts in s.texts.items()}}
    short = [i for i, t in enumerate(s.items.target[at]) if len(s.items.sentences[t]) <= 32]
    for name in ('reconstruct', 'reconstruct, shuffled concept') if short else ():
        scores = text_scores(*([texts[i] for i in short] for texts in (s.texts[name], truth)))
        out['text'][f'{name}, of 32 tokens at most'] = scores | {'sentences': len(short)}
    if s.judged_by:
        said = s.judged_by(truth)
        out['judge'] = {name: cells('cosine', bootstrap(cosine(s.judged_by(texts), said), s.document[at]))
                        for name, texts in s.texts.items()}
    again = {'D(z)': s.encoder.encode(rebuilt), 'D(p)': s.encoder.encode(predicted)}
    gap = np.linalg.norm(again['D(p)'] - s.z[at], axis=1) - np.linalg.norm(unit(s.p[at]) - s.z[at], axis=1)
    out['round trip'] = {'cos(E(D(z)), z)': {'model': float(cosine(again['D(z)'], s.z[at]).mean()),
                                             'shuffled': float(cosine(again['D(z)'], s.z[at][shuffled]).mean())},
                         '‖E(D(p)) − z‖ − ‖p − z‖, p of unit norm': {'model': float(gap.mean())}}
    return out


def perplexity(s):
    """What the true sentences cost given a concept, none, and another's; information is none less given."""
    if not s.decoder:
        return {}
    some = np.sort(np.random.default_rng(seed).permutation(len(s.z))[:max_scored])
    sentences = [s.items.sentences[i] for i in s.items.target[some]]
    tokens = np.array([len(i) + 1 for i in sentences])  # the end of the sentence counts
    size = sum(len(s.text(i).encode()) for i in sentences)
    roll = np.roll(some, len(some) // 2)
    given = {'D(z)': s.z[some], 'D(z), shuffled': s.z[roll], 'D(p)': s.p[some], 'D(p), shuffled': s.p[roll],
             'no concept': None, 'mean concept': np.tile(s.mean, (len(some), 1))}
    nats = {name: s.decoder.nll(sentences, c, batch_size) for name, c in given.items()}
    if s.decoder.language_model:
        before = [s.items.sentences[s.items.start[i]:s.items.target[i]] for i in some]
        nats['language model, reading the window'] = s.decoder.language_model.nll_in_context(sentences, before)
    rows = {}
    for name, n in nats.items():
        rows[name] = cells('nats per token', bootstrap(n / tokens, s.document[some], tokens))
        rows[name] |= {'perplexity': float(np.exp(rows[name]['nats per token'])),
                       'bits per byte': float(n.sum() / np.log(2) / size)}
        rows[name] |= cells('information', bootstrap((nats['no concept'] - n) / tokens, s.document[some], tokens))
    return {'perplexity': rows}


PARTS = (similarity, retrieval, shape, contrast, probes, sentence_pairs, rollouts, several, text, perplexity)
NOTES = {  # what works and what has collapsed, below the section's table
    'feature similarity': 'Skill: the variance of z that p explains. In a collapse cosines go to 1, skill to 0.',
    'leak': 'Of predictions from those with other sentences after the window: 0, or they have read the answer.',
    'retrieval in document': 'Among up to 31 others of the document from outside the window; (b): and the window.',
    'retrieval corpus': 'Among one sentence of each other document. High here and chance above: topic only.',
    'model minus baseline': 'Pair by pair, same resampled documents: the model is ahead where the interval is above 0.',
    'geometry': 'RankMe near 1, or random pairs at cosine 1: collapsed.',
    'contrast': 'Barrault et al. 2024 (arXiv:2412.08821). CA: p is nearer to z than to another z, chance .5; PAR: '
                'max cos(p, window) over max cos(z, window), 1 where p repeats no more than the truth does.',
    'probes': 'What a linear map reads from one concept. Document: of 100, learned from half of its sentences.',
    'STS, Spearman x 100': 'Published for STS-B: mean of GloVe 58.0 (test), next-sentence contrast from BERT 67.1 '
                           '(dev), SimCSE 76.9 (test).',
    'rollout, sentences ahead': 'Predictions fed back, as they are and as text; copy-last is the last sentence read.',
    'best of several': 'Used: exp of the entropy of which is the best. Others are as far from their mean, in cosine.',
    'text': "Reconstruct: from the sentence's own concept; predict: from the one predicted. No concept: the likeliest "
            'sentence against every truth. Of 32 tokens at most: where the true sentence is that short.',
    'round trip': 'Of what was written, read again. Second row: how much further from the truth than p at length 1 is.',
    'judge': 'Cosine of the judge encoder between the true sentence and what was written.',
    'perplexity': 'Works: concept below none below shuffled. Information: nats per token, none less given.'}


def evaluate(s):
    """All metrics of the Study s, {section: {row: {column: number}}}: printed, written as json and reported alike."""
    sections = {}
    for part in tqdm(PARTS, desc='evaluate', disable=not sys.stderr.isatty()):
        if not sys.stderr.isatty():  # a log
            print(f'evaluate.py: {part.__name__}', file=sys.stderr, flush=True)
        sections |= part(s)
    return sections


def verdict(sections):
    """'learns', 'topic only', 'collapsed' or 'leaks'; the rule that gave it; the baselines ahead of the model."""
    f, g = sections['feature similarity']['model'], sections['geometry']['model']
    inside, corpus = sections['retrieval in document'], sections['retrieval corpus']
    share, apart = g['RankMe, centred'] / g['dimensions'], g['cosine of random pairs']
    headlines = [('feature similarity', 'skill'), ('retrieval in document', 'MRR'), ('retrieval corpus', 'MRR')]
    similar = 'STS, Spearman x 100'
    headlines += [(similar, c) for c in sections.get(similar, {}).get('model', {}) if not c.endswith(('_low', '_high'))]
    beaten = [f'{name} on {column} of {section}' for section, column in headlines
              for name, row in sections[section].items() if row[column] > sections[section]['model'][column]]
    if sections['leak']['model']['distance'] > 0.1:
        return 'leaks', 'predictions change with the sentences that they are to predict', beaten
    signs = {f'unrelated sentences have cosine {apart:.2f}, above .5': apart > 0.5,
             f'concepts fill {100 * share:.0f} % of the width, below 5 %': share < 0.05,
             f'skill is {f["skill"]:.3f}, not above 0': f['skill_high'] <= 0,
             'retrieval over the corpus is at chance': corpus['model']['MRR_low'] <= corpus['chance']['MRR']}
    if any(signs.values()):
        return 'collapsed', '; '.join(sign for sign, seen in signs.items() if seen), beaten
    copy, lot = (sections['model minus baseline'][name] for name in ('copy-last', 'random encoder'))
    if inside['model']['MRR_low'] > inside['chance']['MRR'] and f['skill_low'] > 0 and \
            min(copy['skill_low'], lot['in-document MRR_low'], lot['corpus MRR_low']) > 0:
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
        columns = list(dict.fromkeys(c for r in rows.values() for c in r if not c.endswith(('_low', '_high'))))
        out += [f'### {title}', '', '| |' + ' | '.join(columns) + ' |', '|---|' + '---:|' * len(columns)]
        for name, row in rows.items():
            line = []
            for c in columns:
                between = f' ({number(row[c + "_low"])} to {number(row[c + "_high"])})' if c + '_low' in row else ''
                line.append(number(row[c]) + between if c in row else '')
            out.append(f'| {name} | ' + ' | '.join(line) + ' |')
        out += ['', NOTES[title], ''] if title in NOTES else ['']
    return '\n'.join(out)


def escape(text):
    """Text that markdown shows as it is."""
    text = ''.join('\ufffd' if c < ' ' or '\x7f' <= c < '\xa0' else c for c in ' '.join(text.split()))
    return ''.join('\\' + c if c in '\\`*_{}[]<>()#+-!|~&' else c for c in text)


def samples(s):
    """A dozen samples, chosen by seed."""
    x, out = s.items, []
    for j in np.sort(np.random.default_rng(seed).permutation(len(s.generated))[:n_samples]):
        i = s.generated[j]
        lines = {'context': ' / '.join(s.text(t) for t in x.sentences[x.start[i]:x.target[i]][-3:]),
                 'true next': s.text(x.sentences[x.target[i]])}
        lines |= {what: s.texts[key][j] for what, key in (('reconstruction', 'reconstruct'), ('prediction', 'predict'))
                  if s.texts}
        if s.texts and s.decoder.language_model:
            window = x.sentences[x.start[i]:x.target[i]]
            lines['language model'], = s.decoder.language_model.continue_text([window], max_new_tokens)
        near = np.argsort(-(s.z_all @ s.p[i]), kind='stable')[:3]
        lines |= {f'nearest {k + 1}': s.text(x.sentences[n]) for k, n in enumerate(near)}
        out.append('\n'.join(f'- **{k}**: {escape(v)}' for k, v in lines.items()))
    return '\n\n---\n\n'.join(out)


def read_log(path, *columns):
    """Columns of a metrics csv, as lists, from the rows that have them all; empty lists without such a file."""
    if not os.path.exists(path):
        return [[] for _ in columns]
    with open(path, encoding='utf-8') as f:
        rows = [[float(r[c]) for c in columns] for r in csv.DictReader(f) if all(r[c] for c in columns)]
    return [list(c) for c in zip(*rows)] or [[] for _ in columns]


def pictures(folder, s, sections):
    """Draw what the numbers say; returns the file names. Readable in black and white."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'figure.dpi': 110, 'axes.grid': True, 'grid.alpha': 0.3, 'axes.spines.top': False,
                         'axes.spines.right': False, 'savefig.bbox': 'tight', 'legend.frameon': False})
    names = []

    def save(name):
        plt.tight_layout()
        plt.savefig(os.path.join(folder, name), metadata={'Software': None})
        plt.close()
        names.append(name)

    def curves(name, *panels):
        """Panels of lines: (x label, y label, {line: (x, y, style)}); a panel or picture without points is left out."""
        panels = [p for p in panels if any(len(x) > 1 for x, _, _ in p[2].values())]
        if not panels:
            return
        _, axes = plt.subplots(1, len(panels), figsize=(7, 3.2), squeeze=False)
        for axis, (xlabel, ylabel, lines) in zip(axes[0], panels):
            for label, (x, y, style) in lines.items():
                axis.plot(x, y, style, color='0.6' if style == '-.' else 'black', markersize=4, label=label)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.legend(fontsize=8, loc='lower left', bbox_to_anchor=(-0.05, 1), handlelength=1.6)
        save(name)

    models = [k for k, v in sections['retrieval corpus'].items() if 'MRR_low' in v]
    y = np.arange(len(models))[::-1]
    _, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.6))
    for axis, section in zip(axes, ('retrieval in document', 'retrieval corpus')):
        r = [sections[section][k] for k in models]
        m = np.array([v['MRR'] for v in r])
        axis.barh(y, m, xerr=[m - [v['MRR_low'] for v in r], [v['MRR_high'] for v in r] - m], capsize=2,
                  color=['0.25'] + ['0.75'] * (len(models) - 1), edgecolor='black')
        axis.axvline(sections[section]['chance']['MRR'], color='black', linestyle=':', label='chance')
        axis.set(title=section, xlabel='mean reciprocal rank, 95 % interval', yticks=y, yticklabels=models)
    axes[1].legend(loc='lower right', bbox_to_anchor=(1, 1.05))
    save('retrieval.png')

    spectrum = {}
    for name, x, style in (('model', s.z_all, '-'), ('random encoder', s.r_all, '--'),
                           ('Gaussian', np.random.default_rng(0).standard_normal(s.z_all.shape), ':')):
        v = torch.linalg.svdvals(torch.from_numpy(unit(x) - unit(x).mean(0))).numpy()
        spectrum[name] = (np.arange(1, len(v) + 1), np.log10(np.maximum(v / max(v.sum(), 1e-12), 1e-9)), style)
    curves('spectrum.png', ('singular value, by size', 'share of their sum, log₁₀', spectrum))

    x, bins, near = s.items, np.linspace(-0.6, 1, 65), s.candidates['a'][:, 1]
    spread = {}
    for name, q, style in (('true next', x.target, '-'), ('same document', near, '--'),
                           ('unrelated', np.roll(x.target, len(s.p) // 2), ':')):
        share, _ = np.histogram(cosine(unit(s.p), s.z_all[q])[q >= 0], bins, density=True)
        spread[name] = ((bins[1:] + bins[:-1]) / 2, share, style)
    curves('cosines.png', ('cosine of prediction and concept', 'density', spread))

    ahead, h = sections.get('rollout, sentences ahead', {}), np.arange(1, HORIZON + 1)
    styles = {'concepts': 'o-', 'text': 's--', 'copy-last': '^:'}
    by = [{kind: (h, [ahead[f'{kind}, {i}'][column] for i in h], style) for kind, style in styles.items()
           if f'{kind}, 1' in ahead} for column in ('skill', 'MRR')]
    if ahead:
        by[1]['chance'] = (h, [ahead[f'copy-last, {i}']['chance'] for i in h], '-.')
    curves('horizon.png', ('sentences ahead', 'skill', by[0]), ('sentences ahead', 'MRR in the document', by[1]))

    def training(file, pairs):
        return {name: (np.array(t) / 1e6, v, style) for name, column, style in pairs
                for t, v in [read_log(os.path.join(folder, file), 'tokens', column)]}
    tokens = 'million tokens'
    curves('training_encoder.png', *((tokens, label, training('metrics.csv', pairs)) for label, pairs in (
        ('loss', [('training', 'loss', '-.'), ('validation', 'val_loss', '-')]),
        ('MRR', [('model', 'val_mrr', '-'), ('copy-last', 'val_copy_mrr', '--')]),
        ('skill', [('model', 'val_skill', '-'), ('copy-last', 'val_copy_skill', '--')]))))
    curves('training_decoder.png', (tokens, 'nats per token', training('metrics_decoder.csv', [
        ('training', 'loss', '-.'), ('concept', 'val_loss', '-'), ('no concept', 'val_unconditional', '--'),
        ('shuffled', 'val_shuffled', ':')])))

    longest = np.argsort(-np.diff(x.first), kind='stable')[:8]  # documents
    at = np.concatenate([np.arange(x.first[d], min(x.first[d + 1], x.first[d] + 60)) for d in longest])
    if len(at) > 2:
        pca = PCA(2).fit(s.z_all[at])
        plt.figure(figsize=(5, 4.4))
        for k, d in enumerate(longest):
            xy = pca.transform(s.z_all[at[x.document[at] == d]])
            plt.scatter(*xy.T, s=22, marker='osD^v<>P'[k], color=plt.cm.viridis(k / 8), edgecolor='black',
                        linewidth=0.4, label=f'document {k + 1}')
        plt.xlabel('first principal component')
        plt.ylabel('second')
        plt.title(f'{100 * pca.explained_variance_ratio_.sum():.0f} % of the variance of the concepts of 8 documents',
                  fontsize=10)
        plt.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
        save('map.png')
    return names


# ---------------------------------------------------------------------------------------------------------------
# Answers to a person, or a program

def answer(encoder, decoder, val):
    """What the models make of the sentences of a prompt, or of two to walk between, as a dict."""
    if corpus:
        sentences = [t for d in read_file(corpus, 'text', '') if d for t in split_sentences(d)]
        if not sentences:
            raise Mistake(f'{corpus} holds no sentence')
        tokens = encoder.tokenizer.encode_batch(sentences)
    else:
        tokens = Items(val, np.random.default_rng(seed), max_pairs, 20_000, eval_context).sentences
    z_all = encoder.encode_tokens(tokens, batch_size)

    def look(z, seed=seed):
        """What lies near the concept z, and what the decoder writes of it."""
        similar = z_all @ unit(z)
        near = [{'cosine': float(similar[i]), 'text': encoder.tokenizer.decode(tokens[i])}
                for i in np.argsort(-similar, kind='stable')[:3]]
        if not decoder:
            return {'nearest': near}
        written, = decoder.generate(z[None], temperature, top_k, top_p, max_new_tokens, seed=seed)
        return {'written': written, 'nearest': near}
    if interpolate:
        ends = [e.strip() for e in interpolate.split('||')]
        if len(ends) != 2 or not all(ends):
            raise Mistake('--interpolate expects "one sentence || another"')
        a, b = encoder.encode(ends)
        return {'interpolation': [{'share': share, **look(unit((1 - share) * a + share * b))}
                                  for share in np.linspace(0, 1, 9).tolist()]}
    given = sys.stdin.buffer.read() if prompt == '-' else prompt.encode('utf-8', 'surrogateescape')
    if prompt_file:
        try:
            with open(prompt_file, 'rb') as f:
                given = f.read()
        except OSError as error:
            raise Mistake(f'cannot read --prompt_file={prompt_file}: {error.strerror}') from None
    read = split_sentences(given.decode('utf-8', 'replace'))
    if not read:
        raise Mistake('the prompt holds no sentence')
    if steps > 1 and not decoder:
        raise Mistake(f'--steps={steps} needs a decoder to write with: train_decoder.py makes one')
    found = {'sentences': [{'sentence': t, **look(z)} for t, z in zip(read, encoder.encode(read))], 'continuations': []}
    for n in range(num_samples):
        story = list(read)
        for step in range(steps):
            told = look(encoder.predict(story[-eval_context:]), seed + n * steps + step)
            story.append(told.get('written', ''))
            found['continuations'].append({'sample': n + 1, 'step': step + 1, **told})
    return found


def show(found, indent=''):
    """Print an answer for a person to read."""
    for key, value in found.items():
        if key == 'nearest':
            for near in value:
                print(f'{indent}  {near["cosine"]:.2f}  {near["text"]}')
        elif isinstance(value, list):
            for n, part in enumerate(value, 1):
                print(f'{indent}{key.removesuffix("s")} {n}')
                show(part, indent + '  ')
        else:
            print(f'{indent}{key}: {value if isinstance(value, str) else number(value)}')


def main():
    """Evaluate, or answer."""
    asked = {a.partition('=')[0] for a in sys.argv} & {'--prompt', '--prompt_file', '--interpolate'}  # empty: a mistake
    if len(asked) > 1:
        raise Mistake(f'one of {" and ".join(sorted(asked))}, not both')
    encoder, decoder, train, val = load(out_dir)
    if asked:
        found = answer(encoder, decoder, val)
        print(dumps(found, ensure_ascii=False, indent=1)) if json else show(found)
        return
    folder = out_dir if os.path.isdir(out_dir) else os.path.dirname(out_dir) or '.'
    if not os.access(folder, os.W_OK):
        raise Mistake(f'cannot write to {folder}: give a copy of it as --out_dir')
    pairs, judged_by = sts_files(sts), judge_encoder(judge)
    if not decoder:
        print(f'no decoder in {folder}: text and perplexity are left out (train_decoder.py makes one)', file=sys.stderr)
    if not sts:
        print('STS is left out: --sts=<file of score, s1, s2>, or --sts=hub', file=sys.stderr)
    s = Study(encoder, decoder, train, val, pairs, judged_by)
    sections = evaluate(s)
    word, rule, beaten = verdict(sections)
    table = markdown(sections)
    behind = f'Baselines ahead of the model, by however little: {"; ".join(beaten) or "none"}.'
    counts = ', '.join(f'{v:,} {k}' for k, v in s.counts.items())
    metrics = {'verdict': word, 'rule': rule, 'ahead of the model': beaten, 'counts': s.counts, 'metrics': sections,
               'settings': settings}
    try:
        names = pictures(folder, s, sections)
        write_text(os.path.join(folder, 'report.md'), '\n\n'.join([
            f'# {word}', behind, f'{counts}. In brackets: 95 % intervals over documents.', '## Metrics', table,
            '## Pictures', '\n'.join(f'![{n[:-4]}]({n})' for n in names), '## Samples', samples(s),
            f'**{word}**: {rule}.']) + '\n')
        write_json(os.path.join(folder, 'metrics.json'), metrics)
    except OSError as error:
        raise Mistake(f'cannot write to {folder}: {error.strerror or error}') from None
    print(dumps(metrics, indent=1) if json else
          f'{table}\n{behind}\n{word}: {rule}.\n{folder}/report.md has samples and pictures')


if __name__ == '__main__':
    settings = override(globals(), limits={
        **dict.fromkeys(('eval_context', 'max_pairs', 'max_train_sentences', 'max_generated', 'max_scored', 'n_samples',
                         'batch_size', 'steps', 'num_samples', 'max_new_tokens'), (1, np.inf)),
        **dict.fromkeys(('temperature', 'top_k'), (0, np.inf)), 'top_p': (1e-6, 1), 'seed': (0, 2**32 - 1)})
    try:
        main()
    except (Mistake, OSError) as error:
        raise SystemExit(f'evaluate.py: {error}') from None
    except KeyboardInterrupt:
        print('evaluate.py: interrupted', file=sys.stderr)
        raise SystemExit(130) from None
