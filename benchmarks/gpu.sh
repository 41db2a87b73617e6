#!/bin/sh
# Measure a GPU: sh benchmarks/gpu.sh [--out gpu.json] [--seconds 520] [--parts ceilings unet ...]
# Uses the python of an active environment, of .venv, or python3. It needs torch, torchvision, numpy and tqdm.
set -eu
cd -- "$(dirname -- "$0")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
[ -z "${VIRTUAL_ENV:-}" ] || python=$VIRTUAL_ENV/bin/python
exec "$python" benchmarks/gpu.py "$@"
