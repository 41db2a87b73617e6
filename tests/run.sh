#!/bin/sh
# Lint and test:  sh tests/run.sh [pytest args]     e.g. sh tests/run.sh tests/test_processes.py -k rf
set -eu
CDPATH= cd -- "$(dirname -- "$0")/.."
SETUP_ONLY=1
REQUIREMENTS='requirements.txt tests/requirements.txt'
. ./run.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
[ "$#" -gt 0 ] || set -- -n logical --maxprocesses 4 # all of them: as many at once as there are cores
exec "$python" -m pytest "$@"
