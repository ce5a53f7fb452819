# For data/demo (config/prepare_demo.py): minutes on 2 CPU cores.
data_dir = 'data/demo'
out_dir = 'out/demo'
n_layer = 1
n_head = 6
n_embd = 384
predictor_layer = 2
fade = 0.2
batch_size = 8
block_size = 512
ema_start = 0.98
ema_end = 0.996
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 20
max_iters = 100
eval_interval = 50
