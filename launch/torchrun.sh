#!/usr/bin/env bash
# Pretrain under torchrun. It restarts all ranks from the last checkpoint after a rank dies.
#   bash launch/torchrun.sh RUN --data DATA --out OUT [options of pretrain]
# On several nodes, run it on each node with the same NODES=2 RENDEZVOUS=node1:29400.
# RANKS is the number of ranks per node. RESTARTS is the largest number of restarts (default 3).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
bash "$here/health.sh" "${given[@]}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise a second rendezvous fails in torch 2.13
nodes=$(count NODES "${NODES:-1}")
restarts=$(count RESTARTS "${RESTARTS:-3}" 0)
ranks=$(ranks_here) code=0
run torchrun --nnodes "$nodes" --nproc_per_node "$ranks" --max_restarts "$restarts" --rdzv_backend c10d \
    --rdzv_endpoint "${RENDEZVOUS:-localhost:0}" --rdzv_id "${JOB:-electra}" -m electra_ds \
    pretrain "${options[@]}" --world-size $((nodes * ranks)) || code=$?
judge "$code"
