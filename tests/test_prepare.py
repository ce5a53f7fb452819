"""prepare.py: sentences, tokenizers, sources, files on disk, kills, and batches."""

import contextlib
import gzip
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import bench_prepare
import hub
import numpy as np
import pytest
import tiktoken
from conftest import MORE, ROOT, free_port, jsonl, prepared, refused, run, start
from hypothesis import given, settings, strategies

import prepare
from config import UserError

HARD = ['Dr. Smith met J. R. Jones at 3.5 p.m. He said "Go." Then they left (late.) All done?! Yes… no stop',
        '你好。世界！ Ünïcode 👩‍👩‍👧 text.\n\n\n1. First item\n2. Second item', 'x' * 9000, 'word ' * 3000,
        ' \n\t ', '<|endoftext|> is text. So is </s>.', 'مرحبا بالعالم. كيف حالك؟', 'a\x00b. C\x0cd.',
        'Plan B\u00a0. Then.', 'one, two; three: ' * 300]
RANKS = ('-m', 'torch.distributed.run', '--nproc_per_node=2')

@pytest.mark.parametrize('text', [
    'Dr. Smith paid 3.50 dollars.|He left.', '1. Wash the rice.|Then dry it.', 'A. Wash it.|B. Boil it.',
    'II. The second part.|It goes on.', '1.1. Introduction here.', '1) Wash.|2) Boil it.', 'Plan B.|We go.',
    '- 1. Wash it.|Boil it.', '## 2. The rice', 'See Eq. 4 and Fig. (2) for it.|It holds.',
    'Smith et al. [2004] showed this.|We agree.', 'It cost 1026.253.553.|That is much.'])
def test_split_knows_abbreviations_and_list_markers(text):
    assert prepare.split_sentences(text.replace('|', ' ')) == text.split('|')
    assert prepare.split_sentences('\ufeff' + text.replace('|', '\r\n')) == text.split('|')

@pytest.mark.parametrize(('name', 'measure', 'bar'), [
    ('en_ewt-ud-dev.conllu', bench_prepare.f1, 0.871), ('en_gum-ud-dev.conllu', bench_prepare.f1, 0.963),
    ('pysbd_golden_rules_en.json', bench_prepare.golden, 44)])
def test_splitter_on_treebanks_and_golden_rules(name, measure, bar):
    if not os.path.exists(path := os.path.join(ROOT, '..', 'shared', 'data', 'sentence-boundaries', name)):
        pytest.skip('the treebanks are not beside the checkout')
    assert measure(prepare.split_sentences, path) >= bar

def test_sentences_are_tokenized_each_on_its_own(corpus_dir, texts):
    """Many at once give what one at a time gives, also where an end of text stands in one of them."""
    encode = prepare.Corpus(corpus_dir, 'train').tokenizer.encode_batch
    sentences = [s for t in [*texts[:30], *HARD] for s in prepare.split_sentences(t)]
    plain = [s for s in sentences if prepare.END not in s]
    assert 100 < len(plain) < len(sentences)
    for some in (sentences, plain, ['a', '', 'b'], ['', ''], [' a', 'b '], ['\ud800', 'x'], []):
        assert [list(ids) for ids in encode(some)] == [list(encode([s])[0]) for s in some]
    assert list(encode(['\r\ufeff \ufeffa\u00a0 b\r\n'])[0]) == list(encode(['a b'])[0])

def test_faster_pattern_is_gpt2s(texts):
    """On folded text, any characters in it; with ranks of our own, as gpt2's would have to be downloaded."""
    from tiktoken_ext.openai_public import r50k_pat_str
    # every pair of bytes is a token: text that is cut elsewhere gets other ids
    merges = {bytes([a]): a for a in range(256)}
    merges |= {bytes([a, b]): 256 * a + b + 256 for a in range(256) for b in range(256)}
    theirs, ours = (tiktoken.Encoding('', pat_str=p, mergeable_ranks=merges, special_tokens={})
                    for p in (r50k_pat_str, prepare.GPT2_FOLDED))
    rng = random.Random(0)
    some = 'abz ABZ  12\'sdtmlSDTMver.,;!?-–…“”é你好ёß\u0301\u00a0\u2028\u3000\u200d\t\x1c\x85😀'
    for text in [*texts[:30], *HARD, *(''.join(rng.choices(some, k=60)) for _ in range(3000))]:
        folded = '\n'.join(prepare.split_sentences(text))
        assert ours.encode_ordinary(folded) == theirs.encode_ordinary(folded)

def test_a_tokenizer_learns_from_training_documents_only(tmp_path, texts):
    secret = [t for t in (f'{t} Qxqzj qxqzj.' for t in texts) if prepare.uniform(t) < 0.2]
    told = [t for t in texts if prepare.uniform(t) >= 0.2]
    done = prepared(tmp_path, 'a.jsonl', jsonl(told + secret), '--tokenizer=bpe:600', '--val_fraction=0.2')
    corpus = prepare.Corpus(tmp_path / 'out', 'val')
    assert corpus.n_documents == len(secret) > 20
    assert len(corpus.tokenizer.encode_batch(['qxqzj'])[0]) == 5
    assert 'knows little' not in done.stdout
    done = prepared(tmp_path / 'b', 'a.jsonl', jsonl(['Привет, мир. Как дела?'] * 10), '--tokenizer=bpe:257')
    assert 'knows little' in done.stdout

def documents_of(folder):
    """The documents of both splits as text."""
    corpora = []
    for split in ('train', 'val'):
        with contextlib.suppress(UserError):  # nothing is held out
            corpora.append(prepare.Corpus(folder, split))
    return sorted(' '.join(map(corpus.tokenizer.decode, corpus.document(d)))
                  for corpus in corpora for d in range(corpus.n_documents))

def test_readers_agree(tmp_path, texts):
    import pyarrow.parquet
    lines, text = jsonl(texts), '\n'.join(texts)
    table = pyarrow.table({'text': texts, 'id': list(range(len(texts)))})
    pyarrow.parquet.write_table(table, tmp_path / 'e.parquet')
    files = {'a.jsonl.gz': gzip.compress(lines), 'b.JSON.XZ': lzma.compress(lines), 'c.txt': text.encode(),
             'g.ndjson': b'\xef\xbb\xbf' + lines.replace(b'\n', b'\r\n\n'), 'h.txt': text.encode('utf-16'),
             'i.txt': b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode()}
    with contextlib.suppress(ImportError):  # optional: see tests/requirements.txt
        from backports import zstd
        files['f.jsonl.zst'] = zstd.compress(lines)
    separators = {'j.txt': '<sep>', 'k.txt': '\\n\\n', 'l.txt': '\r\n\\r\\n', 'm.txt': '\f'}
    for name, between in (('j.txt', '<sep>'), ('k.txt', '\n \t\n'), ('l.txt', '\r\n \r\n'),
                          ('m.txt', '\f\n')):
        files[name] = between.join(texts).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ('e.parquet', *files):
        read = prepare.read_file(str(tmp_path / name), 'text', separators.get(name, ''))
        assert [t.strip() for t in read] == texts, name

@pytest.mark.parametrize(('name', 'content', 'says'), [
    ('a.jsonl', b'{"body": "x", "n": 1}', 'body (str), n'), ('a.jsonl', b'{"text": ["x"]}', 'text (list)'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "x"\n', 'line 2'), ('a.jsonl', b'["ab", "cd"]\n', 'line 1'),
    ('a.txt', b' \n\n', 'no sentence'), ('a.txt.gz', b'not', 'gzip'), ('a.jsonl.zst', b'not', 'zst'),
    ('a.jsonl.xz', lzma.compress(b'{"text": "x"}\n' * 99)[:-30], 'xz'), ('a.doc', b'x', 'expected .txt'),
    ('a.parquet', b'PAR1 cut short', 'parquet'), ('[a].parquet', hub.parquet([])[:-9], 'parquet')])
def test_an_unreadable_source_is_one_line(tmp_path, name, content, says):
    refused(prepared(tmp_path, name, content, check=False), name, says)
    assert not (tmp_path / 'out' / 'done').exists()

@pytest.mark.parametrize(('argument', 'says'), [
    ('--tokenizer=gtp2', "'bpe:8192'"), ('--tokenizer=bpe:99', 'bpe:8192'), ('--val_fraction=1', 'fraction'),
    ('--tokenizer=hf:/no/no', 'tokenizer.json'), ('--dataset=no/no.jsonl', 'no file'), ('RANK=0', 'torchrun'),
    ('--dataset=no*where', 'no file'), ('--text_column=body', 'text (str)'), ('WORLD_SIZE=4', 'torchrun')])
def test_a_refused_setting_leaves_no_folder_behind(tmp_path, argument, says):
    name, _, value = argument.partition('=')
    more, environment = ([argument], {}) if name[0] == '-' else ([], {name: value})
    environment['HF_HUB_OFFLINE'] = '1'
    refused(prepared(tmp_path, 'a.jsonl', jsonl(['One.']), *more, check=False, **environment), says)
    assert not (tmp_path / 'out').exists()

def test_what_is_left_out_or_replaced_is_counted(tmp_path):
    """A lone surrogate, bytes that are not UTF-8, records without text, a document without a sentence."""
    lines = [b'{"text": "One \\ud800 here. Two."}', b'{"text": "Thr\xffee. Four."}', b'{"text": null}',
             b'{"id": 3}', b'{"text": " "}']
    done = prepared(tmp_path, 'texts [2024].jsonl', b'\n'.join(lines), '--val_fraction=0')
    assert documents_of(tmp_path / 'out') == ['One ? here. Two.', 'Thr\ufffdee. Four.']
    assert '3 documents without text; 1 bytes were not UTF-8' in done.stdout
    again = ['--dataset=~/texts [2024].jsonl', '--data_dir=~/ho me', '--tokenizer=bpe:300']
    run('prepare.py', *again, HOME=str(tmp_path))
    assert len(documents_of(tmp_path / 'ho me')) == 2

@settings(max_examples=300 * MORE, deadline=None)
@given(strategies.binary(max_size=40), strategies.sampled_from(['', '\n\n', 'ab']))
def test_any_bytes_are_read(tmp_path_factory, content, separator):
    path = tmp_path_factory.getbasetemp() / 'any.txt'
    path.write_bytes(content)
    assert all(isinstance(t, str) for t in prepare.read_file(str(path), 'text', separator))

ANY = strategies.text() | strategies.sampled_from([*HARD, '\ud800', '\x1c\x85\u2028', '. ' * 40])

@settings(max_examples=100 * MORE, deadline=None)
@given(strategies.lists(ANY, max_size=4).map(''.join))
def test_any_text_is_split_and_tokenized(corpus_dir, text):
    """No letter is lost, and sentences are cut to 16 tokens."""
    tokenizer, sentences = prepare.Corpus(corpus_dir, 'train').tokenizer, prepare.split_sentences(text)
    assert all(s and s == prepare.clean(s) for s in sentences)
    found = list(prepare.encode_sentences(sentences, tokenizer.encode, 16))
    assert all(0 < len(ids) <= 16 for ids in found)
    assert ''.join(''.join(map(tokenizer.decode, found)).split()) == ''.join(prepare.clean(text).split())

HUB_TEXTS = [f'Document {i} begins here. It says {i * 7}. Then it ends.' for i in range(500)]

@pytest.fixture
def from_hub(tmp_path):
    """The stand-in for the hub, and a function that runs prepare.py's defaults on it, with short waits."""
    quick = 'import time\nnap = time.sleep\ntime.sleep = lambda s: nap(s / 20)\n'
    (tmp_path / 'sitecustomize.py').write_text(quick)
    cuts = 0, 32, 64, 450, 500
    parts = {f'sample/10BT/{i:03}.parquet': hub.parquet(HUB_TEXTS[cuts[i]:cuts[i + 1]]) for i in range(4)}
    with hub.Hub(parts) as server:
        def prepare_from(*arguments, before=(), **more):
            more |= {'HF_ENDPOINT': server.url, 'HF_HOME': f'{tmp_path}/hf', 'HF_HUB_DOWNLOAD_TIMEOUT': '2'}
            return run(*before, 'prepare.py', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300',
                       '--num_proc=1', '--val_fraction=0.2', '--shard_tokens=100', *arguments,
                       PYTHONPATH=str(tmp_path), **more)
        yield server, prepare_from

@pytest.mark.parametrize('failures', [(), (500, 429, 'drop', 'stall', 500)])
def test_fineweb_edu_is_streamed_from_the_hub(tmp_path, from_hub, failures):
    """The defaults, on the routes that the hub's client asks; also when some requests fail first."""
    server, prepare_from = from_hub
    server.failures += failures
    prepare_from()
    assert not server.failures
    assert not any('data/CC' in path and 'resolve' in path for path in server.asked), 'sample-10BT only'
    assert documents_of(tmp_path / 'out') == sorted(HUB_TEXTS)
    assert {name[:6] for name in os.listdir(tmp_path / 'out')} == {'meta.j', 'done', 'train_', 'val_00'}

def test_a_hub_that_was_lost_is_read_on_from_there(tmp_path, from_hub):
    server, prepare_from = from_hub
    server.gone = lambda name: '003' in name and (tmp_path / 'out' / 'meta.json').exists()
    refused(prepare_from('--max_docs=480', check=False), 'the same command goes on')
    before = shards(tmp_path / 'out')
    assert len(before) > 40
    server.gone, server.asked[:] = lambda name: False, []
    prepare_from('--max_docs=480')
    assert not any('resolve' in path and path.endswith('10BT/001.parquet') for path in server.asked)
    assert documents_of(tmp_path / 'out') == sorted(HUB_TEXTS[:480])
    assert before.items() < shards(tmp_path / 'out').items()

def test_ranks_share_a_stream_and_its_limit(tmp_path, from_hub):
    from_hub[1]('--max_docs=99', before=(*RANKS, f'--master_port={free_port()}'))
    assert len(documents_of(tmp_path / 'out')) == 99
    assert set(documents_of(tmp_path / 'out')) < set(HUB_TEXTS)

@pytest.mark.parametrize(('argument', 'says'), [
    ('--text_column=body', 'language_score'), ('--dataset_config=10T', 'sample-10B'), ('--dataset=a/b', '')])
def test_a_mistake_about_the_hub_is_named(tmp_path, from_hub, argument, says):
    refused(from_hub[1](argument, check=False), says, argument.split('=')[0])
    assert not (tmp_path / 'out').exists()

def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'meta.json'}

def shards(folder):
    return {p.name: p.stat().st_ino for p in folder.glob('train_*.bin')}

def test_round_trip_whatever_the_processes_and_ranks(tmp_path, texts):
    arguments = ['--val_fraction=0.2', '--shard_tokens=2000']
    prepared(tmp_path, 'a.jsonl', jsonl(texts), *arguments)
    assert documents_of(tmp_path / 'out') == sorted(texts)
    assert len(shards(tmp_path / 'out')) > 1
    prepared(tmp_path, 'a.jsonl', jsonl(texts), *arguments, '--num_proc=2', f'--data_dir={tmp_path}/two')
    run(*RANKS, f'--master_port={free_port()}', 'prepare.py', f'--dataset={tmp_path}/a.jsonl', *arguments,
        '--tokenizer=bpe:300', f'--data_dir={tmp_path}/ranks')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'two') == contents(tmp_path / 'ranks')

def test_a_set_is_gone_on_with_by_the_same_command_only(tmp_path, texts):
    prepared(tmp_path, 'a.jsonl', jsonl(texts))
    before = contents(tmp_path / 'out')
    assert 'complete already' in prepared(tmp_path, 'a.jsonl', jsonl(texts), '--num_proc=2').stdout
    refused(prepared(tmp_path, 'a.jsonl', jsonl(texts), '--max_docs=5', check=False), 'max_docs=0, not 5')
    refused(prepared(tmp_path, 'a.jsonl', jsonl(texts[1:]), check=False), 'files=')
    assert contents(tmp_path / 'out') == before
    for name in ('train_000000.bin', 'done', 'meta.json'):
        path = tmp_path / 'out' / name
        whole = path.read_bytes()
        for damage in (lambda: path.write_bytes(whole[:-8]), path.unlink):  # noqa: B023
            damage()
            with pytest.raises(UserError, match=name):
                prepare.Corpus(str(tmp_path / 'out'), 'train')
        path.write_bytes(whole)
    with pytest.raises(UserError, match='--data_dir'):
        prepare.Corpus(str(tmp_path / 'nowhere'), 'train')

@pytest.fixture
def many(tmp_path):
    """A folder, and a function that begins to prepare some 370 chunks to its subfolder; it takes seconds."""
    (tmp_path / 'docs.jsonl').write_bytes(jsonl([f'{t} ' * 100 for t in HUB_TEXTS * 2]))

    def begin(name='out'):
        return subprocess.Popen([
            sys.executable, 'prepare.py', f'--dataset={tmp_path}/docs.jsonl', '--tokenizer=bpe:300',
            '--num_proc=2', '--shard_tokens=4000', '--val_fraction=0.2', f'--data_dir={tmp_path / name}'],
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return tmp_path, begin

def workers_of(pid):
    """The processes that work for prepare.py's process."""
    with contextlib.suppress(OSError):
        children = open(f'/proc/{pid}/task/{pid}/children').read().split()
        return [int(p) for p in children if 'spawn_main' in open(f'/proc/{p}/cmdline').read()]
    return []

def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)

@pytest.mark.parametrize('seed', range(MORE))
def test_kills_at_any_moment(many, seed):
    """The same command again goes on: the same bytes as unbroken, and no finished shard is written twice."""
    folder, begin = many
    out, _ = folder / 'out', begin('whole').communicate()
    rng, kills, before = random.Random(seed), 0, {}
    while kills < 20:
        process, latest = begin(), time.time() + (rng.random() if kills % 2 else 60)
        wait_until(lambda: len(shards(out)) > len(before) or process.poll() is not None  # noqa: B023
                   or time.time() > latest)  # noqa: B023
        time.sleep(rng.random() * 0.03)
        working = workers_of(process.pid)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        wait_until(lambda: not any(os.path.exists(f'/proc/{p}') for p in working), 10)  # noqa: B023
        assert before.items() <= shards(out).items()
        before = shards(out)
        with pytest.raises(UserError, match='the same prepare.py command'):
            prepare.Corpus(out, 'train')
    assert begin().wait() == 0
    assert before.items() <= shards(out).items()
    assert contents(out) == contents(folder / 'whole')

@pytest.mark.parametrize('size', [300, 3000])
def test_a_full_disk_is_told_and_gone_on_from(tmp_path, texts, size):
    """Where there is no room for meta.json, or for a shard."""
    prepared(tmp_path, 'a.jsonl', jsonl(texts))
    command = ['prepare.py', f'--dataset={tmp_path}/a.jsonl', '--tokenizer=bpe:300', '--num_proc=1',
               f'--data_dir={tmp_path}/full']
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    refused(start(*command, before=full).end(check=False), 'File too large')
    start(*command).end()
    assert contents(tmp_path / 'full') == contents(tmp_path / 'out')

@pytest.mark.parametrize(('number', 'code'), [(15, 143), (2, 130), (9, 1)])
def test_signals_and_killed_workers(many, number, code):
    """SIGTERM or Ctrl-C to the whole group, or a worker killed for want of memory: promptly, one line."""
    folder, begin = many
    process = begin()
    wait_until(lambda: shards(folder / 'out'))
    working = workers_of(process.pid)
    for pid in working[:1] if code == 1 else [process.pid, *working]:
        os.kill(pid, number)
    began = time.time()
    _, said = process.communicate(timeout=20)
    assert time.time() - began < 5
    assert process.returncode == code, said
    assert 'the same command goes on' in said.splitlines()[-1]
    assert ('--num_proc' in said) == (code == 1)
    assert 'Traceback' not in said
    wait_until(lambda: not any(os.path.exists(f'/proc/{p}') for p in working), 10)

def test_an_epoch_reads_almost_every_sentence_of_the_demo_once(tmp_path):
    assert len(list(prepare.read_bible())) == 1189
    assert next(prepare.read_bible()).startswith('In the beginning')
    run('prepare.py', 'config/prepare_demo.py', f'--data_dir={tmp_path}/demo')
    corpus = prepare.Corpus(tmp_path / 'demo', 'train')
    disk = Counter((d, s.tobytes()) for d in range(corpus.n_documents) for s in corpus.document(d))
    n, columns, firsts = corpus.n_windows(512), corpus.max_sentences(512), set()
    for epoch in (0, 1):
        read = Counter()
        for k in range(epoch * n, epoch * n + n):
            batch = corpus.batch(k, 0, 1, 1, 512, columns, seed=5)
            tokens, sentence, document = (value[0] for value in batch.values())
            rows = np.split(tokens.astype(np.uint16), np.flatnonzero(np.diff(sentence)) + 1)
            read.update((d, s.tobytes()) for d, s in zip(document.tolist(), rows) if d >= 0)
            firsts |= {tokens.tobytes()} if k % n == 0 else set()
        assert read <= disk
        assert read.total() >= 0.96 * disk.total()
    assert len(firsts) == 2  # another order in another epoch

@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('packing', [(64, 8, 0), (128, 5, 0), (128, 16, 2), (10**5, 900, 1)])
def test_rows_are_as_designed(corpus_dir, split, packing):
    """Against the definition, sentence by sentence over the whole split, shards end to end."""
    block_size, columns, prefix = packing
    corpus, sentences, position = prepare.Corpus(corpus_dir, split), [], 0
    for d, document in enumerate(map(corpus.document, range(corpus.n_documents))):
        for ids in document:
            sentences.append((position, d, [0] * prefix + ids.tolist()))
            position += len(ids) + prefix
    n = corpus.n_windows(block_size, prefix)
    assert n == max(position // block_size, 1)
    for k in range(2 * n):
        order, offset = prepare.permutation(n, 3, k // n)
        assert sorted(order) == list(range(n))
        shift = int(offset * block_size) if n > 1 else 0
        first, row, used = order[k % n] * block_size - shift, [], 0
        for begin, d, ids in sentences:
            if first <= begin < first + block_size:
                used += len(ids)
                row += [(d, ids)] if used <= block_size and len(row) < columns else []
        assert row
        tokens = [t for _, ids in row for t in ids]
        sentence = [i for i, (_, ids) in enumerate(row) for _ in ids]
        batch = corpus.batch(0, k, 99, 1, block_size, columns, 3, prefix)
        assert batch['tokens'][0].tolist() == tokens + [0] * (block_size - len(tokens))
        assert batch['sentence'][0].tolist() == sentence + [-1] * (block_size - len(tokens))
        assert batch['document'][0].tolist() == [d for d, _ in row] + [-1] * (columns - len(row))

def test_batches_are_pure_and_micro_batches_share_rows(corpus_dir):
    one, two = prepare.Corpus(corpus_dir, 'train'), prepare.Corpus(corpus_dir, 'train')
    late = two.batch(7, 0, 1, 4, 128, 16)  # asked for first, out of order
    early = one.batch(0, 0, 1, 4, 128, 16)['tokens']
    for name, rows in late.items():
        assert rows.dtype == np.int64
        assert np.array_equal(one.batch(7, 0, 1, 4, 128, 16)[name], rows)
        assert np.array_equal(np.concatenate([two.batch(7, m, 2, 2, 128, 16)[name] for m in (0, 1)]), rows)
    assert not np.array_equal(early, late['tokens'])
    assert not np.array_equal(early, one.batch(0, 0, 1, 4, 128, 16, seed=1)['tokens'])
    every = np.concatenate([one.shard(k)[2] for k in range(len(one.paths))])
    assert (one.token_counts() == np.bincount(every, minlength=one.tokenizer.n_vocab)).all()
    assert 100 <= one.token_counts(100).sum() < len(every)
    with pytest.raises(UserError, match='block_size=8 is too small'):
        one.batch(0, 0, 1, 1, 8, 4)

def test_ten_billion_tokens_in_thousands_of_shards(tmp_path):
    """3,000 sparse shards, links to one file: the first batch within two seconds, and few files open."""
    sizes, n, length = [40] * 833, 3000, 100  # sentences of a document; shards; tokens of a sentence
    words = np.r_[len(sizes), sum(sizes), sum(sizes) * length, length, 0, 0,
                  0, np.cumsum(sizes), np.arange(sum(sizes) + 1) * length].astype(np.int64)
    (tmp_path / 'one').write_bytes(words.tobytes())
    os.truncate(tmp_path / 'one', words.nbytes + 2 * sum(sizes) * length)
    names = [f'train_{k:06d}.bin' for k in range(n)]
    for name in names:
        os.link(tmp_path / 'one', tmp_path / name)
    (tmp_path / 'done').write_text(json.dumps({'train': dict.fromkeys(names, words[:6].tolist())}))
    (tmp_path / 'meta.json').write_text(json.dumps(
        {'run': {'format': prepare.FORMAT}, 'dtype': 'uint16', 'tokenizer': {'n_vocab': 9}}))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 40, limit[1]))
    try:
        began = time.process_time()  # other tests run beside it
        corpus = prepare.Corpus(tmp_path, 'train')
        corpus.batch(10**6, 3, 8, 16, 512, 8)
        assert time.process_time() - began < 2
        seen = [corpus.batch(k, 0, 1, 8, 512, 8)['document'] for k in range(500)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert corpus.n_tokens > 9.9e9
    assert len(np.unique(np.concatenate(seen) // len(sizes))) > 2000  # of 3,000 shards

def test_the_benchmark_runs(tmp_path):
    run('tests/bench_prepare.py', '--megabytes=1', '--num_proc=1', '--repeats=1', f'--results={tmp_path}')
    for name in ('split', 'prepare'):
        assert 'MB/s' in (tmp_path / f'{name}.csv').read_text()
