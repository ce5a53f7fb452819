# One's own prose: python prepare.py config/prepare_openstax.py --dataset=path/to/openstax.jsonl.gz
data_dir = 'data/openstax'
tokenizer = 'bpe:8192'
val_fraction = 0.05
