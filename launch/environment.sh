# shellcheck shell=bash
# make_environment EXTRAS: create .venv in this checkout, install the package, put it first on PATH.
# EXTRAS is "" or "[test]". This file is sourced, not run.
make_environment() {
    local root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stamp="$root/.venv/.installed$1"
    cd "$root" || exit 1
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv || exit 1
    PATH="$root/.venv/bin:$PATH"
    export PATH
    if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
        echo "installing into $root/.venv (takes minutes the first time) ..."
        # torch is installed first, in the version of the tests. With a package index of CPU builds, pip
        # downloads no CUDA libraries.
        python -c 'import torch' 2>/dev/null || python -m pip install -q "torch==2.13.0" || exit 1
        python -m pip install -q -e ".$1" || exit 1
        touch "$stamp"
    fi
}
