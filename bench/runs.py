"""Pretraining and fine-tuning runs of the benches that compare learning, and their results."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from electra_ds.training.metrics_file import read_metrics


def call(verb: str, *arguments: object) -> None:
    """Run a verb of the command line with its output. Ends this script if the verb fails."""
    command = [sys.executable, "-m", "electra_ds", verb, *map(str, arguments)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"electra-ds {verb} ended with exit code {code}")


def set_options(settings: Sequence[str]) -> list[str]:
    """The --set options of a verb."""
    return [part for setting in settings for part in ("--set", setting)]


def pretrain(
    run: str,
    data: Path,
    out: Path,
    engine: str,
    settings: Sequence[str],
    more: Sequence[object] = (),
) -> dict:
    """Pretrain, or resume; returns the metrics at the end. more: further options of the verb."""
    options = ("--data", data, "--out", out, "--engine", engine, *more)
    call("pretrain", run, *options, *set_options(settings))
    last_of_split = {record["split"]: record for record in read_metrics(out / "metrics.jsonl")}
    train, valid = last_of_split["train"], last_of_split["valid"]
    return {
        "steps": train["step"],
        "tokens": train["tokens"],
        "minutes": train["seconds"] / 60,
        "mlm_loss": valid["mlm_loss"],
        "mlm_accuracy": valid["mlm_accuracy"],
        "fixed_auc": valid.get("fixed_auc"),
        "disc_gain": valid.get("disc_gain"),
    }


def finetune(
    model: Path,
    config: str,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    seeds: int,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Fine-tune a model on all tasks; returns its scores."""
    options = ("--tasks", ",".join(tasks), "--data", data, "--out", out, "--seeds", seeds)
    call("finetune", model, config, *options, *set_options(settings))
    results: dict[str, Any] = {}
    for task in tasks:
        paths = [out / task / f"seed-{seed}" / "result.json" for seed in range(seeds)]
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
    keys = dict.fromkeys(
        key
        for values in results.values()
        for key, value in values.items()
        if not isinstance(value, list)
    )
    lines = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, values in results.items():
        cells = (values.get(key) for key in keys)
        texts = ("" if value is None else f"{value:.4g}" for value in cells)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)
