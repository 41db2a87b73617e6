#!/bin/sh
# Measure a GPU, then run the GPU tests: sh benchmarks/gpu.sh [--out gpu.json] [--seconds 520] [--parts ceilings ...]
# Uses the Python of the active environment, else of .venv, else python3. It needs requirements.txt and
# tests/requirements.txt.
set -eu
cd -- "$(dirname -- "$0")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
[ -z "${VIRTUAL_ENV:-}" ] || python=$VIRTUAL_ENV/bin/python
"$python" benchmarks/gpu.py "$@"
exec "$python" -m pytest -v -n 4 --tb short tests/test_gpu.py
