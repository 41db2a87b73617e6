#!/bin/sh
# Train:  sh run.sh [script.py] [--flags ...]      default main.py; `sh run.sh --help` lists the flags
#
#   sh run.sh generate.py [--flags ...]     searches for a script in your folder, in the project's, then in scripts/
#   NPROC=2 sh run.sh           processes on this machine (default: one per GPU, one on a machine without)
#   MAX_RESTARTS=3 sh run.sh    restarts a run that fails from its last checkpoint, up to three times
#   sh run.sh --check [flags]   dry run: everything once, in a temporary folder, and an estimate of the whole run
#   PYTHON=python3.12 sh run.sh the python that makes .venv, if no environment is active
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host sh run.sh     machine 0 of two; docs/cluster.md has more, and Slurm
#
# It uses the active virtual or conda environment if that has the packages of pyproject.toml, else .venv, which it makes
# from requirements.txt (launch/environment.sh). Then launch/start.py starts torchrun.
# Ctrl-C, SIGTERM or SIGUSR1: the run saves and ends.
# Exit code: 0 done, 2 a setting is wrong, 3 the loss is not finite, 75 stopped and saved (run it again), else 1.
set -eu
trap 'echo "run.sh: stopped" >&2 || :; exit 75' TERM INT HUP USR1
caller=$(pwd -P)
export RUN_CALLER="$caller" # your folder: paths in flags are relative to it (runtime/files.py); its code is trusted
CDPATH= cd -- "$(dirname -- "$0")"
if [ ! -f launch/environment.sh ]; then
    echo "run.sh: there is no launch/environment.sh in $PWD. Call run.sh of the project itself: sh /path/to/project/run.sh" >&2
    exit 1
fi
. ./launch/environment.sh

direct= # whether the script runs as one process, without torchrun
for flag; do
    case $flag in
        -h | --help) direct=quick ;;
        --check) export PYTHONDONTWRITEBYTECODE=1 ;; # a dry run writes nothing outside a temporary folder
    esac
done
find_python quick

script=main.py
case ${1:-} in
    *.py)
        script=$1 && shift
        case $script in
            /*) ;;
            *) [ "$caller" = "$root" ] || [ ! -f "$caller/$script" ] || script=$caller/$script ;;
        esac
        [ -f "$script" ] || [ ! -f "scripts/$script" ] || script=scripts/$script
        ;;
esac
where=$root
[ "$caller" = "$root" ] || where="$caller or $root"
[ -f "$script" ] || fail "there is no script $script in $where"
script=$(CDPATH= cd -- "$(dirname -- "$script")" && pwd -P)/$(basename -- "$script")
script=${script#"$root"/} # the same name for a script, wherever run.sh was called
case $script in
    scripts/compare.py | scripts/export.py | scripts/prepare.py | scripts/sweep.py) direct=${direct:-yes} ;;
esac
if [ "$direct" != quick ] && [ "$python" != "$root/.venv/bin/python" ]; then
    "$python" -m launch.start --flags "$script" "$@" || exit $? # wrong flags fail before imports, which take seconds
    find_python
fi
if [ -n "$direct" ]; then exec "$python" -m launch.start --direct "$script" "$@"; fi
export RUN_PARENT=$$
RUN_BEGAN=$(date +%s)
export RUN_BEGAN # --check prints how long the start takes
code=0
run_child "$python" -m launch.start "$script" "$@" || code=$?
exit "$code"
