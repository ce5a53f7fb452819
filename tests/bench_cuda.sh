#!/usr/bin/env bash
# Every benchmark that a GPU bears on, under 8 minutes on a large one: steps against their references at three sizes, what
# compilation and bfloat16 bring, growth with block_size, width and corpus. Writes tests/results/{train,variants,growth}_cuda.csv.
#     bash tests/bench_cuda.sh               DEVICE=cpu rehearses it, at two sizes
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
more=$([ "$device" = cuda ] && echo "--compile --batch_size=16 --block_size=4096" || echo "--batch_size=2 --block_size=512")
python tests/bench_train.py --device="$device" --repeats=5 --steps=3 --warm_up=3 $more
python tests/bench_train.py --device="$device" --repeats=5 --steps=3 --warm_up=3 --variants --size=384,6,6 ${more/--compile/}
python tests/bench_growth.py --device="$device" --repeats=5 --warm_up=3 ${more%%--batch*}
