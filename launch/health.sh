#!/usr/bin/env bash
# Is this node fit for a run? bash launch/health.sh DATA: one line that names the node for each thing that is wrong.
# With STAGE=FOLDER of the node's own, DATA (a folder or a URL) is copied there first, unless it is there.
# Run on each node before the ranks start: a bad node found later costs the whole job.
set -uo pipefail
[ "${MPI_LOCALRANKID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}" = 0 ] || exit 0 # mpirun starts one per rank; one per node looks
data=$1 node=${SLURMD_NODENAME:-$(hostname)} bad=0
complain() { echo "bad node $node: $*" >&2; bad=1; }
if [ -n "${STAGE:-}" ]; then
    "${PYTHON:-python}" -m electra_ds stage "$data" --to "$STAGE" || complain "cannot copy $data to STAGE $STAGE (above)"
    data=$STAGE
fi
case $data in *.json) file=$data ;; *) file=$data/manifest.json ;; esac
case $data in
    *://*) timeout 60 "${PYTHON:-python}" -c 'import fsspec, sys; fsspec.open(sys.argv[1]).open().read(1)' "$file" ;;
    *) [ -r "$file" ] ;;
esac || complain "does not see $file; --data is a folder that prepare wrote, or a MIX.json of several, shared by all nodes, or a folder's URL"
[ "$(df -Pk /dev/shm | awk 'NR == 2 { print $4 }')" -ge 65536 ] || complain "less than 64 MiB left in /dev/shm"
if command -v nvidia-smi > /dev/null; then
    timeout 60 nvidia-smi > /dev/null || complain "nvidia-smi fails; drain the node or reset its GPUs"
fi
timeout 300 "${PYTHON:-python}" -c 'import torch, electra_ds
for index in range(torch.cuda.device_count()): torch.ones(1, device=f"cuda:{index}").item()' > /dev/null ||
    complain "${PYTHON:-python} cannot import torch and electra_ds, or use a GPU (above)"
exit $bad
