"""Report on all seeds of a suite, in DIR/report.json and DIR/report.md.

It contains the score of every seed, median, mean, standard deviation, and published results. It
depends only on the files in the folder. Unfinished seeds are listed.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, field_validator

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import Record, read_record, write_json
from electra_ds.common.markdown import inline
from electra_ds.common.printable import printable
from electra_ds.finetuning.superglue_report import superglue_average
from electra_ds.finetuning.superglue_tasks import SUPERGLUE
from electra_ds.finetuning.tasks import GLUE, Task

# Columns of the comparison: title -> (task, metric). As in the paper, the average is over all
# columns except STS-B Pearson.
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
# Dev scores from the paper and the authors' repository, in the order of the columns.
PUBLISHED = {
    "ELECTRA-Large, 1.75M steps": (69.1, 96.9, 90.8, 92.6, 92.4, 90.9, 95.0, 88.0),
    "ELECTRA-Base, released": (67.7, 95.1, 89.5, 91.2, 91.5, 88.8, 93.2, 82.7),
    "ELECTRA-Small, released": (57.0, 91.2, 88.0, 87.5, 89.0, 81.3, 88.4, 66.7),
    "ELECTRA-Small, OpenWebText, 1M steps": (56.8, 88.3, 87.4, 86.8, 88.3, 78.9, 87.9, 68.5),
}


UNSCALED = "_threshold"  # end of the names of values that are not multiplied by 100

# Limited, so that sums of scores are finite.
Score = Annotated[float, Field(ge=-1e100, le=1e100)]


class Result(Record):
    """The content of result.json. scores: split -> metric -> value, without unknown values."""

    model_config = ConfigDict(extra="ignore")

    status: Literal["done", "diverged"]
    selected: str = "last"
    origin: str = "unknown"
    scores: dict[str, dict[str, Score]] = Field(default_factory=dict)

    @field_validator("scores", mode="before")
    @classmethod
    def _without_null(cls, scores: Any) -> Any:
        """Remove null, the value of a score that is not finite."""
        if not isinstance(scores, dict) or not all(isinstance(x, dict) for x in scores.values()):
            return scores
        return {
            split: {name: value for name, value in metrics.items() if value is not None}
            for split, metrics in scores.items()
        }


Seeds = dict[int, Result | None]  # None: a seed without a result
Results = dict[str, Seeds]


class MainScore(NamedTuple):
    """The score by which seeds are compared: the main metric on the first dev split."""

    split: str
    metric: str
    value: float


class BestSeed(NamedTuple):
    """The finished seed with the highest main score."""

    seed: int
    split: str
    metric: str
    value: float


def read_results(folder: Path) -> Results:
    """Return {task: {seed: content of result.json, or None}}.

    The tasks of GLUE are first and those of SuperGLUE second, in fixed order.

    Raises UserError when `folder` contains no TASK/seed-N, and for a damaged result.json.
    """
    results: Results = {}
    for path in folder.glob("*/seed-*"):
        number = path.name.removeprefix("seed-")
        # skips copies such as seed-0.bak
        if number.isascii() and number.isdecimal() and str(int(number)) == number:
            results.setdefault(path.parent.name, {})[int(number)] = _read_result(path)
    if not results:
        raise UserError(
            f"{printable(folder)}: no TASK/seed-N inside{found_at(folder).clause}; expected a folder "
            "that finetune wrote (its --out)"
        )
    rank = {name: number for number, name in enumerate([*GLUE, *SUPERGLUE])}
    names = sorted(results, key=lambda name: (rank.get(name, len(rank)), name))
    return {name: dict(sorted(results[name].items())) for name in names}


def _read_result(seed_folder: Path) -> Result | None:
    path = seed_folder / "result.json"
    if not path.exists():
        return None
    return read_record(path, Result, "a seed's result", nan_as_null=True)


def best_seed(seeds: Seeds) -> BestSeed | None:
    """Return the finished seed with the highest main score; None when no seed has one."""
    scored = [
        BestSeed(seed, *main) for seed, result in seeds.items() if (main := _main_score(result))
    ]
    return max(scored, key=lambda best: best.value, default=None)


def _main_score(result: Result | None) -> MainScore | None:
    """Return the main score of a finished seed; None if there is none."""
    if result is None or result.status != "done":
        return None
    dev = next((split for split in result.scores if split.startswith("valid")), None)
    if dev is None or not result.scores[dev]:
        return None
    metric, value = next(iter(result.scores[dev].items()))
    return MainScore(dev, metric, value)


def _status(result: Result | None) -> str:
    if result is None:
        return "unfinished"
    if result.status == "done" and not _main_score(result):
        return "without a score"
    return result.status


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json and report.md to `folder`, and return the content of report.json.

    folder: contains TASK/seed-N/result.json. Scores are multiplied by 100, thresholds are not; `best` is the score of
    the best seed on dev. Median, mean and standard deviation (n - 1) are over the finished seeds;
    diverged seeds are listed but not counted. Raises UserError as `read_results`.
    """
    tasks = {name: _summarize(seeds) for name, seeds in read_results(folder).items()}
    described = {name: _described(folder / name) for name in tasks}
    glue = {name: task for name, task in tasks.items() if described[name].is_glue(name)}
    notes = [f"{name}: WARNING: {note}" for name, d in described.items() for note in d.notes]
    report = {
        "tasks": tasks,
        "comparison": _comparison(glue) if glue else {},
        "notes": [*notes, *_notes(tasks, set(glue))],
    }
    if average := superglue_average(tasks):
        report["superglue"] = average
    write_json(folder / "report.json", report)
    write_bytes(folder / "report.md", _markdown(report).encode())
    return report


class Described(Record):
    """The keys of task.json that the report uses."""

    model_config = ConfigDict(extra="ignore")

    task: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def is_glue(self, name: str) -> bool:
        """Return whether a task is the GLUE task `name`; without a description, by name alone."""
        try:
            return name in GLUE and (not self.task or Task.model_validate(self.task).is_glue)
        except ValidationError:
            return False


def _described(folder: Path) -> Described:
    path = folder / "task.json"
    return (
        read_record(path, Described, "the description of a task") if path.exists() else Described()
    )


def _summarize(seeds: Seeds) -> dict[str, Any]:
    """Return the entry of one task in report.json."""
    done = {seed: result for seed, result in seeds.items() if result and _main_score(result)}
    best = best_seed(seeds)
    scores: dict[str, dict[str, Any]] = defaultdict(dict)
    first = next(iter(done.values()), None)
    for split, metrics in first.scores.items() if first else ():
        for metric in metrics:
            factor = 1 if metric.endswith(UNSCALED) else 100
            values = {
                seed: factor * result.scores[split][metric]
                for seed, result in done.items()
                if metric in result.scores.get(split, {})
            }
            scores[split][metric] = _statistics(values, best.seed if best else None)
    return {
        "seeds": {seed: _status(result) for seed, result in seeds.items()},
        "selected": sorted({result.selected for result in done.values()}),
        "origin": sorted({result.origin for result in seeds.values() if result}),
        "best_seed": best.seed if best else None,
        "scores": dict(scores),
    }


def _statistics(values: dict[int, float], best: int | None) -> dict[str, Any]:
    """Return the statistics of one metric. values: seed -> score. best: the best seed on dev."""
    scores = list(values.values())
    return {
        "seeds": values,
        "median": statistics.median(scores),
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "best": values.get(best) if best is not None else None,
    }


def _comparison(tasks: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return {row: {column: score}}. Our row has medians on dev, for MNLI on the matched split."""
    ours: dict[str, float | None] = {}
    for title, (task, metric) in COLUMNS.items():
        scores = tasks.get(task, {}).get("scores", {})
        dev = scores.get("valid", scores.get("valid_matched", {}))
        ours[title] = dev.get(metric, {}).get("median")
    rows = {"this, median": ours}
    for name, published in PUBLISHED.items():
        rows[name] = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, published, strict=False))
    for row in rows.values():
        averaged = [value for title, value in row.items() if title != "STS-B Pearson"]
        known = [value for value in averaged if value is not None]
        is_complete = len(known) == len(averaged)
        row["average of 8"] = statistics.fmean(known) if is_complete else None
    return rows


def _notes(tasks: dict[str, Any], glue: set[str]) -> list[str]:
    """Return notes about missing seeds and tasks, and about models selected by their dev score."""
    notes = []
    for name, task in tasks.items():
        by_status: dict[str, list[str]] = defaultdict(list)
        for seed, status in task["seeds"].items():
            by_status[status].append(str(seed))
        counted = f"{len(by_status['done'])} finished of {len(task['seeds'])} seeds"
        for status in sorted(by_status.keys() - {"done"}):
            seeds = ", ".join(by_status[status])
            notes.append(f"{name}: {status}: seed {seeds}; the scores are over the {counted}")
        if selected := [how for how in task["selected"] if how != "last"]:
            notes.append(
                f"{name}: weights selected by their dev score ({', '.join(selected)}), "
                "so the dev score is optimistic"
            )
    absent = [name for name in GLUE if name not in glue and name != "ax"]
    if 0 < len(absent) < len(GLUE) - 1:
        notes.append(f"not run: {', '.join(absent)}")
    return notes


def _markdown(report: dict[str, Any]) -> str:
    """Return the content of report.md. report: the content of report.json."""
    splits = (split for task in report["tasks"].values() for split in task["scores"].values())
    has_threshold = any(metric.endswith(UNSCALED) for split in splits for metric in split)
    scaled = "Scores x 100; thresholds as they are." if has_threshold else "Scores x 100."
    lines = ["# Fine-tuning", "", f"{scaled} std: standard deviation over seeds (n - 1).", ""]
    lines += _heading(
        "task", "split", "metric", "median", "mean", "std", "best on dev", "every seed"
    )
    for name, task in report["tasks"].items():
        other = [f"{seed}: {status}" for seed, status in task["seeds"].items() if status != "done"]
        for split, metrics in task["scores"].items():
            for metric, found in metrics.items():
                seeds = [f"{seed}: {value:.1f}" for seed, value in found["seeds"].items()]
                columns = [found[key] for key in ("median", "mean", "std", "best")]
                lines.append(_row(name, split, metric, *columns, ", ".join(seeds + other)))
    if comparison := report["comparison"]:
        titles = next(iter(comparison.values()))
        lines += ["", "Comparison with published results on the dev sets:", ""]
        lines += _heading("model", *titles)
        lines += [_row(name, *row.values()) for name, row in comparison.items()]
    if average := report.get("superglue"):
        lines += ["", "SuperGLUE, medians on the dev sets:", ""]
        lines += [*_heading(*average), _row(*average.values())]
    origins = sorted({origin for task in report["tasks"].values() for origin in task["origin"]})
    notes = [*(f"weights: {origin}" for origin in origins), *report["notes"]]
    return "\n".join([*lines, "", *(f"- {inline(note)}" for note in notes), ""])


def _heading(*titles: str) -> list[str]:
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells: str | float | None) -> str:
    """Return a row of a Markdown table. Floats have one decimal place, None is an empty cell."""
    texts = []
    for cell in cells:
        if cell is None:
            texts.append("")
        else:
            texts.append(f"{cell:.1f}" if isinstance(cell, float) else inline(cell))
    return f"| {' | '.join(texts)} |"
