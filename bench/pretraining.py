"""Does pretraining pay? GLUE scores from pretrained and from random weights, and STS-B against pretraining steps.

python bench/pretraining.py MODEL --glue GLUE --out O [--checkpoints STEPS=CHECKPOINT ...] [--config tiny]

Five seeds of four tasks each way, with one recipe; three seeds of STS-B for each of --checkpoints. Run again it goes on
where it was. Prints a markdown table; O/stsb.png shows the curve.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from electra_ds.common.files import read_json

TASKS = {"cola": "matthews", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson"}


def finetune(
    model: str, out: Path, tasks: str, seeds: int, options: list[str], arguments: argparse.Namespace
) -> dict:
    """One suite; its report."""
    verb = [
        sys.executable,
        "-m",
        "electra_ds",
        "finetune",
        model,
        arguments.config,
        "--tasks",
        tasks,
    ]
    rest = [
        "--data",
        arguments.glue,
        "--seeds",
        str(seeds),
        "--out",
        str(out),
        "--set",
        "train.keep=none",
    ]
    subprocess.run(
        [*verb, *rest, *options, "--set", "train.micro_batch_size=32"],
        check=True,
        stdout=sys.stderr,
    )
    return read_json(out / "report.json", "a report")


def cell(found: dict) -> str:
    """Median, mean and standard deviation of one metric."""
    return f"{found['median']:.1f} ({found['mean']:.1f} +- {found['std']:.1f})"


def plot(points: list[tuple[int, dict]], chance: float, path: Path) -> None:
    """Pretraining steps against STS-B, every seed a dot, medians joined."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    steps = [step for step, _ in points]
    axes.plot(
        steps, [found["median"] for _, found in points], marker="o", label="median over seeds"
    )
    for step, found in points:
        axes.scatter([step] * len(found["seeds"]), list(found["seeds"].values()), s=8, color="gray")
    axes.axhline(chance, linestyle=":", color="gray", label="random initialisation")
    axes.set(xlabel="pretraining steps", ylabel="STS-B Pearson x 100 (dev)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--glue", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="STEPS=CHECKPOINT")
    parser.add_argument("--config", default="tiny")
    arguments = parser.parse_args()
    tasks = ",".join(TASKS)
    rows = {
        name: finetune(arguments.model, arguments.out / name, tasks, 5, options, arguments)
        for name, options in (("pretrained", []), ("random", ["--random-init"]))
    }
    print(
        "| weights |",
        " | ".join(f"{task} {metric}" for task, metric in TASKS.items()),
        "|\n|---|---|---|---|---|",
    )
    for name, report in rows.items():
        found = [
            cell(report["tasks"][task]["scores"]["valid"][metric]) for task, metric in TASKS.items()
        ]
        print(f"| {name} |", " | ".join(found), "|")
    points = []
    for step, path in sorted(
        (int(step), path) for step, path in (c.split("=", 1) for c in arguments.checkpoints)
    ):
        report = finetune(path, arguments.out / f"at-{step}", "stsb", 3, [], arguments)
        points.append((step, report["tasks"]["stsb"]["scores"]["valid"]["pearson"]))
        print(f"{step} steps: STS-B Pearson {cell(points[-1][1])}")
    if points:
        chance = rows["random"]["tasks"]["stsb"]["scores"]["valid"]["pearson"]["median"]
        plot(points, chance, arguments.out / "stsb.png")


if __name__ == "__main__":
    main()
