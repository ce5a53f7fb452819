"""tests/faults.py in miniature; the long version is run by hand."""

import json
import multiprocessing
from concurrent.futures import Future

import faults
import numpy as np
import pytest
import tiktoken

import model
import prepare


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with an undisturbed run of encoder and decoder in it, which the tests share."""
    folder = str(tmp_path_factory.mktemp('faults'))
    faults.undisturbed(folder)
    return folder


def told(rows):
    for row in rows:
        print(*row, sep=' | ')
    return rows


def test_killed_training_goes_on(work):
    told(faults.kills_train(work, kills=3, seed=1))


def test_killed_prepare_goes_on(work):
    told(faults.kills_prepare(work, kills=2))


def test_a_full_disk(work):
    told(faults.disk(work, sizes=(20_000,), tmpfs=()))


def test_damage_is_told(work):
    told(faults.files(work, flips=1))


def test_one_run_a_folder(work):
    told(faults.places(work))


def test_ruined_weights_are_not_saved(work):
    told(faults.numbers(work, faults.BROKEN[-1:]))


def test_bad_input(work):
    pytest.importorskip('hypothesis', reason='optional: pip install -r tests/requirements.txt')
    told(faults.fuzz(work, cases=300))


def test_offsets_of_a_large_shard(tmp_path):
    told(faults.sparse(str(tmp_path), tokens=100_000_000))


def test_the_soak_sees_a_leak():
    seen = np.array([(10 * i, 20 * i, 5 * i + (i % 3) / 10, 300 + i % 2, 20) for i in range(400)], float)
    assert '+0.0' in faults.soak_figures(seen)[1].replace('-0.0', '+0.0')
    seen[:, 3] += seen[:, 0] / 3600 * 50
    assert '+50.' in faults.soak_figures(seen)[1].replace('+49.9', '+50.')


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    """Ids past 65,535 come back from the disk."""
    ranks = {bytes([a]): a for a in range(256)}
    ranks |= {b' w%d' % i: 256 + i for i in range(70_000)}
    big = tiktoken.Encoding('big', pat_str=r' ?\w+|\W', mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: big)
    monkeypatch.setattr(type(big), 'eot_token', 70_256, raising=False)
    (tmp_path / 'a.txt').write_text('w1 w69999 w2.\n')
    settings = {k: v for k, v in vars(prepare).items() if k.islower() and type(v) in (str, int, float, bool)}
    settings |= {'dataset': f'{tmp_path}/a.txt', 'data_dir': f'{tmp_path}/out', 'tokenizer': 'big', 'val_fraction': 0.0, 'num_proc': 1}

    class Here:
        """The worker, in this process: a process of its own would know nothing of the tokenizer above."""

        def __init__(self, *arguments):
            self.spec, self._result_queue = arguments[3], multiprocessing.SimpleQueue()

        def submit(self, f, *arguments):
            prepare._encode = prepare.load_tokenizer(self.spec[0], self.spec[1]).encode
            future = Future()
            future.set_result(f(*arguments))
            return future

        def shutdown(self, **_):
            pass
    monkeypatch.setattr(prepare, 'ProcessPoolExecutor', Here)
    prepare.prepare(settings)
    corpus = prepare.Corpus(f'{tmp_path}/out', 'train')
    assert corpus.meta['dtype'] == 'uint32'
    assert corpus.document(0)[0].max() == 256 + 69_999


def test_code_in_a_model_s_folder_is_not_run(tmp_path):
    """As `trust_remote_code` would; transformers otherwise asks at a terminal."""
    pytest.importorskip('transformers', reason='optional: pip install -r tests/requirements.txt')
    auto = {'AutoConfig': 'code.C', 'AutoModel': 'code.M', 'AutoTokenizer': ['code.T', None]}
    for name in ('config.json', 'tokenizer_config.json'):
        (tmp_path / name).write_text(json.dumps({'model_type': 'unheard-of', 'auto_map': auto}))
    (tmp_path / 'code.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises((ValueError, OSError)):
        model.pretrained(str(tmp_path), {'name': f'hf:{tmp_path}', 'n_vocab': 9})
    with pytest.raises(prepare.Mistake):
        prepare.read_hf_tokenizer(str(tmp_path))
    assert not (tmp_path / 'ran').exists()
