# For out/openstax (config/encoder_openstax.py): 45 minutes on one CPU core.
out_dir = 'out/openstax'
n_layer = 1
n_head = 8
n_embd = 512
batch_size = 8
block_size = 512
learning_rate = 2e-3
warmup_iters = 50
max_iters = 1500
eval_interval = 250
eval_iters = 8
