# For data/openstax (config/prepare_openstax.py): half an hour on one CPU core. Wide and shallow.
data_dir = 'data/openstax'
out_dir = 'out/openstax'
n_layer = 1
n_head = 8
n_embd = 512
predictor_layer = 2
batch_size = 8
block_size = 512
ema_start = 0.98
ema_end = 0.998
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 100
max_iters = 1500
eval_interval = 250
