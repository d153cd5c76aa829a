# shellcheck shell=bash
# Sourced by the other scripts, not run: .venv in this checkout with what they need, put first on PATH.
# $1: extras, "" or "[test]".
make_environment() {
    local root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stamp="$root/.venv/.installed$1"
    cd "$root" || exit 1
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv || exit 1
    PATH="$root/.venv/bin:$PATH"
    export PATH
    if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
        echo "installing into $root/.venv (some minutes the first time) ..."
        # torch first, the version the tests were run with; an index with CPU builds saves gigabytes of CUDA.
        python -c 'import torch' 2>/dev/null || python -m pip install -q "torch==2.13.0" || exit 1
        python -m pip install -q -e ".$1" || exit 1
        touch "$stamp"
    fi
}
