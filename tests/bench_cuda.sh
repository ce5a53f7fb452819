#!/usr/bin/env bash
# Every benchmark that a GPU bears on, under 8 minutes on a large one: steps against their references at three sizes, what
# compilation and bfloat16 bring, where the time goes, growth with block_size, width and corpus. Writes
# tests/results/{train,variants,profile,growth_*}_cuda.csv.
#     bash tests/bench_cuda.sh               DEVICE=cpu rehearses it, small
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then
    shape="--batch_size=16 --block_size=4096" small=384,6,6 large=768,12,12 compile=--compile
else
    shape="--batch_size=2 --block_size=512" small=192,2,3 large=192,2,3 compile=
fi
python tests/bench_train.py --device="$device" --repeats=5 --steps=3 --warm_up=3 $shape $compile
python tests/bench_train.py --device="$device" --repeats=5 --steps=3 --warm_up=3 $shape --variants --size="$small"
python tests/bench_train.py --device="$device" --steps=3 --warm_up=3 $shape $compile --profile --size="$large"
python tests/bench_growth.py --device="$device" --repeats=5 --warm_up=3 $compile
