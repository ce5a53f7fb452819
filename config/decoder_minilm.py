# For out/minilm (config/encoder_minilm.py): hours on one CPU core, most of them for 30,522 logits a token.
out_dir = 'out/minilm'
n_layer = 1
n_head = 6
n_embd = 384
batch_size = 4
block_size = 512
learning_rate = 2e-3
warmup_iters = 50
max_iters = 3000
eval_interval = 100
eval_iters = 16
