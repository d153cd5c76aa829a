"""What did a fine-tuning give? DIR/report.json and report.md: every seed, median, mean, spread, published results.

A pure function of the folder; one that is not finished is reported as far as it is.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.finetuning.tasks import GLUE

# Columns of the comparison: like stands beside like. The average is that of the paper, over all but the Pearson one.
COLUMNS = {
    "CoLA Matthews": ("cola", "matthews"),
    "SST-2 acc": ("sst2", "accuracy"),
    "MRPC acc": ("mrpc", "accuracy"),
    "STS-B Spearman": ("stsb", "spearman"),
    "QQP acc": ("qqp", "accuracy"),
    "MNLI acc": ("mnli", "accuracy"),
    "QNLI acc": ("qnli", "accuracy"),
    "RTE acc": ("rte", "accuracy"),
    "STS-B Pearson": ("stsb", "pearson"),
}
# Dev sets, in the order of the columns, as the paper and the authors' repository give them.
PUBLISHED = {
    "ELECTRA-Large, 1.75M steps": (69.1, 96.9, 90.8, 92.6, 92.4, 90.9, 95.0, 88.0),
    "ELECTRA-Base, released": (67.7, 95.1, 89.5, 91.2, 91.5, 88.8, 93.2, 82.7),
    "ELECTRA-Small, released": (57.0, 91.2, 88.0, 87.5, 89.0, 81.3, 88.4, 66.7),
    "ELECTRA-Small, OpenWebText, 1M steps": (56.8, 88.3, 87.4, 86.8, 88.3, 78.9, 87.9, 68.5),
}
Results = dict[str, dict[int, dict[str, Any] | None]]


def read_results(folder: Path) -> Results:
    """Task -> seed -> what its result.json says, or None where a seed has none yet; GLUE first, in the usual order.

    Scores that are no finite numbers are left out.
    """
    found: Results = {}
    for place in folder.glob("*/seed-*"):
        path, number = place / "result.json", place.name.removeprefix("seed-")
        if not number.isdecimal():  # a copy that someone put aside
            continue
        result = read_json(path, "a seed's result") if path.exists() else None
        for metrics in result["scores"].values() if result else ():
            for metric in [
                name for name, value in metrics.items() if value is None or not math.isfinite(value)
            ]:
                del metrics[metric]
        found.setdefault(place.parent.name, {})[int(number)] = result
    if not found:
        raise UserError(
            f"{folder}: no TASK/seed-N inside; expected a folder that finetune wrote (its --out)"
        )
    order = {name: place for place, name in enumerate(GLUE)}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    return {name: dict(sorted(found[name].items())) for name in names}


def best_seed(seeds: dict[int, dict[str, Any] | None]) -> tuple[int, str, str, float] | None:
    """(seed, dev split, metric, score) of the finished seed with the best main score on the main dev split."""
    scored = [(seed, *main) for seed, result in seeds.items() if (main := _main(result))]
    return max(scored, key=lambda one: one[-1], default=None)


def _main(result: dict[str, Any] | None) -> tuple[str, str, float] | None:
    """(dev split, metric, score) by which a finished seed is compared; None where it has no such score."""
    scores = result["scores"] if result and result["status"] == "done" else {}
    split = next((split for split in scores if split.startswith("valid")), None)
    return (split, *next(iter(scores[split].items()))) if split and scores[split] else None


def _status(result: dict[str, Any] | None) -> str:
    if result is None:
        return "unfinished"
    return (
        "without a score" if result["status"] == "done" and not _main(result) else result["status"]
    )


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json and report.md into `folder` (DIR/TASK/seed-N/result.json); returns what report.json holds.

    Scores are times 100; `best` is that of the best seed on dev. Median, mean and standard deviation (n - 1) are over
    the finished seeds; a diverged seed is listed as such and enters none of them. UserError when there is no seed.
    """
    tasks = {name: _task(seeds) for name, seeds in read_results(folder).items()}
    ran_glue = any(name in GLUE for name in tasks)
    report = {
        "tasks": tasks,
        "comparison": _comparison(tasks) if ran_glue else {},
        "notes": _notes(tasks),
    }
    write_json(folder / "report.json", report)
    write_bytes(folder / "report.md", _markdown(report).encode())
    return report


def _task(seeds: dict[int, dict[str, Any] | None]) -> dict[str, Any]:
    done = {seed: result for seed, result in seeds.items() if _main(result)}
    best, scores = best_seed(seeds), {}
    for split, metrics in next(iter(done.values()))["scores"].items() if done else ():
        for metric in metrics:
            given = {
                seed: result["scores"].get(split, {}).get(metric) for seed, result in done.items()
            }
            values = {seed: 100 * value for seed, value in given.items() if value is not None}
            listed = list(values.values())
            scores.setdefault(split, {})[metric] = {
                "seeds": values,
                "median": statistics.median(listed),
                "mean": statistics.fmean(listed),
                "std": statistics.stdev(listed) if len(listed) > 1 else None,
                "best": values.get(best[0]),
            }
    return {
        "seeds": {seed: _status(result) for seed, result in seeds.items()},
        "selected": sorted({result["selected"] for result in done.values()}),
        "origin": sorted({result["origin"] for result in seeds.values() if result}),
        "best_seed": best and best[0],
        "scores": scores,
    }


def _comparison(tasks: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Row -> column -> score; ours are medians on the dev set, MNLI's on the matched one."""
    ours = {}
    for title, (task, metric) in COLUMNS.items():
        scores = tasks.get(task, {}).get("scores", {})
        ours[title] = (
            scores.get("valid", scores.get("valid_matched", {})).get(metric, {}).get("median")
        )
    rows = {"this, median": ours}
    rows |= {
        name: dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, row, strict=False))
        for name, row in PUBLISHED.items()
    }
    for row in rows.values():
        eight = [value for title, value in row.items() if title != "STS-B Pearson"]
        row["average of 8"] = None if None in eight else statistics.fmean(eight)
    return rows


def _notes(tasks: dict[str, Any]) -> list[str]:
    notes = []
    for name, task in tasks.items():
        of: dict[str, list[str]] = {}
        for seed, status in task["seeds"].items():
            of.setdefault(status, []).append(str(seed))
        finished = f"the figures are over the {len(of.get('done', []))} finished of {len(task['seeds'])} seeds"
        for status in sorted(of.keys() - {"done"}):
            notes.append(f"{name}: {status}: seed {', '.join(of[status])}; {finished}")
        if chosen := [how for how in task["selected"] if how != "last"]:
            notes.append(
                f"{name}: weights chosen by their dev score ({', '.join(chosen)}), so the dev score flatters"
            )
    absent = [name for name in GLUE if name not in tasks and name != "ax"]
    if 0 < len(absent) < len(GLUE) - 1:
        notes.append(f"not run: {', '.join(absent)}")
    return notes


def _markdown(report: dict[str, Any]) -> str:
    lines = ["# Fine-tuning", "", "Scores x 100. std: standard deviation over seeds (n - 1).", ""]
    lines += _line(
        "task", "split", "metric", "median", "mean", "std", "best on dev", "every seed", head=True
    )
    for name, task in report["tasks"].items():
        for split, metrics in task["scores"].items():
            for metric, found in metrics.items():
                every = [f"{seed}: {value:.1f}" for seed, value in found["seeds"].items()]
                every += [
                    f"{seed}: {status}"
                    for seed, status in task["seeds"].items()
                    if status != "done"
                ]
                figures = [found[key] for key in ("median", "mean", "std", "best")]
                lines += _line(name, split, metric, *figures, ", ".join(every))
    for place, (name, row) in enumerate(report["comparison"].items()):
        if place == 0:
            lines += [
                "",
                "Beside published results on the dev sets:",
                "",
                *_line("model", *row, head=True),
            ]
        lines += _line(name, *row.values())
    origins = sorted({origin for task in report["tasks"].values() for origin in task["origin"]})
    notes = [
        f"- {note}" for note in [*(f"weights: {origin}" for origin in origins), *report["notes"]]
    ]
    return "\n".join([*lines, "", *notes, ""])


def _line(*cells: str | float | None, head: bool = False) -> list[str]:
    texts = [
        "" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells
    ]
    return [f"| {' | '.join(texts)} |", *(["|" + "---|" * len(texts)] if head else [])]
