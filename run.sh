#!/usr/bin/env bash
# Ratel from a fresh clone: sets up .venv/ once, then
#   bash run.sh                          runs the demo: trains a small model on real text, with its states on SSD
#   bash run.sh --model DIR --data FILE  passes the flags to `ratel train`
#   bash run.sh doctor                   any other command of ratel
#   bash run.sh test [PYTEST ARGUMENTS]  runs the tests
# Environment: PYTHON (interpreter to start from), RATEL_TORCH (PyTorch to install where the machine has none),
# CXX (C++ compiler).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=$ROOT/.venv
TORCH=${RATEL_TORCH:-torch==2.13.0}
TEMPLATES=trl==1.16.0 # for its chat templates, which the tests read from its files: on any Python, without what it needs to run
SITE_PACKAGES='import sysconfig; print(*dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")), sep="\n")'
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

require_compiler() {
    local name
    for name in ${CXX:-g++ clang++ c++}; do
        if command -v "$name" >/dev/null; then return; fi
        if [[ -n ${CXX:-} ]]; then die "the compiler named by CXX ($CXX) was not found"; fi
    done
    die "no C++ compiler was found. Install the package g++ (Debian, Ubuntu: sudo apt-get install g++; Fedora: sudo dnf install gcc-c++)"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        if is_recent "$PYTHON"; then command -v "$PYTHON"; return; fi
        die "PYTHON ($PYTHON) is not a Python of version 3.10 or later"
    fi
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if is_recent "$name"; then command -v "$name"; return; fi
    done
    die "Python 3.10 or later was not found; python3 is $(python3 --version 2>&1 || true). Install one, or name it: PYTHON=/path/to/python3 bash run.sh"
}

# Everything that decides what an installation contains; unchanged, and there is nothing to install.
fingerprint() {
    {
        printf '%s\n' "$1" "$ROOT" "$TORCH" "$TEMPLATES" "${CXX:-}"
        "$VENV/bin/python" -VV
        cd "$ROOT"
        find setup.py pyproject.toml {nvme_ds,op_ds}/{build.py,csrc} -type f | LC_ALL=C sort | xargs sha256sum
    } | sha256sum
}

is_installed() {
    [[ -x $VENV/bin/ratel && -f $VENV/.ratel-$1 ]] || return 1
    [[ -f $ROOT/nvme_ds/_lib/libnvme_ds.so && -f $ROOT/op_ds/_lib/libop_ds.so ]] || return 1
    [[ $(fingerprint "$1") == "$(<"$VENV/.ratel-$1")" ]]
}

make_venv() {
    local python=$1 options=()
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "this Python cannot make virtual environments. Install the package python3-venv (Debian, Ubuntu: sudo apt-get install python3-venv)"
    if "$python" -c 'import torch' 2>/dev/null; then
        say "using the PyTorch of $python"
        options=(--system-site-packages)
    fi
    say "making $VENV"
    "$python" -m venv --clear ${options[@]+"${options[@]}"} "$VENV"
    if [[ -n ${options[*]-} ]] && ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        # That Python is a virtual environment itself: ours has the system's packages, not those of its parent.
        "$python" -c "$SITE_PACKAGES" >"$("$VENV/bin/python" -c "$SITE_PACKAGES" | head -n 1)/ratel_parent.pth"
    fi
}

install() {
    local kind=$1 target=$ROOT python
    if is_installed "$kind"; then return; fi
    require_compiler
    python=$(find_python)
    make_venv "$python"
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        say "installing PyTorch ($TORCH)"
        "${PIP[@]}" install --quiet "$TORCH"
    fi
    if [[ $kind == test ]]; then target+='[test]'; fi
    say "installing Ratel and building its native code"
    "${PIP[@]}" install --quiet 'setuptools>=68' wheel
    if [[ $kind == test ]]; then "${PIP[@]}" install --quiet --no-deps --ignore-requires-python "$TEMPLATES"; fi
    "${PIP[@]}" install --quiet --no-build-isolation -e "$target"
    fingerprint "$kind" >"$VENV/.ratel-$kind"
}

demo() {
    cd "$ROOT"
    "$VENV/bin/ratel" train --model demo --ssd runs/demo/ssd --tier ssd --out runs/demo --overwrite \
        --steps 100 --batch-size 4 --seq-len 128 --lr 1e-3 --eval-every 25 --eval-sequences 16
    cat <<'END'

Next:
  head -n 1 runs/demo/metrics.jsonl                        what is recorded of a step
  .venv/bin/ratel doctor --ssd runs/demo/ssd               what this machine has, and how fast it is
  .venv/bin/ratel train --help                             every option
  bash run.sh --model DIR --data my.jsonl --ssd /mnt/a     your model, your text, your disk
END
}

case ${1:-} in
    '')
        install run
        demo
        ;;
    test)
        shift
        install test
        cd "$ROOT"
        # A process per core, up to four; the tests of one file share a process and what they have set up.
        exec "$VENV/bin/python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
        ;;
    -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        ;;
    -*)
        install run
        exec "$VENV/bin/ratel" train "$@"
        ;;
    *)
        install run
        exec "$VENV/bin/ratel" "$@"
        ;;
esac
