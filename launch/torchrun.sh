#!/usr/bin/env bash
# Pretrain under torchrun, which starts all ranks again from the last checkpoint when one dies:
#   bash launch/torchrun.sh RUN --data DATA --out OUT [options of pretrain]
# On several nodes run it on each of them, with NODES=2 RENDEZVOUS=node1:29400 the same on all.
# RANKS: per node. RESTARTS: at most so many (default 3).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
bash "$here/health.sh" "$data"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else torch 2.13 cannot meet again after a worker's death
nodes=$(count NODES "${NODES:-1}")
ranks=$(ranks_here) code=0
run torchrun --nnodes "$nodes" --nproc_per_node "$ranks" --max_restarts "${RESTARTS:-3}" --rdzv_backend c10d \
    --rdzv_endpoint "${RENDEZVOUS:-localhost:0}" --rdzv_id "${JOB:-electra}" -m electra_ds \
    pretrain "$@" ${STAGE:+--data "$STAGE"} --world-size $((nodes * ranks)) || code=$?
judge "$code"
