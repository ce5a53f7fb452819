"""Text to concepts and back: SentenceEncoder.encode and ConceptDecoder.generate against what limits them.

    python tests/bench_encode.py --out_dir=out/demo
    python tests/bench_encode.py --out_dir=out/demo --minilm=<folder>     needs `pip install sentence-transformers`

encode: 20,000 sentences of mixed length, against the model's own forward pass on the same tokens, sorted and ready; against
itself without sorting by length; and against sentence-transformers per floating-point operation. generate: with a
key-value cache against reading the prefix again for each token. In turn, medians. Writes tests/results/encode.csv.
"""

import argparse
import csv
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from bench_prepare import in_turn  # noqa: E402

import model as lib  # noqa: E402
from prepare import Corpus  # noqa: E402


def forward_flops(layers, width, lengths):
    """Of a transformer with feed-forward layers of 4 widths, over sentences of these lengths."""
    return float((24 * layers * width ** 2 * lengths + 4 * layers * width * lengths ** 2).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out/demo')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--sentences', type=int, default=20_000)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--minilm', default='', help='folder of a sentence-transformers model to compare with')
    a = parser.parse_args()
    encoder, decoder = lib.load_encoder(a.out_dir, dtype=a.dtype), lib.load_decoder(a.out_dir, dtype=a.dtype)
    corpus = Corpus(a.data_dir or encoder.settings['data_dir'], 'train')
    texts, rng = [], np.random.default_rng(0)
    for d in rng.permutation(corpus.n_documents):
        texts += [corpus.tokenizer.decode(s) for s in corpus.document(d)]
        if len(texts) >= a.sentences:
            break
    texts = [texts[i] for i in rng.permutation(len(texts))[:a.sentences]]
    tokens = encoder.tokenizer.encode_batch(texts)
    lengths = np.array([len(t) for t in tokens])
    config = encoder.model.config
    rows = []

    def row(what, value, note=''):
        rows.append((what, value, note))
        print(f'{what:60} {value:>10} {note}')

    batches = list(encoder.batches(tokens))

    @torch.inference_mode()
    def forward():
        for _, *tensors in batches:
            encoder.concepts(*tensors)

    def unsorted():
        kept, lib.rows_by_length = lib.rows_by_length, as_they_come
        encoder.encode(texts)
        lib.rows_by_length = kept
    times = in_turn(a.repeats, {'encode': lambda: encoder.encode(texts), 'forward': forward, 'unsorted': unsorted})
    row('threads, dtype', f'{torch.get_num_threads()} {a.dtype}')
    row('encode, sentences/s', f"{len(texts) / times['encode']:.0f}", f'{len(texts)} sentences, {lengths.mean():.1f} tokens on average')
    row('of the forward pass alone', f"{times['forward'] / times['encode']:.2f}")
    row('speed without sorting by length', f"{times['encode'] / times['unsorted']:.2f}")
    if a.minilm:
        from sentence_transformers import SentenceTransformer
        other = SentenceTransformer(a.minilm, device='cpu')
        few = texts[:2000]
        n = np.array([len(x) for x in other.tokenizer(few)['input_ids']])
        inner = other[0].auto_model.config
        times = in_turn(a.repeats, {'ours': lambda: encoder.encode(few), 'theirs': lambda: other.encode(few, batch_size=64)})
        ours = forward_flops(config.n_layer, config.n_embd, lengths[:2000]) / times['ours']
        theirs = forward_flops(inner.num_hidden_layers, inner.hidden_size, n) / times['theirs']
        row('sentence-transformers, MiniLM, sentences/s', f"{len(few) / times['theirs']:.0f}", f'{n.mean():.1f} tokens on average')
        row('floating-point operations/s, of theirs', f'{ours / theirs:.2f}', f'{ours / 1e9:.1f} and {theirs / 1e9:.1f} GFLOP/s')
    z = torch.from_numpy(encoder.encode(texts[:64]))
    decoder.model.config.eos = -1  # nothing ends before 64 tokens
    for n in (1, 64):
        def generate(cache, n=n):
            with decoder.autocast:
                return decoder.model.generate(z[:n], 64, cache=cache)
        if a.dtype == 'float32':
            assert torch.equal(generate(True), generate(False)), 'the texts differ'
        times = in_turn(a.repeats, {'cached': lambda: generate(True), 'reread': lambda: generate(False)})
        row(f'generate, batch {n}, tokens/s', f"{n * 64 / times['cached']:.0f}")
        row(f'generate, batch {n}, of re-reading the prefix', f"{times['reread'] / times['cached']:.1f} x")
    with open(os.path.join(HERE, 'results', 'encode.csv'), 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'value', 'note'), *rows])


def as_they_come(sequences, batch_size):
    """rows_by_length without the sorting."""
    for start in range(0, len(sequences), batch_size):
        part = sequences[start:start + batch_size]
        lengths = np.array([len(s) for s in part])
        ids = np.zeros((len(part), max(lengths.max(), 1)), np.int64)
        for row, s in zip(ids, part):
            row[:len(s)] = s
        yield np.arange(start, start + len(part)), ids, lengths


if __name__ == '__main__':
    main()
