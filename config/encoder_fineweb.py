# An encoder of 124M parameters and a predictor of 28M on data/fineweb-edu (config/prepare_fineweb.py):
# one large GPU, or several with torchrun; half a million tokens a step. Not yet run.
data_dir = 'data/fineweb-edu'
out_dir = 'out/fineweb'
n_layer = 12
n_head = 12
n_embd = 768
predictor_layer = 4
batch_size = 16
block_size = 4096
gradient_accumulation_steps = 8
ema_start = 0.99
ema_end = 0.999
learning_rate = 5e-4
warmup_iters = 1000
max_iters = 20_000
eval_interval = 1000
