#!/usr/bin/env bash
# Pretrain on the nodes of a hostfile over pdsh and ssh. Run it on the first node:
#   HOSTFILE=hosts bash launch/deepspeed.sh RUN --data DATA --out OUT [options of pretrain]
# All paths must exist on every node. Environment variables of the ranks (NCCL_SOCKET_IFNAME=eth0)
# are read from the file .deepspeed_env. To save and stop: touch OUT/STOP.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
hostfile=${HOSTFILE:?set it to a list of nodes, see launch/hostfile.example}
if [ ! -r "$hostfile" ] || [ -d "$hostfile" ]; then say "HOSTFILE $(printf %q "$hostfile"): not a readable file"; exit 2; fi
hosts="" ranks=0
while read -r host slots || [ -n "$host" ]; do # the last line may have no newline
    if ! [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ && $slots =~ ^slots=[1-9][0-9]{0,5}[[:space:]]*$ ]]; then # the name is passed to ssh
        say "$hostfile: found $(printf %q "$host $slots"), expected a line such as 'node1 slots=8'"
        exit 2
    fi
    slots=${slots//[[:space:]]/}
    case ,$hosts, in *,$host,*) say "$hostfile: the host $host occurs twice; give it one line"; exit 2 ;; esac
    hosts+=${hosts:+,}$host ranks=$((ranks + ${slots#slots=}))
done < <(tr '\r' '\n' < "$hostfile" | sed -e 's/#.*//' -e '/^[[:space:]]*$/d')
[ -n "$hosts" ] || { say "HOSTFILE '$hostfile' contains no nodes; expected lines such as 'node1 slots=8'"; exit 2; }
# The remote shells parse these words again.
for word in "$PWD" "$here" "$PYTHON" "${PYTHONPATH:-.}" "${MASTER_ADDR:-.}" "${STAGE:-.}" "$@"; do
    if ! [[ $word =~ ^[A-Za-z0-9_@+=:,./-]+$ ]]; then
        say "$(printf %q "$word") cannot be passed through ssh: expected only letters, digits and" \
            "_@+=:,./-; write such values to a RUN.json instead of --set"
        exit 2
    fi
done
variables=${DS_ENV_FILE:-.deepspeed_env}
while IFS= read -r -d '' line || [ -n "$line" ]; do # DeepSpeed exports these variables
    if ! [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*=[^\"\$\`\\%[:cntrl:]]*$ ]]; then
        say "$(printf %q "$line") (from the environment or $variables) cannot be passed through ssh:" \
            "expected NAME=value without \" \$ \` \\ %"
        exit 2
    fi
done < <(env -0 | grep -zE '^(PYTHON|MLFLOW|MV2|UCX|NCCL)'; cat -- "${HOME:-.}/$variables" "$variables" 2> /dev/null | tr '\n' '\0')
# ssh ends if a node does not answer for 3 x 10 s; otherwise pdsh waits without limit.
export PDSH_RCMD_TYPE=ssh
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
run pdsh -S -w "$hosts" "cd $PWD; PYTHON=$PYTHON PYTHONPATH=${PYTHONPATH:-} STAGE=${STAGE:-} bash $here/health.sh ${given[*]}"
code=0
run deepspeed --hostfile "$hostfile" --force_multi --no_ssh_check --master_addr="${MASTER_ADDR:-${hosts%%,*}}" \
    --master_port "$(free_port)" --no_local_rank --module electra_ds pretrain "${options[@]}" \
    --world-size "$ranks" || code=$?
judge "$code"
