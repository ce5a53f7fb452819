"""With transformers and mteb: models and tokenizers of the hub for ours, and what they ask of ours."""

import json
import shutil

import mteb
import pytest
import torch
import transformers
from conftest import prepared, refused, run, start
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from scipy.stats import spearmanr

import model as lib
from prepare import Corpus

SIZE = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2, 'intermediate_size': 64}
KINDS = {'bert': (transformers.BertConfig, {**SIZE, 'max_position_embeddings': 66}),
         'roberta': (transformers.RobertaConfig, {**SIZE, 'max_position_embeddings': 66}),
         'gpt2': (transformers.GPT2Config, {'n_embd': 32, 'n_layer': 2, 'n_head': 2, 'n_positions': 64}),
         'modernbert': (transformers.ModernBertConfig, {**SIZE, 'local_attention': 8, 'pad_token_id': 0})}

def config_of(kind, vocab_size=400):
    torch.manual_seed(0)
    named, size = KINDS[kind]
    return named(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **size)

@pytest.fixture(scope='module')
def folder(tmp_path_factory, texts):
    """Makes a folder as the hub has it: a model of some kind, and a byte-level tokenizer of 398 tokens."""
    import tokenizers
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=398, special_tokens=['<pad>', '</s>'], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, pad_token='<pad>',
                                                     eos_token='</s>')

    def make(kind):
        path = str(tmp_path_factory.mktemp(kind))
        tokenizer.save_pretrained(path)
        transformers.AutoModel.from_config(config_of(kind, 398)).save_pretrained(path)
        return path
    return make

@pytest.mark.parametrize('kind', KINDS)
def test_a_packed_sentence_is_as_if_alone(kind, corpus_dir):
    """Positions, masks and windows in a row give what the model gives for a sentence; nothing leaks back."""
    rows = Corpus(corpus_dir, 'train').batch(0, 0, 1, 2, 128, 12)
    tokens, sentence, document = (torch.from_numpy(rows[k]) for k in ('tokens', 'sentence', 'document'))
    for context in ('concepts', 'tokens'):
        config = config_of(kind).to_json_string(use_diff=False)
        net = lib.JEPA(lib.JEPAConfig(400, 3, 2, 32, 1, context=context, hf=config)).eval()
        own, mask = net.masks(sentence, document)
        with torch.no_grad():
            packed, before = net.encoder(tokens, own), net.predict(tokens, sentence, document, mask)
            for b, s in (document >= 0).nonzero().tolist():
                alone = net.encoder.net(input_ids=tokens[b][sentence[b] == s][None]).last_hidden_state[0]
                assert torch.allclose(packed[b][sentence[b] == s], alone, atol=1e-5)
            changed = torch.where(sentence > 2, (tokens + 7) % 400, tokens)
            after = net.predict(changed, sentence, document, mask)
        assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
        assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-3)

@pytest.mark.parametrize('kind', ['roberta', 'gpt2'])
def test_the_chain_with_a_model_of_the_hub(kind, folder, texts, tmp_path):
    """Prepared with, trained from, resumed, decoded; and loaded where the folder is gone."""
    path, out = folder(kind), tmp_path / 'model'
    prepared(tmp_path, 'docs.txt', '\n'.join(texts).encode(), f'--tokenizer=hf:{path}', '--val_fraction=0.2')
    small = [f'--out_dir={out}', '--batch_size=2', '--block_size=64', '--eval_iters=2', '--max_iters=6',
             '--warmup_iters=1']
    train = ['train_encoder.py', f'--data_dir={tmp_path}/out', *small, '--predictor_layer=1',
             f'--init_from=hf:{path}']
    start(*train, '--learning_rate=0').end()
    pretrained = transformers.AutoModel.from_pretrained(path).state_dict()
    for name, value in lib.load_encoder(out).model.target.net.state_dict().items():
        assert torch.allclose(value, pretrained[name], atol=1e-6), name
    shutil.rmtree(path)
    assert 'going on from step 6' in start(*train, '--max_iters=8', '--learning_rate=1e-3').end().stdout
    start('train_decoder.py', '--n_layer=1', '--n_head=2', '--n_embd=32', *small).end()
    encoder, decoder = lib.load_encoder(out), lib.load_decoder(out)
    z = encoder.encode(['The river stood.', 'A </s> is text.'])
    ids, = encoder.tokenizer.encode_batch(['A </s> is text.'])
    assert encoder.tokenizer.decode(ids) == 'A </s> is text.'
    assert (z.shape, len(decoder.generate(z, max_tokens=5))) == ((2, 32), 2)

def test_mistakes_are_one_line(corpus_dir, folder, tmp_path):
    """Data with another tokenizer, no model at all, and one whose folder holds code, which is not run."""
    for name, content in (('config', {'model_type': 'unheard-of'}), ('tokenizer_config', {})):
        code = {'AutoConfig': 'code.C', 'AutoModel': 'code.M', 'AutoTokenizer': ['code.T', None]}
        (tmp_path / f'{name}.json').write_text(json.dumps(content | {'auto_map': code}))
    (tmp_path / 'code.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for path, says in ((folder('bert'), '--tokenizer=hf:'), (tmp_path / 'no', '/no'), (tmp_path, 'hf:')):
        done = start('train_encoder.py', f'--data_dir={corpus_dir}', f'--out_dir={tmp_path}/out',
                     f'--init_from=hf:{path}').end(check=False)
        refused(done, says, alone=False)
    done = run('prepare.py', '--dataset=web-bible', f'--data_dir={tmp_path}/data',
               f'--tokenizer=hf:{tmp_path}', check=False)
    refused(done, 'hf:', alone=False)
    assert not (tmp_path / 'ran').exists()

def test_mteb_takes_the_encoder_as_it_is(corpus_dir):
    """On a task of a few pairs, without the hub: Spearman's correlation of its own cosines."""
    pairs = [(i % 5, f'The river {i} stood near {i % 3}.', f'A stone number {i * i % 7}.') for i in range(30)]
    score, a, b = map(list, zip(*pairs))

    class Pairs(AbsTaskSTS):
        metadata = mteb.TaskMetadata(
            name='Pairs', description='a few', type='STS', category='t2t', eval_splits=['test'],
            eval_langs=['eng-Latn'], main_score='cosine_spearman',
            dataset={'path': 'none', 'revision': 'none'})

        def load_data(self, **_):
            split = Dataset.from_dict({'score': score, 'sentence1': a, 'sentence2': b})
            self.dataset, self.data_loaded = DatasetDict({'test': split}), True
    torch.manual_seed(0)
    net = lib.JEPA(lib.JEPAConfig(400, 1, 2, 32))
    encoder = lib.SentenceEncoder(net, Corpus(corpus_dir, 'train').tokenizer)
    result, = mteb.evaluate(encoder, Pairs(), cache=None, show_progress_bar=False).task_results
    expected = spearmanr(encoder.similarity_pairwise(encoder.encode(a), encoder.encode(b)), score).statistic
    assert result.get_score() == pytest.approx(expected, abs=0.005)
