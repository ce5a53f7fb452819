"""Models and tokenizers of `transformers` in the place of ours: tiny random ones, made here."""

import shutil

import pytest
import torch
from conftest import run

import model as lib
from prepare import Corpus, load_tokenizer

transformers = pytest.importorskip('transformers', reason='optional: pip install -r tests/requirements.txt')
SIZE = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2, 'intermediate_size': 64}


def config_of(kind, vocab_size=400):
    if kind == 'gpt2':
        return transformers.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    if kind == 'modernbert':
        return transformers.ModernBertConfig(vocab_size=vocab_size, **SIZE, local_attention=8, pad_token_id=0,
                                             bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    named = {'bert': transformers.BertConfig, 'roberta': transformers.RobertaConfig}[kind]
    return named(vocab_size=vocab_size, **SIZE, max_position_embeddings=66)


@pytest.fixture(scope='module')
def tokenizer_folder(tmp_path_factory, texts):
    """A byte-level tokenizer of 400 tokens, as a Hugging Face folder."""
    import tokenizers
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=398, special_tokens=['<pad>', '</s>'], show_progress=False)
    folder = str(tmp_path_factory.mktemp('hf'))
    transformers.PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, pad_token='<pad>', eos_token='</s>').save_pretrained(folder)
    return folder


def wrapped(kind):
    torch.manual_seed(0)
    return lib.HFEncoder(config_of(kind).to_json_string(use_diff=False)).eval()


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'modernbert', 'gpt2'])
def test_a_packed_sentence_is_as_if_alone(kind, corpus_dir):
    """Positions, masks and windows in a packed row give what the model itself gives for each sentence."""
    rows = Corpus(corpus_dir, 'train').batch(0, 2, 128, 12)
    tokens, sentence, document = (torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document'))
    net = wrapped(kind)
    with torch.no_grad():
        packed = net(tokens, lib.build_mask(lib.sentence_view(sentence, document), tokens.shape, 'cpu'))
        for b in range(2):
            for s in range(int((document[b] >= 0).sum())):
                here = sentence[b] == s
                alone = net.net(input_ids=tokens[b][here][None]).last_hidden_state[0]
                assert torch.allclose(packed[b][here], alone, atol=1e-5)


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'modernbert', 'gpt2'])
@pytest.mark.parametrize('context', ['concepts', 'tokens'])
def test_no_later_sentence_moves_a_prediction(kind, context, corpus_dir):
    rows = Corpus(corpus_dir, 'train').batch(0, 2, 128, 12)
    tokens, sentence, document = (torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document'))
    torch.manual_seed(0)
    config = config_of(kind).to_json_string(use_diff=False)
    net = lib.JEPA(lib.JEPAConfig(400, 3, 2, 32, 1, context=context, hf=config)).eval()
    mask = net.masks(sentence, document)[1]
    with torch.no_grad():
        before = net.predict(tokens, sentence, document, mask)
        after = net.predict(torch.where(sentence > 2, (tokens + 7) % 400, tokens), sentence, document, mask)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-3)


@pytest.mark.parametrize('kind', ['roberta', 'gpt2'])
def test_the_chain_with_a_model_of_the_hub(kind, tokenizer_folder, texts, tmp_path):
    """A folder as the hub has it: prepared, trained, resumed, decoded; then loaded where the folder is gone."""
    folder = str(tmp_path / 'model')
    shutil.copytree(tokenizer_folder, folder)
    transformers.AutoModel.from_config(config_of(kind, 398)).save_pretrained(folder)
    (tmp_path / 'docs.txt').write_text('\n'.join(texts))
    data, out = f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out'
    run('prepare.py', f'--dataset={tmp_path}/docs.txt', data, f'--tokenizer=hf:{folder}', '--val_fraction=0.2', '--num_proc=1')
    train = ['--batch_size=2', '--block_size=64', '--compile=False', '--eval_iters=2', '--max_iters=6', '--eval_interval=3',
             '--warmup_iters=1', out]
    run('train_encoder.py', data, f'--init_from=hf:{folder}', '--predictor_layer=1', '--learning_rate=0', *train)
    start = transformers.AutoModel.from_pretrained(folder).state_dict()
    for name, value in lib.load_checkpoint(f'{tmp_path}/out', 'encoder')['model'].items():
        if name.startswith('target.net.'):
            assert torch.allclose(value, start[name[11:]], atol=1e-6), f'{name}: not the pretrained weights'
    shutil.rmtree(folder)
    run('train_encoder.py', data, '--init_from=resume', '--predictor_layer=1', *train, '--max_iters=8', '--learning_rate=1e-3')
    run('train_decoder.py', '--n_layer=1', '--n_head=2', '--n_embd=32', *train)
    encoder, decoder = lib.load_encoder(f'{tmp_path}/out'), lib.load_decoder(f'{tmp_path}/out')
    z = encoder.encode(['The river stood.', 'A </s> is text.'])
    assert z.shape == (2, 32)
    assert len(decoder.generate(z, max_tokens=5)) == 2
    assert 'in document' in run('evaluate.py', out, '--max_generated=5', '--max_scored=5').stdout


def test_special_tokens_are_text(tokenizer_folder, tmp_path):
    with open(f'{tokenizer_folder}/tokenizer.json', encoding='utf-8') as f:
        tokenizer = load_tokenizer({'name': 'hf:x', 'eos': 1, 'file': f.read()})
    ids, = tokenizer.encode_batch(['a </s> b'])
    assert 1 not in ids
    assert tokenizer.decode(ids) == 'a </s> b'


def test_mistakes_are_one_line(corpus_dir, tmp_path):
    transformers.AutoModel.from_config(config_of('bert', 500)).save_pretrained(tmp_path / 'model')
    for name, says in ((tmp_path / 'model', '--tokenizer=hf:'), (tmp_path / 'nowhere', 'nowhere')):
        done = run('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/out', f'--init_from=hf:{name}', check=False)
        assert done.returncode == 1
        assert says in done.stderr
        assert 'Traceback' not in done.stderr
    done = run('prepare.py', '--dataset=web-bible', f'--data_dir={tmp_path}/data', f'--tokenizer=hf:{tmp_path}/nowhere', check=False)
    assert done.returncode == 1
    assert 'nowhere' in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_judge_compares_texts(tokenizer_folder, tmp_path):
    import evaluate as ev
    folder = str(tmp_path / 'judge')
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(1)
    net = transformers.AutoModel.from_config(config_of('bert')).eval()
    net.save_pretrained(folder)
    texts = ['The river number 3 stood near the stone.', 'A cloud.', 'The winter of part 4.']
    got = ev.judge_encoder(folder)(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, got):  # one at a time, without padding
        with torch.no_grad():
            h = net(torch.tensor([tokenizer(text)['input_ids']])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.from_numpy(vector), lib.unit(h), atol=1e-5)
    with pytest.raises(ev.Mistake, match='cannot load --judge=no/such/folder'):
        ev.judge_encoder('no/such/folder')
