#!/usr/bin/env bash
# Pretrain under mpirun: RANKS=16 bash launch/mpi.sh RUN --data DATA --out OUT [options of pretrain]
# RANKS is the number of ranks on all nodes. MPIRUN contains options of mpirun, such as
# MPIRUN="-hosts node1,node2 -ppn 8 -iface eth0" (MPICH) or MPIRUN="--hostfile hosts --map-by ppr:8:node"
# (Open MPI). mpi4py must be built for the same MPI.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
read -ra words <<< "${MPIRUN:-}"
ranks=$(ranks_here) code=0
run mpirun ${words[@]+"${words[@]}"} -n "$ranks" bash "$here/health.sh" "${given[@]}"
run mpirun ${words[@]+"${words[@]}"} -n "$ranks" "$PYTHON" -m electra_ds \
    pretrain "${options[@]}" --world-size "$ranks" || code=$?
judge "$code"
