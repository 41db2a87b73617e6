#!/bin/sh
# Lint and test:  sh tests/run.sh [pytest args]     e.g. sh tests/run.sh tests/test_processes.py -k rf
#                 sh tests/run.sh -m slow           what a run survives: whole runs, killed and stopped in every way (a quarter of an hour)
set -eu
CDPATH= cd -- "$(dirname -- "$0")/.."
SETUP_ONLY=1
REQUIREMENTS='requirements.txt tests/requirements.txt'
. ./run.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
if [ "$#" -eq 0 ]; then # all of them: as many at once as there are cores, then those that launch whole runs, which want the machine for themselves
    "$python" -m pytest -n logical --maxprocesses 4 --ignore=tests/test_run.py
    set -- tests/test_run.py
fi
exec "$python" -m pytest "$@"
