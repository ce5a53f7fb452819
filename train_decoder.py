"""Train the decoder: from a sentence's concept, the sentence. The encoder is frozen.

    python train_decoder.py config/decoder_demo.py
    torchrun --nproc_per_node=8 train_decoder.py config/decoder_fineweb.py
    python train_decoder.py config/decoder_demo.py --language_model=True    a baseline for evaluate.py

The same command goes on from a run that was stopped. Writes to out_dir, which may be the encoder's:
decoder.pt (newest), decoder_best.pt (lowest validation loss), metrics_decoder.csv, config_decoder.json;
language_model.pt and so on; and decoder_init.pt where encoder_path is an encoder_init.pt, so that evaluate.py
can compare with step 0.
"""

import math
import os

import torch
import torch.nn.functional as F

import model as lib
from config import UserError, override
from config.run import Run, all_sum
from prepare import Corpus

# ----------------------------------------------------------------------------------------------------
# Settings: override with a preset (config/decoder_*.py) and --name=value
# in and out
data_dir = ''  # what prepare.py wrote; '': what the encoder was trained on
out_dir = 'out/fineweb'  # the encoder's, for the checkpoints and metrics_decoder.csv
encoder_path = ''  # a checkpoint, or the out_dir of one; '': out_dir
init_from = 'scratch'  # 'resume': only where there is a checkpoint
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
log_interval = 10  # steps between lines in metrics_decoder.csv
eval_iters = 16  # validation batches an evaluation
# data: a step reads gradient_accumulation_steps * batch_size rows of block_size, over all ranks together
batch_size = 16  # rows in a micro-batch
block_size = 1024  # positions in a row: whole sentences, each with its prefix
max_sentences = 0  # sentences in a row at most; 0: twice what the mean row has
gradient_accumulation_steps = 1  # micro-batches a step, shared among the ranks
# model
n_layer = 12
n_head = 12
n_embd = 768
n_prefix = 2  # positions that carry the concept
dropout = 0.0
language_model = False  # True: no concept, and a token sees all that stands before it in its document's row
concept_noise = 0.1  # length of the Gaussian noise added to a unit-norm concept while training
predicted_share = 0.3  # share of sentences that are written from the prediction of their concept instead
concept_dropout = 0.1  # share of sentences written without their concept: what perplexity is compared with
# optimizer: AdamW
learning_rate = 6e-4
max_iters = 50_000
weight_decay = 0.05  # on a half cosine to weight_decay_end
weight_decay_end = 0.05
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0: no clipping
decay_lr = True
warmup_iters = 500
lr_decay_iters = 0  # 0: max_iters
min_lr = 0.0  # 0: a tenth of learning_rate
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1'; auto: cuda where there is one
dtype = 'auto'  # 'float32' or 'bfloat16' (autocast); auto: bfloat16 where the hardware multiplies it faster
compile = 'auto'  # True or False; auto: on CUDA
seed = 1337
settings = override(
    globals(),
    positive=('eval_interval', 'log_interval', 'eval_iters', 'batch_size', 'block_size', 'n_layer', 'n_head',
              'n_embd', 'gradient_accumulation_steps', 'n_prefix', 'max_iters'),
    shares=('dropout', 'predicted_share', 'concept_dropout', 'beta1', 'beta2'),
    choices={'init_from': ('scratch', 'resume'), 'dtype': ('auto', 'float32', 'bfloat16'),
             'compile': ('auto', True, False)})

# ----------------------------------------------------------------------------------------------------
# Setup: ranks, device, data, the frozen encoder

MEASURES = ['val_loss', 'val_shuffled', 'val_unconditional', 'val_information', 'val_predicted_information']
if predicted_share + concept_dropout >= 1:
    raise UserError(f'--predicted_share={predicted_share} and --concept_dropout={concept_dropout} leave no '
                    'sentence its concept')
kind = 'language_model' if language_model else 'decoder'
name = kind + '_init' * (os.path.basename(encoder_path) == 'encoder_init.pt')  # of the files
run = Run(settings, kind, MEASURES, name)
encoder = lib.load_encoder(encoder_path or out_dir, run.device)
jepa = encoder.model
data_dir = data_dir or encoder.settings['data_dir']
train_data, val_data = Corpus(data_dir, 'train'), Corpus(data_dir, 'val')
tokenizer = train_data.meta['tokenizer']
if encoder.tokenizer.spec['sha256'] != tokenizer['sha256']:
    raise UserError(f"{data_dir} has another tokenizer than the encoder read: prepare it with that one")
for corpus in (train_data, val_data) if encoder.settings['freeze_encoder'] and not language_model else ():
    encoder.keep_means(corpus, compute=False)  # where train_encoder.py left them
run.read(train_data, val_data, n_prefix)

# ----------------------------------------------------------------------------------------------------
# Model: from scratch, or the checkpoint of a run that was stopped

config = {'vocab_size': tokenizer['n_vocab'], 'concept_dim': encoder.dim, 'eos': train_data.tokenizer.eos,
          'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'n_prefix': n_prefix, 'dropout': dropout}
fixed = {k: v for k, v in config.items() if k != 'dropout'} | {'encoder': f'{encoder.fingerprint:.6g}'}
state = run.resume(fixed)
torch.manual_seed(seed)
model = lib.Decoder(lib.DecoderConfig(**config)).to(run.device)
if state:
    model.load_state_dict(state['model'])
targets = run.compiled(jepa.targets)
attention = lib.attention_path(run.device_type, run.compile)
encoder_attention = 'mask' if jepa.config.hf else attention

# ----------------------------------------------------------------------------------------------------
# A batch's concepts, where token embeddings start, and what a validation batch costs with and without them

@torch.no_grad()
def inputs(tokens, sentence, document, *kept):
    """A batch's mask, its concepts (B, S, concept_dim), and what the predictor expects them to be.

    Both are zeros for a language model; a prediction also where no sentence of its document comes before.
    """
    if language_model:
        mask = lib.build_mask(lib.document_of(sentence, document), causal=True, path=attention)
        return mask, *torch.zeros(2, *document.shape, encoder.dim, device=run.device)
    # the encoder does not see the decoder's free positions
    words = torch.where(lib.place_in_sentence(sentence) < n_prefix, -1, sentence)
    own = lib.build_mask(words, path=encoder_attention)
    with run.autocast:
        z = kept[0] if kept else targets(tokens, words, document, own)
        expected = jepa.prediction_scale * jepa.expected(tokens, words, document, z)
    return lib.build_mask(sentence, causal=True, path=attention), jepa.whitening(z), expected

def draw(concepts, predictions):
    """Training's input for each sentence (B, S, D): its concept with noise, a prediction of it, or zeros."""
    if language_model:
        return concepts
    share = torch.rand(*concepts.shape[:2], 1, device=concepts.device)
    noise = torch.randn_like(concepts) / concepts.shape[-1] ** 0.5
    given = torch.where(share < predicted_share, predictions, lib.unit(concepts + concept_noise * noise))
    return torch.where(share >= 1 - concept_dropout, 0.0, given)

@torch.no_grad()
def evaluate():
    """Validation nats per token, ends included, given the concept, another document's, none, a prediction."""
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)
    for tokens, sentence, document, *kept in run.validation_batches(val_data, run.eval_iters):
        mask, concepts, predictions = inputs(tokens, sentence, document, *kept)
        # rolled by half a batch in the order of documents: of another one, unless one has half the sentences
        order = document.flatten().argsort(stable=True)[(document < 0).sum():]
        others = concepts.flatten(0, 1).clone()
        others[order] = others[order.roll(len(order) // 2)]
        with run.autocast:
            given = concepts, others.view_as(concepts), torch.zeros_like(concepts), predictions
            for j, c in enumerate(given):
                sums[j] += forward(tokens, sentence, c, mask).double()
        sums[4] += (sentence >= 0).sum() - (n_prefix - 1) * (document >= 0).sum()
    model.train()
    all_sum(sums)
    given, shuffled, none, predicted = (sums[:4] / sums[4]).tolist()
    return dict(zip(MEASURES, (given, shuffled, none, none - given, none - predicted)))

@torch.no_grad()
def concepts_around_tokens(n_positions=800_000):
    """Of each token the mean concept of sentences that hold it (V, concept_dim), shorter where few do."""
    total = torch.zeros(config['vocab_size'], encoder.dim + 1, device=run.device)
    for step in range(math.ceil(min(n_positions / run.positions, run.steps_per_epoch))):
        for tokens, sentence, *rest in map(run.to_device, run.micro_batches(step)):
            counted = F.pad(inputs(tokens, sentence, *rest)[1], (0, 1), value=1.0)
            row, i = ((sentence >= 0) & (lib.place_in_sentence(sentence) >= n_prefix)).nonzero(as_tuple=True)
            total.index_add_(0, tokens[row, i], counted[row, sentence[row, i]])
    total = all_sum(total)
    return total[:, :-1] / (total[:, -1:] + 20)

if not run.step and jepa.config.hf and not language_model:  # a token alone says little there
    model.start_from(4 * concepts_around_tokens(), jepa.token_weight, normalise=False)
elif not run.step:
    alone = encoder.encode_tokens([[i] for i in range(config['vocab_size'])], 1024)
    model.start_from(torch.from_numpy(alone).to(run.device), jepa.token_weight)
forward = run.build(model, lib.optimizer_groups(model), state, tokenizer=tokenizer,
                    fingerprint=encoder.fingerprint)
del state

# ----------------------------------------------------------------------------------------------------
# Loop

run.begin()
model.train()
while True:
    if run.evaluates():
        v = evaluate()
        text = ('nats per token {val_loss:.3f} | another concept {val_shuffled:.3f} | no concept '
                '{val_unconditional:.3f} | information {val_information:.3f}, of predictions '
                '{val_predicted_information:.3f}').format(**v)
        run.record(v, -v['val_loss'], text)
    if run.step >= max_iters or run.stopping:
        break
    batches = run.next_batches()
    n_tokens, = run.count(sum(int((sentence >= 0).sum()) - (n_prefix - 1) * int((document >= 0).sum())
                              for _, sentence, document, *_ in batches))
    torch.manual_seed(hash((seed, run.step, run.rank)))  # noise and dropout: no generator state to save
    for tokens, sentence, *rest in run.on_device(batches):
        mask, *concepts = inputs(tokens, sentence, *rest)
        with run.autocast:
            loss = forward(tokens, sentence, draw(*concepts), mask)
        run.backward(loss / n_tokens)
    run.update()
    run.log_step()
run.end('' if encoder_path else f'Next: python evaluate.py --out_dir={out_dir}')
