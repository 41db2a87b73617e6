# The Python environment that run.sh and tests/run.sh use. Sourced, from the project's root:
#
#   find_python [quick]     set $python to the active virtual or conda environment if that has the dependencies of
#                           pyproject.toml, else to .venv, made from $REQUIREMENTS; 'quick': do not try the imports
#   run_child COMMAND...    run it, and pass stop signals on to it
#   fail TEXT               print it and exit

root=$(pwd -P)
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # scripts in other folders find the modules here
# Files are UTF-8 whatever the locale; a file name that is not UTF-8 can still be printed.
export PYTHONUTF8=1 PYTHONIOENCODING=:backslashreplace
# If an output is closed, the next file that is opened would take its number.
(: 3>&1) 2>/dev/null || exec >/dev/null
(: 3>&2) || exec 2>/dev/null
(: 3<&0) 2>/dev/null || exec </dev/null

fail() { echo "run.sh: $*" >&2; exit 1; }

case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) fail "Windows is not supported: use Linux, macOS or WSL (Windows Subsystem for Linux)." ;;
esac

# Without traps a signal would end the shell at once and leave its command running.
stopping=
run_child() {
    exec 3<&0 # a command in the background would read /dev/null: breakpoint() needs the terminal
    "$@" <&3 3<&- &
    child=$!
    trap 'stopping=1; trap "" TERM INT HUP USR1; echo "run.sh: stopping" >&2 || :; kill -TERM "$child" 2>/dev/null || :' TERM INT HUP USR1
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`, not the child
        status=0
        wait "$child" || status=$?
    done
    trap 'exit 75' TERM INT HUP USR1
    case $status in
        129 | 130 | 138 | 143) status=75 ;; # ended by a stop signal before there was anything to save
        0 | 1 | 2 | 3 | 75) ;;
        137)
            echo "run.sh: the launcher was killed (SIGKILL). Is there enough memory?" \
                "The same command resumes from the last checkpoint." >&2
            status=1
            ;;
        *) [ "$status" -lt 128 ] || status=1 ;;
    esac
    return "$status"
}

# lacks PYTHON [quick]: print the dependencies of pyproject.toml (and of the tests) that it lacks, or nothing.
lacks() {
    {
        "$1" - "${2:-}" ${REQUIREMENTS#requirements.txt} <<'PYTHON' 2>/dev/null || echo 'a working python'
import os, re, sys
if sys.version_info < (3, 11):
    print('python 3.11 or newer (it has %d.%d)' % sys.version_info[:2])
    sys.exit()
from importlib.metadata import PackageNotFoundError, version
def number(text):
    return [int(n) for n in re.findall(r'\d+', text)[:3]]
needed = open('pyproject.toml').read().split('dependencies = [')[1].split(']')[0]
needed = re.findall(r'"([\w-]+)>=([\d.]+)"', needed)
for file in sys.argv[2:]:
    needed += [(name, '0') for name in re.findall(r'^([\w-]+)==', open(file).read(), re.M)]
lacking = []
for name, least in needed:
    try:
        if number(version(name)) < number(least):
            lacking.append('%s %s or newer (it has %s)' % (name, least, version(name)))
    except PackageNotFoundError:
        lacking.append(name)
if not lacking and not sys.argv[1]:
    try:
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', '.')  # importing torch creates this folder
        import torchvision
    except Exception as error:
        lacking.append('a torch and torchvision that fit each other (%s)' % str(error).split('\n')[0])
print(', '.join(lacking))
PYTHON
    } | tail -n 1 # a site's start-up code may print something first
}

find_python() {
    active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -n "$active" ] && [ -x "$active/bin/python" ] && [ "$(cd "$active" && pwd -P)" != "$root/.venv" ]; then
        python=$active/bin/python
        missing=$(lacks "$python" "${1:-}")
        [ -n "$missing" ] || return 0
        echo "run.sh: the active environment $active lacks: $missing." \
            "It is not changed; .venv is used instead." >&2
    fi
    python=$root/.venv/bin/python
    if is_complete; then return; fi
    if [ -d .venv ] && [ ! -f .venv/.made-by-run-sh ]; then
        missing=$(lacks "$python")
        [ -z "$missing" ] || fail ".venv was not made by run.sh and lacks: $missing." \
            "Install that into it, or move it away and run again."
        return
    fi
    check_base_python
    lock
    is_complete || make_venv # it is complete if another first start made it meanwhile
    unlock
}

# Whether .venv is complete: each finished install leaves a stamp. $stale: the files that are not installed.
is_complete() {
    stale=
    for file in $REQUIREMENTS; do
        wanted "$file" | cmp -s - "$(stamp "$file")" || stale="$stale $file"
    done
    [ -z "$stale" ] && [ -x "$python" ] && [ ! -f .venv/.installing ]
}

stamp() { echo ".venv/.installed-$(echo "$1" | tr / -)"; }

wanted() { cat "$1" requirements.lock; } # what a stamp holds: the file, and the versions of what its packages need

check_base_python() {
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON is not installed." \
        "Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 sh run.sh"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' ||
        fail "$("$PYTHON" --version 2>&1) is not 3.11 to 3.14, for which the packages are pinned." \
            "Install one of these and name it: PYTHON=python3.12 sh run.sh"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module." \
        "Install it (Debian, Ubuntu: apt install python3-venv)," \
        "or activate your own environment with requirements.txt installed."
}

# One first start at a time: other first starts in this folder, on any node, wait.
lock() {
    me="process $$ on $(uname -n)" waits=0 announced=
    trap 'exit 75' TERM INT HUP USR1
    until mkdir .venv.lock 2>/dev/null; do
        if [ ! -d .venv.lock ]; then # released just now, or nothing can be written here
            waits=$((waits + 1))
            [ "$waits" -lt 3 ] || fail "$root cannot be written. Copy the project to a folder that you own."
            continue
        fi
        owner=$(cat .venv.lock/owner 2>/dev/null || echo 'another process')
        if is_stale "$owner" && mkdir ".venv.lock/taken from $owner" 2>/dev/null; then # only one process succeeds
            echo "run.sh: taking over .venv.lock, which $owner left behind"
            break
        fi
        [ "$announced" = "$owner" ] || echo "run.sh: waiting for $owner, which is making .venv;" \
            "if there is no such process, remove $root/.venv.lock"
        announced=$owner
        sleep 1
    done
    trap unlock EXIT
    echo "$me" >.venv.lock/owner
    while sleep 10 && kill -0 $$ && [ "$(cat .venv.lock/owner)" = "$me" ]; do touch .venv.lock; done >/dev/null 2>&1 &
    alive=$!
}

unlock() {
    kill "$alive" 2>/dev/null || :
    [ "$(cat .venv.lock/owner 2>/dev/null)" != "$me" ] || rm -rf .venv.lock
    trap - EXIT
}

# Whether the lock's owner, 'process PID on HOST', is dead. On another host: whether the lock was not touched lately.
is_stale() {
    pid=${1#process } pid=${pid%% *}
    case $1 in
        "process $pid on $(uname -n)") [ -d "/proc/$pid" ] || kill -0 "$pid" 2>/dev/null || return 0 ;;
    esac
    [ -n "$(find .venv.lock -prune -mmin +5 2>/dev/null)" ]
}

# Make .venv, or finish it.
make_venv() {
    if [ -f .venv/.installing ] || [ ! -x "$python" ]; then
        echo "run.sh: making a Python environment in .venv (nothing else on this machine is changed)"
        new=.venv.lock/new # moved as a whole, so .venv never exists without the file that marks it as ours
        { mkdir -p $new && touch $new/.made-by-run-sh $new/.installing; } || fail "$root is full or cannot be written."
        [ ! -d .venv ] || mv .venv .venv.lock/old
        mv $new .venv
        logged "$PYTHON" -m venv .venv || fail "making .venv failed: $(tail -n 1 .venv/install.log)"
        stale=$REQUIREMENTS
    fi
    touch .venv/.installing
    for file in $stale; do
        echo "run.sh: installing the packages of $file into .venv; torch with CUDA is about 5 GB, this can take minutes"
        logged "$python" -m pip install --disable-pip-version-check -r "$file" -c requirements.lock ||
            fail "pip could not install $file" "($(grep -m 1 '^ERROR' .venv/install.log || tail -n 1 .venv/install.log))." \
            "Is there a network, and room on the disk?" \
            "Run it again to continue; pip's full output is in .venv/install.log."
        wanted "$file" > "$(stamp "$file")"
    done
    rm .venv/.installing
}

# Run a command with its output in .venv/install.log; a stop signal ends it and this script.
logged() {
    code=0
    run_child "$@" >.venv/install.log 2>&1 || code=$?
    [ -z "$stopping" ] || exit 75
    return "$code"
}
