#!/usr/bin/env bash
# Check a node before its ranks start: bash launch/health.sh DATA [NAME=DATA ...]
# Prints one line with the name of the node for each problem, and then exits with 1. An undetected bad
# node would end the whole job later. With STAGE=FOLDER on the local disk of the node, DATA (a folder or
# a URL) is copied there first unless the copy is complete, and NAME=DATA to STAGE/NAME.
set -uo pipefail
# mpirun starts this script once per rank; the first rank of a node checks it.
[ "${MPI_LOCALRANKID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}" = 0 ] || exit 0
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ $# -eq 0 ]; then sed -n '2s/^# //p' "$0" >&2; exit 2; fi
node=${SLURMD_NODENAME:-$(hostname)} bad=0
complain() { echo "bad node $node: $*" | redacted >&2; bad=1; }
check_data() { # VALUE of --data: copy it with STAGE, and read it
    local name data file to
    name=$(name_of "$1")
    data=${1#"${name:+$name=}"}
    if [ -n "${STAGE:-}" ]; then
        to=$STAGE${name:+/$name}
        "${PYTHON:-python}" -m electra_ds stage "$data" --to "$to" ||
            complain "cannot copy $data to STAGE $to (see the message above)"
        data=$to
    fi
    case $data in *.json) file=$data ;; *) file=$data/manifest.json ;; esac
    case $data in
        *://*) timeout 60 "${PYTHON:-python}" -c 'import sys
from electra_ds.common.redaction import without_secrets_of
from electra_ds.common.urls import file_system
try: files, path = file_system(sys.argv[1]); files.open(path).read(1)
except Exception as error: sys.exit(without_secrets_of(sys.argv[1], f"{type(error).__name__}: {error}"))' "$file" ;;
        *) [ -r "$file" ] ;;
    esac || complain "cannot read $file; expected as --data a folder that prepare wrote, its URL," \
        "or a MIX.json of several folders, readable on all nodes"
}
for value in "$@"; do check_data "$value"; done
free=$(df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 { print $4 }')
[ "${free:-0}" -ge 65536 ] || complain "less than 64 MiB left in /dev/shm"
if command -v nvidia-smi > /dev/null; then
    timeout 60 nvidia-smi > /dev/null || complain "nvidia-smi fails; drain the node or reset its GPUs"
fi
timeout 300 "${PYTHON:-python}" -c 'import torch, electra_ds
for index in range(torch.cuda.device_count()): torch.ones(1, device=f"cuda:{index}").item()' > /dev/null ||
    complain "${PYTHON:-python} cannot import torch and electra_ds, or cannot use a GPU (see the message above)"
exit $bad
