#!/usr/bin/env bash
# Fine-tune on GLUE on this machine: bash launch/glue.sh MODEL CONFIG GLUE_DIR OUT [options of finetune]
# One rank per GPU (another number: RANKS=n). The seeds are divided among the ranks. The same OUT resumes.
# Default: nine tasks with 5 seeds each. To change it: --tasks rte,cola --seeds 3
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 4 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
model=$1 config=$2 data=$3 out=$4
shift 4
environment
ranks=$(ranks_here)
run torchrun --standalone --nproc_per_node "$ranks" -m electra_ds finetune "$model" "$config" \
    --data "$data" --out "$out" --tasks glue --seeds 5 --spread "$@"
# There is no report if the run was stopped before the first seed ended.
show_text "$out/report.md"
