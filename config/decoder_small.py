# For out/small (config/encoder_small.py): one GPU. Not yet run.
out_dir = 'out/small'
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 16
block_size = 2048
learning_rate = 1e-3
warmup_iters = 500
max_iters = 20_000
eval_interval = 1000
