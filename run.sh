#!/bin/sh
# Train:  sh run.sh [script.py] [--flags ...]      default main.py; `sh run.sh --help` lists the flags
#
#   NPROC=2 sh run.sh           processes on this machine (default: one per GPU, one on a machine without)
#   MAX_RESTARTS=3 sh run.sh    a run that fails starts again, from its last checkpoint, up to three times
#   sh run.sh --check [flags]   will it run tonight? Tries everything in a temporary folder, and says what a run will take
#   PYTHON=python3.12 sh run.sh which python makes .venv, where no environment is active
#   TORCHRUN_ARGS='--nnodes 2 --rdzv-endpoint host:29500 --rdzv-backend c10d' sh run.sh     on each of two machines
#
# It uses the active virtual or conda environment if that has what is needed, else .venv, which it makes from
# requirements.txt. It always launches torchrun (by launch.py). Ctrl-C, SIGTERM or SIGUSR1: the run saves and ends.
# Exit code: 0 done, 2 a setting is wrong, 3 the loss is not finite, 75 stopped and saved (run it again to go on), else 1.
set -eu

fail() { echo "run.sh: $*" >&2; exit 1; }

# Run a command and pass signals on: a shell would die at once and leave it running.
stopping=
run_child() {
    "$@" &
    child=$!
    trap 'stopping=1; trap "" TERM INT HUP USR1; kill -TERM "$child" 2>/dev/null || :' TERM INT HUP USR1
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`, not the child
        status=0
        wait "$child" || status=$?
    done
    trap 'exit 75' TERM INT HUP USR1
    case $status in
        129 | 130 | 138 | 143) status=75 ;; # a stop signal, before there was anything to save
        0 | 1 | 2 | 3 | 75) ;;
        137) echo "run.sh: its launcher was killed (SIGKILL); is there enough memory? The same command goes on from the last checkpoint." >&2 && status=1 ;;
        *) [ "$status" -lt 128 ] || status=1 ;;
    esac
    return "$status"
}

# What an environment lacks of pyproject.toml's dependencies (and the tests'), in words; nothing if it has all. $2: try the imports too.
lacks() {
    "$1" - "${2:-}" ${REQUIREMENTS#requirements.txt} <<'PYTHON' 2>/dev/null || echo 'a working python'
import re, sys
if sys.version_info < (3, 10):
    print('python 3.10 or newer (it has %d.%d)' % sys.version_info[:2])
    sys.exit()
from importlib.metadata import PackageNotFoundError, version
def number(text):
    return [int(n) for n in re.findall(r'\d+', text)[:3]]
needed = re.findall(r'"([\w-]+)>=([\d.]+)"', open('pyproject.toml').read().split('dependencies = [')[1].split(']')[0])
for file in sys.argv[2:]:
    needed += [(name, '0') for name in re.findall(r'^([\w-]+)==', open(file).read(), re.M)]
lacking = []
for name, least in needed:
    try:
        if number(version(name)) < number(least):
            lacking.append('%s %s or newer (it has %s)' % (name, least, version(name)))
    except PackageNotFoundError:
        lacking.append(name)
if not lacking and sys.argv[1]:
    try:
        import torchvision
    except Exception as error:
        lacking.append('a torch and torchvision that fit each other (%s)' % str(error).split('\n')[0])
print(', '.join(lacking))
PYTHON
}

# Make or finish .venv. A stamp beside each install says that it came to its end; without it nothing is trusted.
own_environment() {
    stale=
    for file in $REQUIREMENTS; do
        cmp -s "$file" ".venv/.installed-$(echo "$file" | tr / -)" || stale="$stale $file"
    done
    if [ -z "$stale" ] && [ -x .venv/bin/python ] && [ ! -f .venv/.installing ]; then return; fi
    if [ -d .venv ] && [ ! -f .venv/.made-by-run-sh ]; then
        missing=$(lacks .venv/bin/python imports)
        if [ -z "$missing" ]; then return; fi
        fail ".venv was not made by run.sh and lacks: $missing. Install that into it, or move it away and run again."
    fi
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON is not installed. Install Python 3.10 or newer, or name one: PYTHON=/path/to/python3 sh run.sh"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || fail "$("$PYTHON" --version 2>&1) is not 3.10 to 3.13, for which the packages are pinned. Install one of these and name it: PYTHON=python3.12 sh run.sh"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module. Install it (Debian, Ubuntu: apt install python3-venv), or activate an environment of yours that has requirements.txt installed."
    if [ -f .venv/.installing ] || [ ! -x .venv/bin/python ]; then
        echo "run.sh: making a Python environment in .venv (nothing else on this machine is changed)"
        { rm -rf .venv && mkdir .venv && touch .venv/.made-by-run-sh .venv/.installing; } 2>/dev/null || fail "$root cannot be written. Copy the project to a folder of yours."
        code=0
        run_child "$PYTHON" -m venv .venv >.venv/install.log 2>&1 || code=$?
        [ -z "$stopping" ] || exit 75
        [ "$code" = 0 ] || fail "making .venv failed: $(tail -n 1 .venv/install.log)"
        stale=$REQUIREMENTS
    fi
    touch .venv/.installing
    for file in $stale; do
        echo "run.sh: installing the packages of $file into .venv; torch with CUDA is about 5 GB, this can take minutes"
        code=0
        run_child .venv/bin/python -m pip install --disable-pip-version-check -r "$file" >.venv/install.log 2>&1 || code=$?
        [ -z "$stopping" ] || exit 75
        [ "$code" = 0 ] || fail "pip could not install $file ($(grep -m 1 '^ERROR' .venv/install.log || tail -n 1 .venv/install.log)). Is there a network, and room on the disk? Run it again to go on; all that pip said is in .venv/install.log."
        cp "$file" ".venv/.installed-$(echo "$file" | tr / -)"
    done
    rm .venv/.installing
}

if [ -z "${SETUP_ONLY:-}" ]; then
    trap 'exit 75' TERM INT HUP USR1
    CDPATH= cd -- "$(dirname -- "$0")"
fi
root=$(pwd -P)
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
help=
for flag; do
    case $flag in
        -h | --help) help=1 ;;
        --check) export PYTHONDONTWRITEBYTECODE=1 ;; # it writes nothing outside a temporary folder
    esac
done

python=
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$active" ] && [ -x "$active/bin/python" ] && [ "$(cd "$active" && pwd -P)" != "$root/.venv" ]; then
    missing=$(lacks "$active/bin/python" "$([ -n "$help" ] || echo imports)")
    if [ -z "$missing" ]; then
        python=$active/bin/python
    else
        echo "run.sh: the active environment $active lacks: $missing. It is left as it is, and .venv is used instead." >&2
    fi
fi
if [ -z "$python" ]; then
    own_environment
    python=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # scripts in subfolders find the modules here
if [ -n "${SETUP_ONLY:-}" ]; then return 0; fi

script=main.py
case ${1:-} in *.py) script=$1 && shift ;; esac
[ -f "$script" ] || fail "there is no script $script in $root"
if [ -n "$help" ]; then exec "$python" "$script" "$@"; fi
export RUN_PARENT=$$
code=0
run_child "$python" -m runtime.launch "$script" "$@" || code=$?
exit "$code"
