#!/usr/bin/env bash
# Make .venv, install what the tests need, run them. Arguments go to pytest: bash tests/run.sh -m slow
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
make_environment "[test]"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
exec python -m pytest "$@"
