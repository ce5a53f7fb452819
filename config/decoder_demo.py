# For out/demo (config/encoder_demo.py): minutes on 2 CPU cores.
out_dir = 'out/demo'
n_layer = 1
n_head = 6
n_embd = 384
batch_size = 8
block_size = 512
learning_rate = 2e-3
warmup_iters = 40
max_iters = 400
eval_interval = 100
eval_iters = 8
