"""GLUE scores from pretrained and from random weights, and STS-B against the pretraining steps.

    python bench/pretraining.py MODEL --glue GLUE --out O
    python bench/pretraining.py MODEL --glue GLUE --out O --checkpoints 4000=CHECKPOINT ...

Fine-tunes five seeds of four tasks from each kind of weights with one recipe, and three seeds of
STS-B from each of --checkpoints. A repeated call resumes. Prints a markdown table; O/stsb.png shows
the scores of the checkpoints.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import make_parser, print_heading, print_row, run_main

from electra_ds.common.json_files import read_json

TASKS = {"cola": "matthews", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson"}  # metrics
TASK_SEEDS = 5
CHECKPOINT_SEEDS = 3


def finetune(
    model: str, out: Path, tasks: str, seeds: int, options: argparse.Namespace, *flags: str
) -> dict[str, Any]:
    """Fine-tune a model on tasks; returns the scores of each task on its development set.

    flags: further options of the verb.
    """
    command = [sys.executable, "-m", "electra_ds", "finetune", model, options.config]
    command += ["--tasks", tasks, "--data", options.glue, "--seeds", str(seeds), "--out", str(out)]
    command += ["--set", "train.keep=none", "--set", "train.micro_batch_size=32", *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)
    report = read_json(out / "report.json", "a report")
    return {name: task["scores"]["valid"] for name, task in report["tasks"].items()}


def format_score(score: dict[str, Any]) -> str:
    """Median, mean and standard deviation of one metric over the seeds."""
    return f"{score['median']:.1f} ({score['mean']:.1f} +- {score['std']:.1f})"


def plot(points: list[tuple[int, dict[str, Any]]], random_score: float, path: Path) -> None:
    """Plot STS-B against pretraining steps: a dot for each seed, a line through the medians."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    steps = [step for step, _ in points]
    medians = [score["median"] for _, score in points]
    axes.plot(steps, medians, marker="o", label="median over seeds")
    for step, score in points:
        values = list(score["seeds"].values())
        axes.scatter([step] * len(values), values, s=8, color="gray")
    axes.axhline(random_score, linestyle=":", color="gray", label="random initialisation")
    axes.set(xlabel="pretraining steps", ylabel="STS-B Pearson x 100 (dev)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def parse_checkpoint(text: str) -> tuple[int, str]:
    """STEPS=CHECKPOINT as (steps, path)."""
    steps, path = text.split("=", 1)
    return int(steps), path


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("model", help="run folder or checkpoint of the pretrained model")
    parser.add_argument("--glue", required=True, help="the folder that holds CoLA/, RTE/, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        default=[],
        metavar="STEPS=CHECKPOINT",
        help="further checkpoints, each with its number of pretraining steps",
    )
    parser.add_argument("--config", default="tiny", help="config of the verb finetune")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    tasks = ",".join(TASKS)
    scores = {
        "pretrained": finetune(
            options.model, options.out / "pretrained", tasks, TASK_SEEDS, options
        ),
        "random": finetune(
            options.model, options.out / "random", tasks, TASK_SEEDS, options, "--random-init"
        ),
    }
    print_heading("weights", *(f"{task} {metric}" for task, metric in TASKS.items()))
    for weights, task_scores in scores.items():
        cells = [format_score(task_scores[task][metric]) for task, metric in TASKS.items()]
        print_row(weights, *cells)
    points = []
    for step, path in sorted(map(parse_checkpoint, options.checkpoints)):
        out = options.out / f"at-{step}"
        score = finetune(path, out, "stsb", CHECKPOINT_SEEDS, options)["stsb"]["pearson"]
        points.append((step, score))
        print(f"{step} steps: STS-B Pearson {format_score(score)}")
    if points:
        random_score = scores["random"]["stsb"]["pearson"]["median"]
        plot(points, random_score, options.out / "stsb.png")


if __name__ == "__main__":
    run_main(main)
