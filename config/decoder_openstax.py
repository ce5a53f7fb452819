# For out/openstax (config/encoder_openstax.py): about 13 minutes on one CPU core, too short for good text.
out_dir = 'out/openstax'
n_layer = 3
n_head = 4
n_embd = 256
batch_size = 8
block_size = 512
learning_rate = 2e-3
warmup_iters = 50
max_iters = 400
eval_interval = 100
eval_iters = 8
compile = False
