# For data/openstax (config/prepare_openstax.py): about an hour on 2 CPU cores.
data_dir = 'data/openstax'
out_dir = 'out/openstax'
n_layer = 2
n_head = 4
n_embd = 256
predictor_layer = 2
batch_size = 8
block_size = 512
ema_start = 0.98
ema_end = 0.998
learning_rate = 4e-4
min_lr = 1e-6
warmup_iters = 200
max_iters = 2400
eval_interval = 400
compile = False
