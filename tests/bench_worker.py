"""bench_train.py's process in another checkout: <checkout> <out_dir> <texts as json> <device>.

Answers each line of standard input with how many sentences encode and tokens generate did a second.
"""

import json
import sys
import time

root, out_dir, path, device = sys.argv[1:]
sys.path.insert(0, root)
import model as lib  # noqa: E402

encoder, decoder = lib.load_encoder(out_dir, device=device), lib.load_decoder(out_dir, device=device)
decoder.model.config.eos = -1  # nothing ends before 64 tokens
texts = json.load(open(path))
z = encoder.encode(texts[:64])
for _ in sys.stdin:
    began = time.perf_counter()
    encoder.encode(texts)
    between = time.perf_counter()
    decoder.generate(z, max_tokens=64)
    print(len(texts) / (between - began), 64 * len(z) / (time.perf_counter() - between), flush=True)
