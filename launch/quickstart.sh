#!/usr/bin/env bash
# Quickstart on this machine: train a vocabulary, write shards, pretrain on two ranks with one stop and
# one resume, evaluate on held-out rows, detect a replaced word.
#   bash launch/quickstart.sh                       on the docstrings of the installed Python packages
#   bash launch/quickstart.sh --input 'my/*.txt'    on your own text
# Options: --input PATTERN (default builtin:docs), --out FOLDER (default runs/quickstart), --steps N (default 4000)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" # run, redacted

input=builtin:docs out=runs/quickstart steps=4000
while [ $# -gt 0 ]; do
    case "$1" in
        --input) input=${2:?--input needs a value}; shift 2 ;;
        --out) out=${2:?--out needs a value}; shift 2 ;;
        --steps) steps=${2:?--steps needs a value}; shift 2 ;;
        *) echo "quickstart.sh: unknown option $1; expected --input, --out or --steps" >&2; exit 2 ;;
    esac
done
[[ $steps =~ ^[1-9][0-9]{0,8}$ ]] || { echo "quickstart.sh: --steps '$steps' is not a positive integer" >&2; exit 2; }
case "$input" in builtin:*|dataset:*|*://*|/*) ;; *) input="$PWD/$input" ;; esac
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac
make_environment ""
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1

say() { printf '\n== %s\n' "$*" | redacted; }
train() {
    local port
    port=$(python -c 'from electra_ds.common.processes import free_port; print(free_port())')
    run deepspeed --num_gpus 2 --master_port "$port" --no_local_rank --module electra_ds pretrain modern-tiny \
        --data "$out/data" --out "$out/run" --engine zero1 --set train.total_steps="$steps" "$@" || [ $? -eq 85 ]
}

say "1/6 train a vocabulary on $input"
[ -e "$out/tokenizer/options.json" ] ||
    run electra-ds train-tokenizer --input "$input" --vocab-size 8192 --out "$out/tokenizer"
say "2/6 write shards"
run electra-ds prepare --input "$input" --tokenizer "$out/tokenizer" --out "$out/data" --sequence-length 64 \
    --valid-fraction 0.02 --workers 2
if [ ! -e "$out/run/done" ]; then
    say "3/6 pretrain on 2 ranks with ZeRO-1, and stop after half of the steps"
    train --stop-at-step $((steps / 2))
    [ -e "$out/run/stopped.0" ] || { echo "quickstart.sh: pretraining failed before the stop" >&2; exit 1; }
    say "4/6 resume with the same command, without the stop"
    train
fi
[ -e "$out/run/done" ] || { echo "quickstart.sh: pretraining did not finish; the same command resumes it" >&2; exit 1; }
say "5/6 evaluate on the held-out text"
run electra-ds evaluate "$out/run" --data "$out/data"
say "6/6 detect a replaced word"
run electra-ds detect "$out/run" "Return the number of elements because the list." \
    --original "Return the number of elements in the list."

cat <<END

Next steps:
  curves        .venv/bin/tensorboard --logdir $out/run/tensorboard
  your text     bash launch/quickstart.sh --input 'my/*.txt' --out runs/mine
  a real model  .venv/bin/electra-ds check small --world-size 8, then prepare with --sequence-length 128 (README)
  GPU nodes     HOSTFILE=hosts bash launch/deepspeed.sh small --data D --out O --set train.micro_batch_size=8 (docs/clusters.md)
  GLUE          .venv/bin/electra-ds finetune $out/run tiny --tasks cola,rte --data GLUE_DIR --out runs/glue
  Hugging Face  .venv/bin/electra-ds export $out/run --out runs/hf
END
