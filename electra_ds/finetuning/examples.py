"""Which examples does a file hold? TSV, CSV, JSONL, CoNLL or a Hugging Face dataset, read row by row.

A row that is not as its task says stops the reading, named by file and line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from electra_ds.common.errors import UserError
from electra_ds.common.suggestions import nearest

if TYPE_CHECKING:
    from electra_ds.finetuning.tasks import Task


class Example(NamedTuple):
    """One example. label: a class number, a number, one class number per word, or None where the file has none."""

    index: str
    text_a: str | list[str]
    text_b: str | None
    label: int | float | list[int] | None


Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its values by column
Lines = Iterator[tuple[int, list[str]]]  # numbers from 1, and cells


def read_examples(task: Task, split: str) -> list[Example]:
    """The examples of one split, in the order of the file.

    The splits train and valid must have labels; others have them where the label's column is there.
    UserError names file, line, what was found and what was expected.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    examples, numbers = [], {label: number for number, label in enumerate(task.labels or ())}
    read = _list if task.kind == "token_classification" else _text
    for number, (where, row) in enumerate(_rows(task, split)):
        index = str(number) if task.index is None else _text(_value(task.index, row, where), where)
        text_a = read(_value(task.text_a, row, where), where)
        text_b = None if task.text_b is None else _text(_value(task.text_b, row, where), where)
        label = _label(task, split, row, where)
        if label is not None and task.kind != "regression":
            words = label if isinstance(label, list) else [label]
            if unknown := [word for word in words if word not in numbers]:
                raise UserError(
                    f"{where}: unknown label {unknown[0]!r}{nearest(unknown[0], list(numbers))}; expected one of "
                    f"{', '.join(numbers)}; correct the row, or the labels of the task"
                )
            if isinstance(label, list) and len(label) != len(text_a):
                raise UserError(
                    f"{where}: {len(text_a)} words and {len(label)} tags; expected one tag per word"
                )
            label = [numbers[word] for word in words] if isinstance(label, list) else numbers[label]
        examples.append(Example(index, text_a, text_b, label))
    return examples


def read_file(task: Task, path: Path) -> list[Example]:
    """The examples of any file of the task's form; labels where it has their column."""
    files = {"folder": str(path.parent), "splits": {"test": path.name}, "dataset": None}
    return read_examples(task.model_copy(update=files), "test")


def seen_labels(task: Task) -> list[Any]:
    """Every distinct label of the training split, sorted: words, tags or numbers."""
    found = (_label(task, "train", row, where) for where, row in _rows(task, "train"))
    return sorted(
        {word for label in found for word in (label if isinstance(label, list) else [label])}
    )


def _label(
    task: Task, split: str, row: dict[str, Any], where: str
) -> str | float | list[str] | None:
    """The label as it is written: text, number or list of tags; None only outside train and valid."""
    if task.label is None or (
        not split.startswith(("train", "valid")) and row.get(task.label) is None
    ):
        return None
    value = _value(task.label, row, where)
    if task.kind != "regression":
        return _list(value, where) if task.kind == "token_classification" else _text(value, where)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{where}: {task.label} is {value!r}; expected a number; correct or remove the row"
        )
    return number


def _value(column: str | int, row: dict[str, Any], where: str) -> Any:
    key = (
        list(row)[column] if isinstance(column, int) and -len(row) <= column < len(row) else column
    )
    if row.get(key) is None:
        raise UserError(
            f"{where}: no column {column!r}{nearest(str(column), list(row))}; found {', '.join(row)}; "
            "name the columns in the task, or mend the file"
        )
    return row[key]


def _text(value: Any, where: str) -> str:
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: found {json.dumps(value)[:60]}; expected text or a number")
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _list(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: found {json.dumps(value)[:60]}; expected a list of words or tags, not empty"
        )
    return [_text(word, where) for word in value]


def _rows(task: Task, split: str) -> Iterator[Row]:
    if task.dataset is not None:
        yield from _dataset(task, split)
        return
    path, text, count = task.path(split), _read(task.path(split)), 0
    form = task.format or path.suffix.lstrip(".")
    if form == "tsv" or form == "csv":
        rows = _table(path, _tsv(text) if form == "tsv" else _csv(path, text), task, split)
    elif form in ("jsonl", "json", "conll"):
        rows = _conll(path, text) if form == "conll" else _jsonl(path, text)
    else:
        raise UserError(
            f"{path}: the name does not tell the format; give the task a format: tsv, csv, jsonl, conll"
        )
    for count, row in enumerate(rows, 1):  # noqa: B007
        yield row
    if not count:
        raise UserError(
            f"{path}: holds no example; expected at least one line beside a header; is the file complete?"
        )


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a file of examples; check --data and `splits`"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8; try: iconv -f latin1 -t utf-8"
        ) from None


def _table(path: Path, lines: Lines, task: Task, split: str) -> Iterator[Row]:
    """Rows by column: the first line names the columns where the task does not."""
    columns, broken = task.columns.get(split), 0
    for line, cells in lines:
        if columns is None:
            columns = cells if task.header else [str(number) for number in range(len(cells))]
            if task.header:
                continue
        if len(cells) == len(columns):
            yield f"{path}:{line}", dict(zip(columns, cells, strict=True))
        elif len(cells) < len(columns) and split in task.skip_short:
            broken += 1
        else:
            raise UserError(
                f"{path}:{line}: found {len(cells)} columns, expected {len(columns)} ({', '.join(columns)}); "
                "look for a missing or an extra separator (a text cannot hold a tab)"
            )
    if broken:
        warnings.warn(f"{path}: {broken} rows with too few columns left out", stacklevel=2)


def _tsv(text: str) -> Lines:
    """Quotes are literal, and only a line feed ends a line: texts hold other separators of Unicode."""
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        yield number, line.rstrip("\r").split("\t")


def _csv(path: Path, text: str) -> Lines:
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: odd quote in the row that begins here ({error}); expected each quote inside a quoted text "
            "written twice; mend it, or use TSV, where quotes are literal"
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            row = line
        if isinstance(row, dict):
            yield f"{path}:{number}", row
        elif row is not None:
            raise UserError(
                f"{path}:{number}: found {line[:60]!r}; expected one JSON object per line"
            )


def _conll(path: Path, text: str) -> Iterator[Row]:
    """One word per line: first column `words`, last column `tags`; a blank line ends a sentence."""
    sentence: list[list[str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            sentence.append(cells)
        elif sentence:
            where = f"{path}:{number - len(sentence)}"
            if len({len(cells) for cells in sentence}) > 1:
                raise UserError(
                    f"{where}: a sentence whose lines have different numbers of columns; expected word tag"
                )
            tags = {"tags": [cells[-1] for cells in sentence]} if len(sentence[0]) > 1 else {}
            yield where, {"words": [cells[0] for cells in sentence]} | tags
            sentence = []


def _dataset(task: Task, split: str) -> Iterator[Row]:
    """Rows of a dataset of the Hugging Face hub or of a folder that the `datasets` library reads."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"task {task.name} reads a dataset: pip install 'electra_ds[hf]', or give files"
        ) from None
    local, part = Path(task.folder, task.dataset), task.splits[split]
    source = f"dataset {task.dataset}, split {part}"
    try:
        table = datasets.load_dataset(
            str(local) if local.exists() else task.dataset, task.dataset_config, split=part
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {error}") from None
    kind = table.features.get(task.label)
    names = getattr(
        getattr(kind, "feature", kind), "names", None
    )  # of a class label, or of a list of them
    for number, row in enumerate(table):
        label = row.get(task.label)
        if names and label is not None:
            word = (
                [names[tag] for tag in label]
                if isinstance(label, list)
                else names[label]
                if label >= 0
                else None
            )
            row = row | {task.label: word}
        yield f"{source}, row {number}", row
