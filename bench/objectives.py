"""Is a generator worth its cost? `electra` and `mlm` (BERT) trained with equal FLOPs, then fine-tuned.

python bench/objectives.py --data D --out O [--glue GLUE] [--steps N] [--run tiny] [--set section.field=value ...]

--steps are those of electra; mlm takes as many more as its step is cheaper. Everything else is equal: rows, order,
masked positions, rates, warmup. Run again it goes on where it was. Without --glue it pretrains only. O/objectives.json,
O/objectives.md: median of the seeds on the development sets.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from cost import step_flops

from electra_ds.common.files import write_bytes, write_json
from electra_ds.config.loading import load_run
from electra_ds.data.shard_format import read_manifest
from electra_ds.training.metrics_file import read_metrics

KINDS = ("electra", "mlm")
TASKS = ("stsb", "cola")


def call(*arguments: object) -> None:
    """One verb of the command line, with its output; ends this script where it fails."""
    code = subprocess.run([sys.executable, "-m", "electra_ds", *map(str, arguments)]).returncode
    if code:
        sys.exit(f"electra-ds {arguments[0]} left with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", default="tiny")
    parser.add_argument("--engine", default="zero0")
    parser.add_argument("--finetune", default="tiny", help="config of the verb finetune")
    parser.add_argument("--finetune-set", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()

    vocab_size = read_manifest(options.data).tokenizer.vocab_size
    own = {kind: [*options.set, f"objective.kind={kind}"] for kind in KINDS}
    cost = {
        kind: step_flops(load_run(options.run, [*own[kind], f"model.vocab_size={vocab_size}"]))
        for kind in KINDS
    }
    found = {}
    for kind in KINDS:
        steps, run = round(options.steps * cost["electra"] / cost[kind]), options.out / kind
        sets = [
            part
            for setting in [*own[kind], f"train.total_steps={steps}"]
            for part in ("--set", setting)
        ]
        call(
            "pretrain",
            options.run,
            "--data",
            options.data,
            "--out",
            run,
            "--engine",
            options.engine,
            *sets,
        )
        records = read_metrics(run / "metrics.jsonl")
        last = {
            split: next(r for r in reversed(records) if r["split"] == split)
            for split in ("train", "valid")
        }
        found[kind] = {
            "steps": steps,
            "flops": steps * cost[kind],
            "tokens": last["train"]["tokens"],
            "minutes": last["train"]["seconds"] / 60,
            "mlm_loss": last["valid"]["mlm_loss"],  # of electra's generator, of mlm's main encoder
            "mlm_accuracy": last["valid"]["mlm_accuracy"],
        }
    for kind in KINDS if options.glue else ():
        tuned = options.out / f"{kind}-glue"
        sets = [part for setting in options.finetune_set for part in ("--set", setting)]
        call(
            "finetune",
            options.out / kind,
            options.finetune,
            "--tasks",
            ",".join(TASKS),
            "--data",
            options.glue,
            "--out",
            tuned,
            "--seeds",
            options.seeds,
            *sets,
        )
        for task in TASKS:
            paths = [tuned / task / f"seed-{seed}" / "result.json" for seed in range(options.seeds)]
            results = [json.loads(path.read_text()) for path in paths]
            scores = [
                next(iter(result["scores"].values()))
                for result in results
                if result["status"] == "done"
            ]
            found[kind][f"{task} seeds"] = len(scores)  # the others diverged and count nowhere
            for metric in scores[0] if scores else ():
                values = [100 * score[metric] for score in scores]
                found[kind][f"{task} {metric}"] = statistics.median(values)
                found[kind][f"{task} {metric} of each seed"] = values
    write_json(options.out / "objectives.json", found)
    keys = [key for key, value in found["electra"].items() if not isinstance(value, list)]
    table = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    table += [
        f"| {kind} | {' | '.join(f'{values[key]:.4g}' for key in keys)} |"
        for kind, values in found.items()
    ]
    write_bytes(options.out / "objectives.md", ("\n".join(table) + "\n").encode())
    print("\n".join(table))


if __name__ == "__main__":
    main()
