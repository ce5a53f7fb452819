# About 33M parameters on data/fineweb-edu: one GPU with 12 GB or more. Not yet run.
data_dir = 'data/fineweb-edu'
out_dir = 'out/small'
n_layer = 6
n_head = 6
n_embd = 384
predictor_layer = 2
batch_size = 16
block_size = 2048
ema_start = 0.98
ema_end = 0.999
learning_rate = 5e-4
warmup_iters = 500
max_iters = 20_000
eval_interval = 1000
