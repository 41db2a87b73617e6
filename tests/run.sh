#!/bin/sh
# Lint, types and tests:  sh tests/run.sh [pytest args]     e.g. sh tests/run.sh tests/test_processes.py -k rf
#                         sh tests/run.sh --cov             with coverage of lines
#                         sh tests/run.sh -m slow -n 2      the slow tests, two at a time: whole runs, killed and
#                                                           stopped in every way, and clusters
set -eu
CDPATH= cd -- "$(dirname -- "$0")/.."
REQUIREMENTS='requirements.txt tests/requirements.txt'
. ./launch/environment.sh
find_python
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m basedpyright --pythonpath "$python"
if [ "$#" -eq 0 ]; then # all: one per core at a time, then the tests that need the whole machine
    "$python" -m pytest -n logical --maxprocesses 4 --ignore=tests/launch/test_launcher.py
    set -- tests/launch/test_launcher.py
fi
exec "$python" -m pytest "$@"
