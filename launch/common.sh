# shellcheck shell=bash
# Functions of the scripts that launch ranks. This file is sourced, not run.
#   environment                     put the interpreter first on PATH; export variables for all ranks
#   begin "$@"                      call environment; set from the options of the verb: out, given (an array with the
#                                   values of --data), options (all of them, with --data below STAGE)
#   show COMMAND ..., run COMMAND   print a command with quotes; print and run it
#   judge CODE                      exit with 0 (finished), 85 (saved and stopped) or a failure
# Variables:
#   RANKS   ranks per node (mpi.sh, prepare.sh: on all nodes). Default: number of GPUs here, at least 1;
#           prepare.sh: number of cores here, plus 1
#   PYTHON  interpreter (default: that of .venv, else the first on PATH)
#   STAGE   folder on the local disk of each node (/local/D): --data, also a URL, is copied there, and
#           the ranks read the copy; --data NAME=D is copied to STAGE/NAME

finish="done" # last file written to --out. prepare.sh, which has no --data, sets it to manifest.json
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { printf '%s: %s\n' "$(basename "$0")" "$*" | redacted >&2; }
show() { { printf '+'; printf ' %q' "$@"; echo; } | redacted; }
redacted() { # hide user names, passwords and secret query values of URLs
    # At least what electra_ds.common.redaction.redacted hides: a password may contain "/", "?", "#" and "@",
    # so all text before the last "@" of a word is hidden. printf %q writes a blank in it as "\ ".
    sed -E -e 's#(:/+)([^[:space:]]|\\[[:space:]])*@#\1***@#g' -e \
        's/([?&;#][A-Za-z0-9_.%-]*(token|key|secret|sig|pass|pwd|credential|auth|session|jwt|code)[A-Za-z0-9_.%-]*=)[^&[:space:]\\]*/\1***/Ig'
}
run() { show "$@"; "$@"; }

environment() {
    [ ! -x "$here/../.venv/bin/python" ] || PYTHON=${PYTHON:-$here/../.venv/bin/python}
    PYTHON=$(command -v "${PYTHON:-python}") || { say "no python: activate an environment or set PYTHON"; exit 2; }
    PATH=$(dirname "$PYTHON"):$PATH
    export PATH PYTHON PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 # stacks after a crash, no buffered lines
    # Without PYTHONSAFEPATH, `python -m` imports a file such as json.py from the current folder.
    # PYTHONPATH makes the scripts run the package of their own checkout, installed or not.
    export PYTHONSAFEPATH=1 PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}"
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun ignores that of sbatch
}

begin() {
    local previous="" word
    out="" given=() options=()
    for word in "$@"; do
        case $previous in
            --out) out=$word ;;
            --data) given+=("$word") && stage_value "$word" && word=$staged ;;
        esac
        case $word in
            --out=*) out=${word#*=} ;;
            --data=*) given+=("${word#*=}") && stage_value "${word#*=}" && word=--data=$staged ;;
        esac
        previous=$word options+=("$word")
    done
    if [ -z "$out" ] || { [ $finish = "done" ] && [ ${#given[@]} -eq 0 ]; }; then sed -n '2,3s/^# //p' "$0" >&2; exit 2; fi
    environment
    # For judge: files of an earlier attempt must not count as results of this one.
    was_done=$([ ! -e "$out/$finish" ] || echo yes)
    stopped=$out/stopped.$(count SLURM_RESTART_COUNT "${SLURM_RESTART_COUNT:-0}" 0) || exit
    rm -f -- "$stopped"
}

name_of() { # VALUE of --data: print the NAME of NAME=D, nothing for another value
    ! [[ $1 =~ ^([a-z0-9-]+)= ]] || [ -e "$1" ] || echo "${BASH_REMATCH[1]}"
}
stage_value() { # VALUE of --data: set `staged` to the value for the ranks, with final newlines
    local name
    name=$(name_of "$1")
    staged=$1
    [ -z "${STAGE:-}" ] || staged=${name:+$name=}$STAGE${name:+/$name}
}
ranks_here() { count RANKS "${RANKS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"; }
count() { # NAME VALUE [LEAST]: print VALUE if it is an integer of at least LEAST (default 1), else exit.
    # Unchecked values are not used in arithmetic, because bash would execute the command in PATH[$(...)].
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || [ "$2" -lt "${3:-1}" ]; then
        say "$1=$(printf %q "$2"): expected an integer from ${3:-1} to 999999999"
        exit 2
    fi
    echo "$2"
}
free_port() { "$PYTHON" -c 'from electra_ds.common.processes import free_port; print(free_port())'; }

# Print the error files. The ranks write them in ASCII, so other bytes, which could control a terminal,
# are replaced. A FIFO, from which a read does not return, and a link are left out.
show_errors() {
    local file
    for file in "$out"/error-rank-*.json; do
        [ ! -f "$file" ] || [ -L "$file" ] || { echo "$file:"; head -c 1000000 -- "$file"; echo; }
    done | LC_ALL=C tr -c '\11\12\40-\176' '[?*]'
}

show_text() { # FILE: print a file of UTF-8 without control characters (those of one byte and of two)
    if [ -f "$1" ] && [ ! -L "$1" ]; then
        head -c 1000000 -- "$1" | LC_ALL=C tr '\1-\10\13-\37\177' '[?*]' | LC_ALL=C sed 's/\xc2[\x80-\x9f]/?/g' | redacted
    fi
}

# The exit code of a launcher is not reliable: mpirun may return 0 although a rank failed, and srun may
# return a signal although the run is saved. Therefore the exit code is derived from the files of rank 0.
# The exit code of the launcher is used if --out was finished before this attempt, or is a URL.
judge() {
    # The shell cannot read files at a URL.
    case $out in *://*) [ "$1" -ne 0 ] || { say "$out is finished"; exit 0; } ;; esac
    if [ -e "$out/$finish" ] && { [ -z "$was_done" ] || [ "$1" -eq 0 ]; }; then say "$out is finished"; exit 0; fi
    if [ -e "$stopped" ]; then say "$out is saved and stopped; the same command resumes it"; exit 85; fi
    say "failed (exit code $1 of the launcher)"
    show_errors | redacted >&2 || true
    exit $(($1 > 0 ? $1 : 1))
}
