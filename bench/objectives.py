"""Comparison of the objectives `electra` and `mlm` (BERT) at equal FLOPs, after fine-tuning.

    python bench/objectives.py --data D --out O --glue GLUE --steps 14000
    python bench/objectives.py --data D --out O --run tiny --set section.field=value

Both models train with equal FLOPs: --steps is the number of steps of electra; mlm has more steps,
since each of them costs less. The rows, their order, the masked positions, the learning rates and
the warmup are equal. Then both are fine-tuned on STS-B and CoLA; without --glue they are only
pretrained. A repeated call resumes. O/objectives.json and O/objectives.md hold the results: medians
over the seeds on the development sets.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cost import step_flops
from report import make_parser, run_main

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.config.loading import load_run
from electra_ds.data.shard_format import read_manifest
from electra_ds.training.metrics_file import read_metrics

KINDS = ("electra", "mlm")
TASKS = ("stsb", "cola")


def call(verb: str, *arguments: object) -> None:
    """Run a verb of the command line with its output. Ends this script if the verb fails."""
    command = [sys.executable, "-m", "electra_ds", verb, *map(str, arguments)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"electra-ds {verb} ended with exit code {code}")


def set_options(settings: list[str]) -> list[str]:
    """The --set options of a verb."""
    return [part for setting in settings for part in ("--set", setting)]


def pretrain(kind: str, steps: int, flops: float, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain with an objective of this kind; returns its results. flops: of one step."""
    out = options.out / kind
    settings = [*options.set, f"objective.kind={kind}", f"train.total_steps={steps}"]
    call(
        "pretrain",
        options.run,
        *("--data", options.data),
        *("--out", out),
        *("--engine", options.engine),
        *set_options(settings),
    )
    last_of_split = {record["split"]: record for record in read_metrics(out / "metrics.jsonl")}
    train = last_of_split["train"]
    valid = last_of_split["valid"]
    return {
        "steps": steps,
        "flops": steps * flops,
        "tokens": train["tokens"],
        "minutes": train["seconds"] / 60,
        "mlm_loss": valid["mlm_loss"],  # of electra's generator, of mlm's main encoder
        "mlm_accuracy": valid["mlm_accuracy"],
    }


def finetune(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a pretrained model on all tasks; returns its scores."""
    out = options.out / f"{kind}-glue"
    call(
        "finetune",
        options.out / kind,
        options.finetune,
        *("--tasks", ",".join(TASKS)),
        *("--data", options.glue),
        *("--out", out),
        *("--seeds", options.seeds),
        *set_options(options.finetune_set),
    )
    results: dict[str, Any] = {}
    for task in TASKS:
        paths = [out / task / f"seed-{seed}" / "result.json" for seed in range(options.seeds)]
        results |= task_scores(task, [json.loads(path.read_text()) for path in paths])
    return results


def task_scores(task: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and values of each metric over the seeds that did not diverge, in percent."""
    scores = [next(iter(seed["scores"].values())) for seed in seeds if seed["status"] == "done"]
    results: dict[str, Any] = {f"{task} seeds": len(scores)}
    for metric in scores[0] if scores else ():
        values = [100 * score[metric] for score in scores]
        results[f"{task} {metric}"] = statistics.median(values)
        results[f"{task} {metric} of each seed"] = values
    return results


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a markdown table, without the values of single seeds."""
    keys = [key for key, value in results["electra"].items() if not isinstance(value, list)]
    lines = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for kind, values in results.items():
        lines.append(f"| {kind} | {' | '.join(f'{values[key]:.4g}' for key in keys)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--glue", type=Path, help="the folder that holds CoLA/ and STS-B/")
    parser.add_argument("--steps", type=int, default=8000, help="steps of electra")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning seeds of each task")
    parser.add_argument("--run", default="tiny", help="run config")
    parser.add_argument("--engine", default="zero0", help="engine file")
    parser.add_argument("--finetune", default="tiny", help="config of the verb finetune")
    parser.add_argument(
        "--finetune-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb finetune; repeatable",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb pretrain; repeatable",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    vocab_size = read_manifest(options.data).tokenizer.vocab_size
    flops = {}
    for kind in KINDS:
        settings = [*options.set, f"objective.kind={kind}", f"model.vocab_size={vocab_size}"]
        flops[kind] = step_flops(load_run(options.run, settings))
    results = {}
    for kind in KINDS:
        steps = round(options.steps * flops["electra"] / flops[kind])
        results[kind] = pretrain(kind, steps, flops[kind], options)
    if options.glue:
        for kind in KINDS:
            results[kind] |= finetune(kind, options)
    write_json(options.out / "objectives.json", results)
    table = format_table(results)
    write_bytes(options.out / "objectives.md", (table + "\n").encode())
    print(table)


if __name__ == "__main__":
    run_main(main)
