# shellcheck shell=bash
# Sourced by the scripts that launch ranks, not run:
#   environment                     the interpreter, first on PATH, and what all ranks need
#   begin "$@"                      environment; read --out and --data from the options of pretrain and prepare
#   show COMMAND ..., run COMMAND   print a command as it can be typed; print and run it
#   judge CODE                      leave with 0 finished, 85 saved and stopped, else a failure
# Variables: RANKS  ranks a node (default: its GPUs, else 1);  PYTHON  the interpreter (default: .venv's, else PATH's)
#   STAGE  a folder of each node's own (/local/D): --data, which may be a URL then, is copied there and read there

finish="done" # the file in --out that is written last: manifest.json of prepare, which has no --data
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
show() { printf '+'; printf ' %q' "$@"; echo; }
run() { show "$@"; "$@"; }

environment() {
    [ ! -x "$here/../.venv/bin/python" ] || PYTHON=${PYTHON:-$here/../.venv/bin/python}
    PYTHON=$(command -v "${PYTHON:-python}") || { say "no python: activate an environment or set PYTHON"; exit 2; }
    PATH=$(dirname "$PYTHON"):$PATH
    export PATH PYTHON PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 # a crash prints stacks, lines come at once
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it over
}

begin() {
    local previous="" word
    out="" data=""
    for word in "$@"; do
        case $previous in --out) out=$word ;; --data) data=$word ;; esac
        case $word in --out=*) out=${word#*=} ;; --data=*) data=${word#*=} ;; esac
        previous=$word
    done
    if [ -z "$out" ] || { [ $finish = "done" ] && [ -z "$data" ]; }; then sed -n '2,3s/^# //p' "$0" >&2; exit 2; fi
    environment
    # Read by judge: an earlier attempt's files must not speak for this one.
    was_done=$([ ! -e "$out/$finish" ] || echo yes)
    stopped=$out/stopped.${SLURM_RESTART_COUNT:-0}
    rm -f -- "$stopped"
}

ranks_here() { count RANKS "${RANKS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"; }
count() { # NAME VALUE: what bash computes with it would also run, PATH[$(...)]
    [[ $2 =~ ^[1-9][0-9]*$ ]] || { say "$1='$2' is no number above 0"; exit 2; }
    echo "$2"
}
free_port() { "$PYTHON" -c 'from electra_ds.common.processes import free_port; print(free_port())'; }

# Launchers lie in both directions (a rank fails, mpirun says 0; all is saved, srun passes a peer's signal on), so
# rank 0's files decide. Only of a run that was finished before does the launcher know more.
judge() {
    case $out in *://*) [ "$1" -ne 0 ] || { say "$out is finished"; exit 0; } ;; esac # no file of it is seen from here
    if [ -e "$out/$finish" ] && { [ -z "$was_done" ] || [ "$1" -eq 0 ]; }; then say "$out is finished"; exit 0; fi
    if [ -e "$stopped" ]; then say "$out is saved and stopped; the same command resumes it"; exit 85; fi
    say "failed (the launcher left with $1)"
    tail -n +1 "$out"/error-rank-*.json >&2 2>/dev/null || true
    exit $(($1 > 0 ? $1 : 1))
}
