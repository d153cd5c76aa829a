#!/usr/bin/env bash
# Pretrain on this machine, one rank per GPU: bash launch/local.sh RUN --data DATA --out OUT [options of pretrain]
# RANKS=n sets another number. The same command resumes. Exit codes: 0 finished, 85 saved and stopped, else a failure.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
[ -z "${STAGE:-}" ] || run bash "$here/health.sh" "${given[@]}"
ranks=$(ranks_here) code=0
run deepspeed --num_gpus "$ranks" --master_port "$(free_port)" --no_local_rank --module electra_ds \
    pretrain "${options[@]}" --world-size "$ranks" || code=$?
judge "$code"
