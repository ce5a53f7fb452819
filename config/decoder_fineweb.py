# For out/fineweb (config/encoder_fineweb.py): one large GPU, or several with torchrun. Not yet run.
out_dir = 'out/fineweb'
n_layer = 12
n_head = 12
n_embd = 768
n_prefix = 4
batch_size = 16
block_size = 4096
gradient_accumulation_steps = 8
learning_rate = 6e-4
warmup_iters = 500
max_iters = 20_000
eval_interval = 1000
