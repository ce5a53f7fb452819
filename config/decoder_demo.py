# For out/demo (config/encoder_demo.py): minutes on 2 CPU cores.
out_dir = 'out/demo'
n_layer = 3
n_head = 3
n_embd = 192
batch_size = 8
block_size = 512
learning_rate = 2e-3
warmup_iters = 50
max_iters = 500
eval_interval = 125
eval_iters = 8
compile = False
