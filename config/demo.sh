#!/usr/bin/env bash
# The whole chain on the embedded text, in a virtual environment of its own. Run again, it goes on where it stopped.
# PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
echo 'demo 1/5: installing requirements.txt into .venv'
.venv/bin/python -m pip install --quiet --requirement requirements.txt
python=.venv/bin/python
echo 'demo 2/5: 4 MB of text to tokenized sentences, seconds'
$python prepare.py config/prepare_demo.py
echo 'demo 3/5: encoder and predictor, about a minute'
$python train_encoder.py config/encoder_demo.py
echo 'demo 4/5: decoder, about three minutes'
$python train_decoder.py config/decoder_demo.py
echo 'demo 5/5: evaluation, about a minute'
$python evaluate.py --out_dir=out/demo
