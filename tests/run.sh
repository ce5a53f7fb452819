#!/usr/bin/env bash
# Install what the project needs into .venv and run its checks. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt --requirement tests/requirements.txt
.venv/bin/python -m ruff check .
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile tests "$@"
