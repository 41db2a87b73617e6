#!/bin/sh
# Measure a GPU, then test on it: sh benchmarks/gpu.sh [--out gpu.json] [--seconds 520] [--parts ceilings unet ...]
# Uses the python of an active environment, of .venv, or python3, with requirements.txt and tests/requirements.txt.
set -eu
cd -- "$(dirname -- "$0")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
[ -z "${VIRTUAL_ENV:-}" ] || python=$VIRTUAL_ENV/bin/python
"$python" benchmarks/gpu.py "$@"
exec "$python" -m pytest -v -n 4 --tb short tests/test_gpu.py
