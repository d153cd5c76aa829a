"""Examples of a task: texts and labels from the rows of its files or its dataset.

A row that does not fit its task raises a UserError that names file and line, or dataset and row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import nearest
from electra_ds.finetuning.hub_rows import dataset_rows
from electra_ds.finetuning.rows import Row, file_rows
from electra_ds.finetuning.squad_files import Answers, read_questions
from electra_ds.finetuning.superglue_rows import CANDIDATE, GROUPED, Candidate
from electra_ds.finetuning.tag_schemes import in_scheme

if TYPE_CHECKING:
    from electra_ds.finetuning.tasks import Task

RawLabel = str | float | list[str] | None  # as stored in a file: text, number or tags
MAX_CHOICES = 1000  # of an example
# Values that test splits contain in place of labels that are not published.
HIDDEN = ("", "-1", "-100")


class Example(NamedTuple):
    """One example of a task.

    key: name of the example in predictions. text_a: a text, or in token classification its words.
    text_b: the second text of a pair, or None; in multiple choice the second text of each choice.
    label: a class number; in regression a number; in token classification one class number for each
    word; in multiple choice the number of the right choice; in question_answering the answers; None
    if the file has no label.
    candidate: the question of which this example is one answer, in formats that have such groups.
    """

    key: str
    text_a: str | list[str]
    text_b: str | list[str] | None
    label: int | float | list[int] | Answers | None
    candidate: Candidate | None = None


def read_examples(task: Task, split: str) -> list[Example]:
    """Return the examples of one split, in the order of the file.

    The splits train and valid must have labels if the task has a label column. Other splits have
    labels if the file has this column; a value of `HIDDEN` that is not a label of the task counts
    as a missing label there. Raises UserError for a split that the task does not have, for a file
    that cannot be read, and, with file and line, for a row that does not fit the task.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    if task.kind == "question_answering":
        found = read_questions(task.path(split), split, task.questions.no_answer)
        return [Example(*question) for question in found]
    examples = []
    for number, (where, row) in enumerate(_rows(task, split)):
        key = str(number) if task.index is None else _text(_value(task.index, row, where), where)
        first = _value(task.text_a, row, where)
        has_words = task.kind == "token_classification"
        text_a = _list(first, where) if has_words else _text(first, where)
        second = None if task.text_b is None else _text(_value(task.text_b, row, where), where)
        text_b = second if task.choices is None else _choices(task, row, where, second)
        choices = len(text_b) if isinstance(text_b, list) else 0
        label = _class_numbers(task, _label(task, split, row, where), where, choices)
        if isinstance(label, list) and len(label) != len(text_a):
            raise UserError(
                f"{where}: {len(text_a)} words and {len(label)} tags; expected one tag per word"
            )
        candidate = row.get(CANDIDATE) if task.format in GROUPED else None
        examples.append(Example(key, text_a, text_b, label, candidate))
    _check_range(task, split, examples)
    return examples


def _rows(task: Task, split: str) -> Iterator[Row]:
    if task.dataset is not None:
        return dataset_rows(task, task.dataset, split)
    return file_rows(task, split)


def outside_range(task: Task, examples: list[Example]) -> list[float]:
    """Return the labels outside label_range, in their order; [] for tasks other than regression."""
    if task.label_range is None:
        return []
    low, high = task.label_range
    labels = [example.label for example in examples]
    return [x for x in labels if isinstance(x, float) and not low <= x <= high]


def _check_range(task: Task, split: str, examples: list[Example]) -> None:
    """Raise UserError if a label of train, or every label of another split, is out of range."""
    odd = outside_range(task, examples)
    if odd and (split == "train" or len(odd) == len(examples)):
        low, high = task.label_range or (0.0, 1.0)
        number = [example.label for example in examples].index(odd[0])
        raise UserError(
            f"task {task.name}, split {split}: {len(odd)} of {len(examples)} labels are outside "
            f"label_range [{low:g}, {high:g}], the first is {odd[0]:g} in row {number} (from 0); "
            "correct the rows or the range"
        )


def _choices(task: Task, row: dict[str | int, Any], where: str, second: str | None) -> list[str]:
    """Return the second text of each choice of a row: `second`, if there is one, and the choice."""
    columns = task.choices
    if isinstance(columns, list):
        texts = [_text(_value(column, row, where), where) for column in columns]
    else:
        assert columns is not None
        texts = _list(_value(columns, row, where), f"{where}: {columns}", "choices, at least two")
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise UserError(
            f"{where}: {columns}: found {len(texts)} choices; expected 2 to {MAX_CHOICES}; correct "
            "or remove the row"
        )
    return [text if second is None else f"{second} {text}".strip() for text in texts]


def _class_numbers(
    task: Task, label: RawLabel, where: str, choices: int
) -> int | float | list[int] | None:
    """Return a label with class names replaced by their indices in task.labels.

    choices: number of choices of the row, in multiple choice.
    """
    if label is None or isinstance(label, float):
        return label
    labels = task.labels or []
    if task.kind == "multiple_choice":
        labels = (task.labels or [str(number) for number in range(choices)])[:choices]
    numbers = {name: number for number, name in enumerate(labels)}
    names = label if isinstance(label, list) else [label]
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(
            f"{where}: unknown label {shortened(unknown[0])}{nearest(unknown[0], labels)}; "
            f"expected one of {', '.join(map(shortened, labels))}; correct the row, or the labels "
            "of the task"
        )
    return [numbers[name] for name in names] if isinstance(label, list) else numbers[label]


def read_file(task: Task, path: Path) -> list[Example]:
    """Return the examples in a file with the columns of the task, as a test split.

    The format is that of the task, or given by the suffix. Labels are read if the file has their
    column. Raises UserError as `read_examples`.
    """
    files = {"folder": str(path.parent), "splits": {"test": path.name}, "dataset": None}
    return read_examples(task.model_copy(update=files), "test")


def seen_labels(task: Task) -> list[Any]:
    """Return the distinct labels of the training split, sorted: class names, tags or numbers."""
    seen: set[Any] = set()
    for where, row in _rows(task, "train"):
        label = _label(task, "train", row, where)
        seen.update(label if isinstance(label, list) else [label])
    return sorted(seen)


def _label(task: Task, split: str, row: dict[str | int, Any], where: str) -> RawLabel:
    """Return the label as stored in the file; None if it is missing, or if the task has none."""
    is_required = split.startswith(("train", "valid"))
    if task.label is None or (not is_required and row.get(task.label) is None):
        return None
    value = _value(task.label, row, where)
    if not is_required and _is_hidden(task, value):
        return None
    if task.kind == "token_classification":
        return in_scheme(task.tag_scheme, _list(value, where), where)
    if task.kind in ("classification", "multiple_choice"):
        return _text(value, where)
    return _number(value, f"{where}: {task.label}")


def _is_hidden(task: Task, value: Any) -> bool:
    """Return whether the label of a test split is a value of `HIDDEN` and not a real label."""
    values = value if isinstance(value, list) else [value]
    if task.kind == "regression":
        low, high = task.label_range or (0.0, 1.0)
        hidden = [text for text in HIDDEN if not text or not low <= float(text) <= high]
        return all(_plain(text) in hidden for text in values)
    return all(
        _plain(text) in HIDDEN and _plain(text) not in (task.labels or ()) for text in values
    )


def _plain(value: Any) -> str:
    """Return a label as text; a whole number has no decimal point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    return text.removesuffix(".0") if text.startswith("-") else text


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        is_comma = isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value)
        wanted = "a number with a decimal point, not a comma" if is_comma else "a number"
        raise UserError(
            f"{where} is {shortened(value)}; expected {wanted}; correct or remove the row"
        )
    return number


def _value(column: str | int, row: dict[str | int, Any], where: str) -> Any:
    """Return the value of a column, given by name or by number. UserError if it is missing."""
    key = column
    if isinstance(column, int) and -len(row) <= column < len(row):
        key = list(row)[column]
    if key in row and row[key] is None:
        raise UserError(
            f"{where}: column {shortened(column)} is null; expected a value; correct or remove the "
            "row"
        )
    if key not in row:
        names = [printable(str(name)) for name in row]
        quoted = (
            "; quotes are literal in TSV: remove them, or save the file as CSV"
            if f'"{column}"' in row
            else ""
        )
        raise UserError(
            f"{where}: no column {column!r}{nearest(str(column), names)}; found "
            f"{', '.join(names)}{quoted}; name the columns in the task, or correct the file"
        )
    return row[key]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: found {shortened(value, 60)}; expected text or a number")
    return json.dumps(value)


def _list(value: Any, where: str, wanted: str = "words or tags, at least one") -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: found {shortened(value, 60)}; expected a list of {wanted}")
    return [_text(word, where) for word in value]
