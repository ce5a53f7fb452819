# A pretrained encoder as it is, and a predictor on its concepts, which are computed once: one CPU core.
data_dir = 'data/minilm'
out_dir = 'out/minilm'
init_from = 'hf:sentence-transformers/all-MiniLM-L6-v2'
freeze_encoder = True
pooling = 'mean'
predictor_layer = 2
batch_size = 64
block_size = 512
max_sentences = 24
learning_rate = 5e-4
predictor_lr_scale = 1.0
min_lr = 1e-5
warmup_iters = 50
max_iters = 600
eval_interval = 100
