#!/usr/bin/env bash
# Prepare data under mpirun: RANKS=65 bash launch/prepare.sh --input TEXT --tokenizer T --out D [options of prepare]
# The same command resumes after a kill, with any RANKS.
# RANKS is the number of ranks on all nodes, of which one distributes the work (default: number of cores
# here, plus 1). MPIRUN contains options of mpirun, as for mpi.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finish=manifest.json
begin "$@"
read -ra words <<< "${MPIRUN:-}"
ranks=$(count RANKS "${RANKS:-$(($(nproc) + 1))}") code=0
run mpirun ${words[@]+"${words[@]}"} -n "$ranks" "$PYTHON" -m electra_ds prepare "$@" || code=$?
judge "$code"
