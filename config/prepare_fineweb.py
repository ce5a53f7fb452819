# FineWeb-Edu's sample of 10 billion tokens, streamed: about 20 GB on disk. --max_docs=100000 for a first try.
dataset = 'HuggingFaceFW/fineweb-edu'
dataset_config = 'sample-10BT'
data_dir = 'data/fineweb-edu'
tokenizer = 'gpt2'
val_fraction = 0.0005
