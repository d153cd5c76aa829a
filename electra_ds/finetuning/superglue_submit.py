"""Zip file for a submission to the SuperGLUE site: a JSONL file for each task."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_output
from electra_ds.common.json_files import read_small
from electra_ds.common.outputs import check_output_file
from electra_ds.common.printable import printable, shortened
from electra_ds.finetuning.report import Results, best_seed, read_results
from electra_ds.finetuning.superglue_tasks import PREFIX, SUPERGLUE
from electra_ds.finetuning.tasks import GLUE


class Official(NamedTuple):
    """A file of the site. rows: lines of predictions of the official test set."""

    task: str
    split: str
    rows: int


FILES = {
    "BoolQ": Official("boolq", "test", 3245),
    "CB": Official("cb", "test", 250),
    "COPA": Official("copa", "test", 500),
    "MultiRC": Official("multirc", "test", 9693),
    "ReCoRD": Official("record", "test", 10000),
    "RTE": Official("rte", "test", 3000),
    "WiC": Official("wic", "test", 1400),
    "WSC": Official("wsc", "test", 146),
    "AX-b": Official("rte", "test_axb", 1104),
    "AX-g": Official("rte", "test_axg", 356),
}


def write_superglue(folder: Path, out: Path) -> list[str]:
    """Write the zip file of the test predictions in `folder`, of the best seed on dev of each task.

    folder: DIR of finetune. out: the zip file.
    Returns a line for each file with its seed, and a warning that names the files that are left out,
    because there are no predictions. Raises UserError without writing when there are no predictions
    at all, and for predictions of other data than the official test set.
    """
    read = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".zip")
    check_output_file(out, "--out", tuple(read))
    results = read_results(folder)
    notes, absent = [], []
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in FILES:
            found = _predictions(folder, results, name)
            if found is None:
                absent.append(name)
                continue
            lines, origin = found
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            # ZipInfo has a fixed date: the same predictions give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.jsonl"), text, zipfile.ZIP_DEFLATED)
            notes.append(f"{name}.jsonl: {origin}")
    if not notes:
        raise UserError(
            f"{folder}: no SuperGLUE task has a finished seed with predictions of its test split "
            f"(predictions-test.tsv); found {', '.join(map(printable, results))}; nothing is written"
        )
    if absent:
        notes.append(
            f"WARNING: no test predictions of {', '.join(absent)}: the zip is without these files; "
            "the site expects one for each task"
        )
    write_output(out, data.getvalue())
    return notes


def has_superglue_alone(folder: Path) -> bool:
    """Return whether the suite has tasks of SuperGLUE and none of GLUE."""
    names = read_results(folder).keys()
    return any(name in SUPERGLUE for name in names) and not any(name in GLUE for name in names)


def _predictions(folder: Path, results: Results, name: str) -> tuple[list[Any], str] | None:
    """Return (lines of one file, description of its seed), or None without predictions."""
    official = FILES[name]
    task = f"{PREFIX}{official.task}"
    best = best_seed(results.get(task, {}))
    path = folder / task / f"seed-{best.seed if best else ''}" / f"predictions-{official.split}.tsv"
    if best is None or not path.exists():
        return None
    text = read_small(path, "predictions").decode("utf-8", "replace")
    cells = [line.split("\t")[:2] for line in text.split("\n")[1:] if line]
    keys = [cell[0] for cell in cells]
    if len(keys) != official.rows or len(set(keys)) != len(keys) or any(len(c) < 2 for c in cells):
        raise UserError(
            f"{path}: {len(keys)} rows with {len(set(keys))} different indexes; expected "
            f"{official.rows} with an index each, the official test set of {name}: predict its test "
            "file again"
        )
    read = LABELS.get(official.task, _text)
    labels = SUPERGLUE[task].get("labels") or ["0", "1"]
    for key, value in cells:
        if official.task != "record" and value not in labels:
            raise UserError(
                f"{path}: the prediction {shortened(value)} is not a label of {name}; predict its "
                "test file again"
            )
        if not all(part.isascii() and part.isdecimal() for part in key.split("/")):
            raise UserError(
                f"{path}: the index {shortened(key)}; expected a number, or three of MultiRC (3/7/1): "
                "predict the test file again"
            )
    answers = [(key, read(value)) for key, value in cells]
    lines = _by_passage(answers) if official.task == "multirc" else _by_index(answers)
    origin = f"seed {best.seed}, {best.metric} {100 * best.value:.1f} on {best.split}"
    return list(lines), origin


def _text(value: str) -> Any:
    return value


# Labels of tasks that the site spells in another way than the data.
LABELS: dict[str, Callable[[str], Any]] = {"copa": int, "multirc": int, "wsc": str.capitalize}


def _by_index(answers: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    for key, label in answers:
        yield {"idx": int(key), "label": label}


def _by_passage(answers: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one object for each passage, with its questions and their answers."""
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for key, label in answers:
        passage, question, answer = map(int, key.split("/"))
        questions = passages.setdefault(passage, {})
        questions.setdefault(question, []).append({"idx": answer, "label": label})
    for passage, questions in passages.items():
        listed = [{"idx": index, "answers": found} for index, found in questions.items()]
        yield {"idx": passage, "passage": {"questions": listed}}
