"""prepare.py: sentences, tokenizers, files on disk, and batches."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import hub
import numpy as np
import pytest
import tiktoken
from conftest import ROOT, free_port, run

import prepare

HARD = ['Dr. Smith met J. R. Jones at 3.5 p.m. He said "Go." Then they left (late.) All done?! Yes… no stop at all',
        '你好。世界！ Ünïcode naïve 👩‍👩‍👧 text.\n\n\n1. First item\n2. Second item', 'x' * 9000, 'word ' * 3000, ' \n\t ',
        '<|endoftext|> is text. So is </s>.', 'مرحبا بالعالم. كيف حالك؟', 'a\x00b. C\x0cd.', 'Plan B\u00a0. Then.', 'one, two; three: ' * 300]


@pytest.mark.parametrize('text', HARD)
def test_split_loses_only_white_space(text):
    parts = prepare.split_sentences(text)
    assert ''.join(''.join(parts).split()) == ''.join(text.split())
    assert all(p and p == ' '.join(p.split()) for p in parts)


def test_split_knows_abbreviations():
    assert prepare.split_sentences('Dr. Smith paid 3.50 dollars. He left.') == ['Dr. Smith paid 3.50 dollars.', 'He left.']


def boundaries(sentences):
    """Ends of sentences, counted in letters that are not white space; the last is no decision."""
    return set(np.cumsum([len(''.join(s.split())) for s in sentences])[:-1].tolist())


@pytest.mark.parametrize(('name', 'bar'), [('en_ewt-ud-dev', 0.85), ('en_gum-ud-dev', 0.95)])
def test_splitter_on_treebanks(name, bar):
    path = os.path.join(ROOT, '..', 'shared', 'data', 'sentence-boundaries', f'{name}.conllu')
    if not os.path.exists(path):
        pytest.skip('the treebank is not beside the checkout')
    paragraphs, tight = [], True
    for block in open(path, encoding='utf-8').read().split('\n\n'):
        text = [line[9:] for line in block.splitlines() if line.startswith('# text = ')]
        if not text:
            continue
        if not paragraphs or '# newpar' in block or '# newdoc' in block:
            paragraphs.append(([], ''))
        sentences, joined = paragraphs[-1]
        paragraphs[-1] = ([*sentences, text[0]], joined + ('' if tight or not joined else ' ') + text[0])
        tight = 'SpaceAfter=No' in block.splitlines()[-1]
    right = said = true = 0
    for sentences, text in paragraphs:
        a, b = boundaries(sentences), boundaries(prepare.split_sentences(text))
        right, said, true = right + len(a & b), said + len(b), true + len(a)
    f1 = 2 * right / (said + true)
    print(f'{name}: boundary F1 {f1:.3f} over {true} boundaries')
    assert f1 >= bar


def test_golden_rules():
    path = os.path.join(ROOT, '..', 'shared', 'data', 'sentence-boundaries', 'pysbd_golden_rules_en.json')
    if not os.path.exists(path):
        pytest.skip('the golden rules are not beside the checkout')
    rules = json.load(open(path))
    held = sum([' '.join(s.split()) for s in r['sentences']] == prepare.split_sentences(r['text']) for r in rules)
    print(f'golden rules held: {held} of {len(rules)}')
    assert held >= 38


def letters(texts):
    """A tokenizer of letters, for the cutting of long sentences."""
    return prepare.flat([[ord(c) for c in text] for text in texts])


@pytest.mark.parametrize('text', HARD)
def test_long_sentences_are_cut_not_dropped(text):
    ids, lengths, _ = prepare.encode_documents([text], letters, 128)
    assert lengths.sum() == len(ids)
    out = np.split(ids, np.cumsum(lengths)[:-1]) if len(ids) else []
    assert all(0 < len(ids) <= 128 for ids in out)
    assert ''.join(''.join(chr(i) for ids in out for i in ids).split()) == ''.join(text.split())


def test_round_trip_text_to_disk_to_text(corpus_dir, texts):
    back = []
    for split in ('train', 'val'):
        corpus = prepare.Corpus(corpus_dir, split)
        back += [' '.join(corpus.tokenizer.decode(s) for s in corpus.document(i)) for i in range(corpus.n_documents)]
    assert sorted(back) == sorted(texts)
    assert len(corpus.meta['splits']['train']['shards']) > 1


def test_tokens_are_counted(corpus_dir):
    corpus = prepare.Corpus(corpus_dir, 'train')
    every = np.concatenate([shard.tokens for shard in corpus.shards[:8]])
    assert (corpus.token_counts() == np.bincount(every, minlength=corpus.meta['tokenizer']['n_vocab'])).all()
    assert corpus.token_counts(100).sum() == 100 * min(len(corpus.shards), 8)


def read_all(folder):
    return {n: (open(os.path.join(folder, n), 'rb').read() if n != 'meta.json' else
                json.load(open(os.path.join(folder, n)))['splits']) for n in sorted(os.listdir(folder))}


def test_output_does_not_depend_on_processes(corpus_dir, tmp_path):
    source = os.path.join(os.path.dirname(corpus_dir), 'docs.jsonl')
    run('prepare.py', f'--dataset={source}', f'--data_dir={tmp_path}/two', '--tokenizer=bpe:400', '--val_fraction=0.2',
        '--shard_tokens=2000', '--num_proc=2')
    assert read_all(tmp_path / 'two') == read_all(corpus_dir)


def test_sentences_are_tokenized_each_on_its_own(corpus_dir, texts):
    """The fast path, many at once, gives what one at a time gives; so do texts that it cannot take."""
    encode = prepare.Corpus(corpus_dir, 'train').tokenizer.encode_batch
    sentences = [s for t in [*texts[:30], *HARD] for s in prepare.split_sentences(t)]
    for some in (sentences, ['a', '', 'b'], [' a', 'b '], ['a\nb', 'c'], ['a   b', 'c'], ['\ud800', 'x'], []):
        together = encode(some)
        assert len(together) == len(some)
        assert [list(ids) for ids in together] == [list(encode([s])[0]) for s in some]


def test_faster_pattern_is_gpt2s(texts):
    """On folded text, any characters in it; with ranks of our own, as gpt2's would have to be downloaded."""
    from tiktoken_ext.openai_public import r50k_pat_str
    # every pair of bytes is a token: text that is cut elsewhere gets other ids
    merges = {bytes([a]): a for a in range(256)} | {bytes([a, b]): 256 * a + b + 256 for a in range(256) for b in range(256)}
    theirs, ours = (tiktoken.Encoding('x', pat_str=p, mergeable_ranks=merges, special_tokens={}).encode_ordinary
                    for p in (r50k_pat_str, prepare.GPT2_FOLDED))
    rng = random.Random(0)
    some = 'abz ABZ  12\'sdtmlSDTMver.,;!?-–…“”é你好ёß\u0301\u00a0\u2028\u3000\u200d\t\x1c\x85😀'
    for text in [*texts[:30], *HARD, *(''.join(rng.choices(some, k=60)) for _ in range(3000))]:
        folded = '\n'.join(prepare.split_sentences(text))
        assert ours(folded) == theirs(folded)


def test_documents_together_are_as_documents_alone(texts):
    several = [*texts[:5], '', *HARD, ' ', *texts[5:8]]
    ids, lengths, of = prepare.encode_documents(several, letters, 16)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    for i, text in enumerate(several):
        alone, sizes, _ = prepare.encode_documents([text], letters, 16)
        own = [r for r, k in zip(rows, of) if k == i]
        assert np.array_equal(np.concatenate([*own, alone[:0]]), alone)
        assert [len(r) for r in own] == list(sizes)


def rows_of(corpus, packing, batch_size, n, **where):
    for step in range(n):
        batch = corpus.batch(step, batch_size, *packing, **where)
        for j in range(batch_size):
            yield tuple(v[j] for v in batch.values())


@pytest.mark.parametrize('prefix', [0, 2])
def test_each_sentence_comes_once_an_epoch(corpus_dir, prefix):
    corpus = prepare.Corpus(corpus_dir, 'train')
    packing = (128, 5)
    n = corpus.rows_per_epoch(*packing, prefix=prefix)
    seen = []
    for tokens, sentence, document in rows_of(corpus, packing, 1, n, prefix=prefix):
        used = int((document >= 0).sum())
        assert sentence.max() == used - 1
        for s in range(used):
            ids = tokens[sentence == s]
            assert (ids[:prefix] == 0).all()
            seen.append(tuple(ids[prefix:]))
    disk = [tuple(s) for i in range(corpus.n_documents) for s in corpus.document(i)]
    assert sorted(seen) == sorted(disk)
    second = corpus.batch(n, 1, *packing, prefix=prefix)['tokens']
    assert not np.array_equal(second, corpus.batch(0, 1, *packing, prefix=prefix)['tokens'])  # another shuffle


def test_neighbours_in_a_row_are_neighbours_on_disk(corpus_dir):
    corpus = prepare.Corpus(corpus_dir, 'train')
    follows = {(tuple(a), tuple(b)) for i in range(corpus.n_documents)
               for a, b in zip(corpus.document(i), corpus.document(i)[1:])}
    for tokens, sentence, document in rows_of(corpus, (128, 16), 2, 5):
        for s in range(int((document >= 0).sum()) - 1):
            pair = tuple(tokens[sentence == s]), tuple(tokens[sentence == s + 1])
            assert document[s] != document[s + 1] or pair in follows


def test_batches_are_pure_and_ranks_share_rows(corpus_dir):
    one, two = prepare.Corpus(corpus_dir, 'train'), prepare.Corpus(corpus_dir, 'train')
    late = two.batch(7, 4, 128, 16)['tokens']  # asked for first, out of order
    assert np.array_equal(one.batch(7, 4, 128, 16)['tokens'], late)
    halves = [two.batch(7, 2, 128, 16, rank=r, world_size=2)['tokens'] for r in (0, 1)]
    assert np.array_equal(np.concatenate(halves), late)


def test_a_late_row_is_found_as_fast_as_an_early_one(corpus_dir, monkeypatch):
    """And is the one that counting through all epochs before it gives."""
    corpus, packing, orders = prepare.Corpus(corpus_dir, 'train'), (128, 16, 0), []
    assert len(corpus.shards) > 1
    order = prepare.Corpus._shard_order
    monkeypatch.setattr(prepare.Corpus, '_shard_order', lambda self, *a: orders.append(a) or order(self, *a))
    row = 0
    for epoch in range(6):
        for k in order(corpus, epoch, 3):
            n = len(corpus._shard_rows(k, epoch, 3, packing).starts) - 1
            for r in (0, n - 1):
                rows, shard, place = corpus._locate(row + r, 3, packing)
                assert (shard, place, len(rows.starts) - 1) == (k, r, n)
            row += n
    before = len(orders)
    corpus._locate(row - 1, 3, packing)
    assert len(orders) == before + 1


def test_a_row_too_short_for_a_sentence_is_refused(corpus_dir):
    with pytest.raises(ValueError, match='block_size=8 is too small'):
        prepare.Corpus(corpus_dir, 'train').batch(0, 1, 8, 4)


@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove'])
def test_a_damaged_file_is_named(corpus_dir, tmp_path, damage):
    folder = shutil.copytree(corpus_dir, tmp_path / 'copy')
    victim = folder / 'train_000001.sentences'
    data = bytearray(victim.read_bytes())
    data[11] ^= 4
    victim.write_bytes(data if damage == 'flip' else data[:-8])
    if damage == 'remove':
        victim.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match='train_000001.sentences'):
        prepare.Corpus(str(folder), 'train')


@pytest.mark.parametrize(('name', 'content', 'args', 'says'), [
    ('a.jsonl', b'{"body": "x"}\n', (), 'body'), ('a.jsonl', b'{"text": "x"\n', (), 'line 1: not JSON'),
    ('a.txt', b' \n\n', (), 'no sentence'), ('a.txt.gz', b'not a gz', (), 'cannot read'),
    ('a.parquet', b'PAR1 cut short', (), 'cannot read'), ('a.doc', b'x', (), 'expected .txt'),
    ('a.txt', b'One. Two.\n', ('--tokenizer=gtp2',), 'gtp2'), ('a.txt', b'One. Two.\n', ('--tokenizer=bpe:x',), 'bpe:4096')])
def test_mistakes_stop_with_one_line(tmp_path, name, content, args, says):
    (tmp_path / name).write_bytes(content)
    done = run('prepare.py', f'--dataset={tmp_path / name}', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300',
               '--num_proc=1', *args, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert 'Traceback' not in done.stderr
    assert not os.path.exists(tmp_path / 'out' / 'meta.json')


@pytest.fixture
def quick(tmp_path):
    """Variables by which a script, and all that it uses, waits for nothing: the hub's client pauses between tries."""
    (tmp_path / 'quick').mkdir()
    (tmp_path / 'quick' / 'sitecustomize.py').write_text('import time\ntime.sleep = lambda seconds: None\n')
    return {'PYTHONPATH': str(tmp_path / 'quick'), 'HF_HOME': str(tmp_path / 'hf')}


def test_a_hub_out_of_reach_says_so(tmp_path, quick):
    done = run('prepare.py', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300', '--num_proc=1', '--hub_retries=1',
               check=False, HF_ENDPOINT='http://127.0.0.1:9', **quick)
    assert done.returncode == 1
    assert '--dataset=web-bible' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_half_a_character_is_replaced(tmp_path):
    """json can hold a lone surrogate; the document is kept, and its neighbours."""
    (tmp_path / 'a.jsonl').write_text('{"text": "One \\ud800 here. Two."}\n{"text": "Three. Four."}\n')
    run('prepare.py', f'--dataset={tmp_path}/a.jsonl', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:270', '--val_fraction=0',
        '--num_proc=1')
    corpus = prepare.Corpus(tmp_path / 'out', 'train')
    assert [corpus.tokenizer.decode(s) for d in range(2) for s in corpus.document(d)] == ['One ? here.', 'Two.', 'Three.', 'Four.']


def test_a_tokenizer_left_behind_is_not_used(tmp_path):
    """A run that found no sentence leaves its tokenizer; the next one trains its own."""
    (tmp_path / 'empty.txt').write_text(' \n')
    (tmp_path / 'full.txt').write_text('The river stood. The stone stood near the river.\n' * 20)
    arguments = [f'--data_dir={tmp_path}/out', '--num_proc=1', '--val_fraction=0']
    assert run('prepare.py', f'--dataset={tmp_path}/empty.txt', '--tokenizer=bpe:300', *arguments, check=False).returncode == 1
    run('prepare.py', f'--dataset={tmp_path}/full.txt', '--tokenizer=bpe:270', *arguments)
    assert prepare.Corpus(tmp_path / 'out', 'train').meta['tokenizer']['n_vocab'] == 270


def test_a_shard_renamed_but_not_noted_is_taken_up(tmp_path):
    """Killed between the renames of a finished shard and the note of it: the next run goes on from the note."""
    part = (np.arange(6, dtype=np.uint16).tobytes(), np.array([2, 4]), np.array([2]))
    writer = prepare.Writer(str(tmp_path), 'train', 0, 1)
    writer.add(*part)
    noted = json.loads(json.dumps(writer.flush()))
    writer.add(*part)
    writer.close()
    again = prepare.Writer(str(tmp_path), 'train', 0, 1, noted)
    again.add(*part)
    again.close()
    assert again.state['shards'] == writer.state['shards']
    assert not [f for f in os.listdir(tmp_path) if f.endswith('.tmp')]


def test_a_signal_waits_for_what_is_uninterrupted():
    done = []

    def work():
        with prepare.uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append('whole')
    before = signal.signal(signal.SIGTERM, prepare.on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ['whole']


def test_readers_agree(tmp_path, texts):
    import lzma

    import pyarrow
    import pyarrow.parquet
    lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
    (tmp_path / 'b.jsonl.xz').write_bytes(lzma.compress(lines))
    (tmp_path / 'c.txt').write_text('\n'.join(texts))
    (tmp_path / 'd.txt').write_text('<sep>'.join(texts))
    pyarrow.parquet.write_table(pyarrow.table({'text': texts, 'id': list(range(len(texts)))}), tmp_path / 'e.parquet')
    pytest.importorskip('backports.zstd', reason='optional: pip install -r tests/requirements.txt')
    from backports import zstd
    (tmp_path / 'f.jsonl.zst').write_bytes(zstd.compress(lines))
    (tmp_path / 'g.jsonl.zst').write_bytes(zstd.compress(lines)[:-50])
    with pytest.raises(prepare.Mistake, match='cannot read'):
        list(prepare.read_file(str(tmp_path / 'g.jsonl.zst'), 'text', ''))
    (tmp_path / 'g.jsonl.zst').write_bytes(b'not a zst')
    with pytest.raises(prepare.Mistake, match='cannot read'):
        list(prepare.read_file(str(tmp_path / 'g.jsonl.zst'), 'text', ''))
    for name, separator in (('a.jsonl.gz', ''), ('b.jsonl.xz', ''), ('f.jsonl.zst', ''), ('c.txt', ''), ('d.txt', '<sep>'), ('e.parquet', '')):
        read = [t.strip() for t in prepare.read_file(str(tmp_path / name), 'text', separator)]
        assert read == texts, name


def test_the_embedded_bible_reads_clean():
    chapters = list(prepare.read_bible())
    assert len(chapters) == 1189
    assert chapters[0].startswith('In the beginning')


HUB_TEXTS = [f'Document {i} begins here. It says {i * 7}. Then it ends.' for i in range(60)]


def stand_in(failures=()):
    return hub.Hub({'README.md': hub.CARD.encode(), 'sample/10BT/000_00000.parquet': hub.parquet(HUB_TEXTS[:30]),
                    'sample/10BT/001_00000.parquet': hub.parquet(HUB_TEXTS[30:]), 'data/CC/000.parquet': hub.parquet(['Wrong.'])},
                   failures)


def documents_of(folder):
    return sorted(' '.join(c.tokenizer.decode(s) for s in c.document(d))
                  for c in (prepare.Corpus(folder, 'train'), prepare.Corpus(folder, 'val')) for d in range(c.n_documents))


@pytest.mark.parametrize('failures', [(), (500, 429, 'drop', 'stall', 500)])
def test_fineweb_edu_is_streamed_from_the_hub(tmp_path, quick, failures):
    """The defaults, as a user runs them, against the routes that the hub's client asks; also when some fail first."""
    with stand_in(failures) as server:
        run('prepare.py', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300', '--num_proc=1', '--val_fraction=0.2',
            HF_ENDPOINT=server.url, HF_HUB_DOWNLOAD_TIMEOUT='2', **quick)
        assert not server.failures
        assert any('sample/10BT/001' in path for path in server.asked)
        assert not any('data/CC' in path and 'resolve' in path for path in server.asked), 'sample-10BT only'
    assert documents_of(tmp_path / 'out') == sorted(HUB_TEXTS)


HUB_AGAIN = '''
import sys
import datasets, prepare
settings = {'dataset': prepare.dataset, 'dataset_config': prepare.dataset_config, 'dataset_split': 'train', 'text_column': 'text',
            'hub_retries': 4}
load, fail = datasets.load_dataset, iter([0, 7, 0, 0, 33, 50])  # records after which the stream breaks; 0: before the first

def flaky(*a, **k):
    stream, after = load(*a, **k), next(fail, 99)
    if not after:
        raise ConnectionError('no route')
    whole = type(stream).__iter__
    class Breaks(type(stream)):
        def __iter__(self):
            for i, record in enumerate(whole(self)):
                if i == after:
                    raise ConnectionError('reset')
                yield record
    stream.__class__ = Breaks
    return stream
datasets.load_dataset, prepare.time.sleep = flaky, lambda s: None
place, texts = {'state': None}, []
for text in prepare.read_hub(settings, 0, 1, place):
    texts.append(text)
    if len(texts) == 45:  # into the second file
        break
again = prepare.json.loads(prepare.json.dumps(place))
texts += prepare.read_hub(settings, 0, 1, again)
print(prepare.json.dumps(texts))
sys.stdout.flush()
prepare.os._exit(0)
'''


def test_a_broken_stream_goes_on_at_its_record(tmp_path):
    """Tries beyond the client's own; and another process goes on from the place noted, not from the first file."""
    with stand_in() as server:
        done = run('-c', HUB_AGAIN, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'hf'))
    assert json.loads(done.stdout) == HUB_TEXTS


def test_a_hub_that_was_lost_is_read_on_from_there(tmp_path):
    arguments = [f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300', '--num_proc=1', '--val_fraction=0.2', '--shard_tokens=100',
                 '--hub_retries=1']
    texts = [f'Document {i} begins here. It says {i * 7}.' for i in range(500)]
    parts = {f'sample/10BT/{i:03}.parquet': hub.parquet(texts[a:b]) for i, (a, b) in enumerate([(0, 32), (32, 64), (64, 450), (450, 500)])}
    with hub.Hub({'README.md': hub.CARD.encode(), 'data/CC/000.parquet': hub.parquet(['Wrong.']), **parts}) as server:
        hub_of = {'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path / 'hf')}
        server.gone = lambda name: '003' in name and (tmp_path / 'out' / 'tokenizer.tiktoken').exists()
        assert 'cannot read' in run('prepare.py', *arguments, check=False, **hub_of).stderr
        server.gone, server.asked[:] = lambda name: False, []
        done = run('prepare.py', *arguments, **hub_of)
        assert 'going on after 192 documents' in done.stdout
        assert not any('resolve' in path and path.endswith('10BT/001.parquet') for path in server.asked)
    assert documents_of(tmp_path / 'out') == sorted(texts)


def test_a_missing_column_on_the_hub_is_named(tmp_path):
    with stand_in() as server:
        done = run('prepare.py', f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300', '--num_proc=1', '--text_column=body',
                   HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'hf'), check=False)
    assert done.returncode == 1
    assert 'language_score' in done.stderr
    assert 'Traceback' not in done.stderr


def test_torchrun_shares_a_source(tmp_path):
    """Two ranks write their own shards and one meta.json: the same documents as one process."""
    source = tmp_path / 'docs.jsonl'
    source.write_text(''.join(json.dumps({'text': t}) + '\n' for t in HUB_TEXTS))
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}', 'prepare.py', f'--dataset={source}',
        f'--data_dir={tmp_path}/out', '--tokenizer=bpe:300', '--num_proc=1', '--val_fraction=0.2')
    assert documents_of(tmp_path / 'out') == sorted(HUB_TEXTS)
    assert len([f for f in os.listdir(tmp_path / 'out') if f.endswith('.documents')]) == 4


def begin(file, arguments):
    """A prepare.py that has written `file` by now; what it says comes in one stream."""
    process = subprocess.Popen([sys.executable, 'prepare.py', *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    end = time.time() + 100
    while time.time() < end and process.poll() is None and not file.exists():
        time.sleep(0.005)
    return process


def test_an_interrupted_run_goes_on(tmp_path):
    """SIGTERM in the middle: exit 143, and the same command again gives the bytes of an undisturbed run."""
    source = tmp_path / 'docs.jsonl'
    source.write_text(''.join(json.dumps({'text': f'{t} ' * 200}) + '\n' for t in HUB_TEXTS * 25))
    arguments = [f'--dataset={source}', '--tokenizer=bpe:300', '--num_proc=1', '--shard_tokens=100000']
    run('prepare.py', *arguments, f'--data_dir={tmp_path}/whole')
    process = begin(tmp_path / 'out' / 'train_000001.documents', [*arguments, f'--data_dir={tmp_path}/out'])
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert 'documents are done' in said
    assert 'same command goes on' in said
    assert not (tmp_path / 'out' / 'meta.json').exists()
    with pytest.raises((OSError, ValueError)):
        prepare.Corpus(tmp_path / 'out', 'train')
    run('prepare.py', *arguments, f'--data_dir={tmp_path}/out')
    names = sorted(f for f in os.listdir(tmp_path / 'whole') if f != 'meta.json')
    assert names == sorted(f for f in os.listdir(tmp_path / 'out') if f != 'meta.json')
    for name in names:
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'out' / name).read_bytes(), name


@pytest.fixture
def begun(tmp_path):
    """A set that a run left in the middle, and the arguments that go on with it."""
    source = tmp_path / 'docs.jsonl'
    source.write_text(''.join(json.dumps({'text': f'{t} ' * 200}) + '\n' for t in HUB_TEXTS * 25))
    arguments = [f'--dataset={source}', '--tokenizer=bpe:300', '--num_proc=1', '--shard_tokens=100000', '--val_fraction=0.2',
                 f'--data_dir={tmp_path}/out']
    process = begin(tmp_path / 'out' / 'train_000001.documents', arguments)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    return tmp_path / 'out', arguments


@pytest.mark.parametrize(('signals', 'code', 'says'), [([], 1, 'lower --num_proc'), ([signal.SIGTERM], 143, 'same command goes on')])
def test_a_process_killed_while_it_writes(tmp_path, signals, code, says):
    """The pool then waits for the rest of an answer that never comes: the run ends nevertheless, alone and when interrupted."""
    source = tmp_path / 'docs.jsonl'
    # what is asked lies in a pipe whole, and an answer, 10 bytes a line, does not: with the parent stopped, the worker stops in one
    source.write_text((json.dumps({'text': 'A\n' * 150}) + '\n') * 12_800)
    process = begin(tmp_path / 'out' / 'train_000000.tokens.tmp', [
        f'--dataset={source}', '--tokenizer=bpe:300', '--num_proc=1', f'--data_dir={tmp_path}/out'])

    def of(pid, name):
        with open(f'/proc/{pid}/{name}') as f:
            return f.read()

    def sleeps():
        """Whether the worker waits for the same thing for .3 s."""
        before = of(worker, 'schedstat')
        time.sleep(0.3)
        return of(worker, 'schedstat') == before

    try:
        process.send_signal(signal.SIGSTOP)
        worker, = [pid for pid in of(process.pid, f'task/{process.pid}/children').split() if 'spawn_main' in of(pid, 'cmdline')]
        end = time.time() + 60
        while not sleeps() or 'read' in of(worker, 'wchan'):  # it has to stop with half an answer written
            assert time.time() < end, 'the worker does not stop in an answer'
            if 'read' in of(worker, 'wchan'):
                process.send_signal(signal.SIGCONT)
                time.sleep(0.01)
                process.send_signal(signal.SIGSTOP)
        os.kill(int(worker), signal.SIGKILL)
        for number in [*signals, signal.SIGCONT]:
            process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert says in said.splitlines()[-1]
    assert 'Traceback' not in said


@pytest.mark.parametrize(('name', 'says'), [('progress_0.json', 'damaged'), ('tokenizer.tiktoken', 'tokenizer'),
                                            ('.tmp', 'shorter than was noted')])
def test_what_a_run_goes_on_from_is_looked_at(begun, name, says):
    folder, arguments = begun
    path = folder / name
    if name == '.tmp':
        path = max(folder.glob('*.tokens.tmp'), key=os.path.getsize)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        content = path.read_bytes()
        digit = next(i for i in range(len(content) // 2, len(content)) if content[i:i + 1].isdigit())
        path.write_bytes(content[:digit] + (b'1' if content[digit:digit + 1] != b'1' else b'2') + content[digit + 1:])
    done = run('prepare.py', *arguments, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (folder / 'meta.json').exists()


def test_each_rank_of_a_second_run_is_refused(begun):
    folder, arguments = begun
    fd = prepare.hold(folder / 'lock_1')  # as the first run's second rank
    done = run('prepare.py', *arguments, check=False, RANK='1', WORLD_SIZE='2')
    os.close(fd)
    assert done.returncode == 1
    assert 'another run is writing there' in done.stderr
    before = sorted(f for f in os.listdir(folder) if 'lock' not in f)
    done = run('prepare.py', *arguments, check=False, RANK='1', WORLD_SIZE='2')
    assert done.returncode == 1
    assert 'ranks=1, not 2' in done.stderr
    assert sorted(f for f in os.listdir(folder) if 'lock' not in f) == before


def test_a_complete_set_is_only_looked_at(corpus_dir):
    before = sorted(os.listdir(corpus_dir))
    settings = prepare.Corpus(corpus_dir, 'train').meta['settings']
    done = run('prepare.py', *(f'--{k}={v}' for k, v in settings.items() if k != 'max_docs'), '--max_docs=5', check=False)
    assert done.returncode == 1
    assert 'max_docs' in done.stderr
    assert sorted(os.listdir(corpus_dir)) == before


def test_a_silent_rank_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'PATIENCE', 0.3)
    with pytest.raises(prepare.Mistake, match='rank 1 has given no sign of life'):
        prepare.wait_for(str(tmp_path), 1)
    path = tmp_path / 'progress_1.json'
    prepare.write_json(path, prepare.sealed({'done': False}))
    assert not prepare.wait_for(str(tmp_path), 1)['done']
    with pytest.raises(prepare.Mistake, match='no sign of life'):
        prepare.wait_for(str(tmp_path), 1, done=True)
    lock, looks = tmp_path / 'lock_1', []

    def sleep(seconds):  # it lives for long, and is done within a tick of the file system's clock
        looks.append(seconds)
        lock.write_text('')
        os.utime(lock, ns=(len(looks), len(looks)))
        clock[0] += 0.2
        if len(looks) == 9:
            was = os.stat(path)
            prepare.write_json(path, prepare.sealed({'done': True}))
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    clock = [0.0]
    monkeypatch.setattr(prepare.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(prepare.time, 'sleep', sleep)
    assert prepare.wait_for(str(tmp_path), 1, done=True)['done']
    assert len(looks) == 9
