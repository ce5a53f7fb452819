#!/usr/bin/env bash
# The whole chain on the embedded data set, in a virtual environment of its own: 14 minutes of CPU time, shared by 2 cores.
# Run again, it goes on where it stopped. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt
python=.venv/bin/python

$python prepare.py config/prepare_demo.py
$python train_encoder.py config/encoder_demo.py
$python train_decoder.py config/decoder_demo.py
$python evaluate.py --out_dir=out/demo
