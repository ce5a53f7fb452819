#!/usr/bin/env bash
# Every benchmark that a GPU bears on, in 8 minutes on a large one, from data that prepare.py wrote before: training
# steps against a language model of the same width, where their time goes, and generation. Writes
# tests/results/{train,phases}_cuda.csv, or to the folder in $OUT.
#     bash tests/bench_cuda.sh data/openstax            DEVICE=cpu rehearses it, small; PYTHON names an interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?the data_dir}; device=${DEVICE:-cuda}; out=${OUT:-tests/results}; python=${PYTHON:-python3}
if [ "$device" = cuda ]; then
    shape="--batch_size=16 --block_size=4096 --repeats=10 --warm_up=4" size="384,6,6;512,6,8;768,12,12"
else
    shape="--batch_size=2 --block_size=256 --repeats=2 --warm_up=1" size="32,1,2"
fi
$python tests/bench_train.py --device="$device" --data_dir="$data" --size="$size" --results="$out" $shape
