"""Reading of examples from TSV, CSV, JSONL and CoNLL files and from Hugging Face datasets.

A row that does not fit its task raises a UserError that names file and line.
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

RawLabel = str | float | list[str] | None  # as stored in a file: text, number or tags


class Example(NamedTuple):
    """One example of a task.

    key: its name in files of predictions. text_a: a text, or in token classification its words.
    text_b: the second text of a pair, or None. label: a class number; in regression a number; in
    token classification one class number for each word; None if the file has no label.
    """

    key: str
    text_a: str | list[str]
    text_b: str | None
    label: int | float | list[int] | None


Row = tuple[str, dict[str | int, Any]]  # its location for messages, and its values by column
Lines = Iterator[tuple[int, list[str]]]  # line number from 1, and cells


def read_examples(task: Task, split: str) -> list[Example]:
    """The examples of one split, in the order of the file.

    The splits train and valid must have labels; other splits have labels if the file has the column
    of the label. Raises UserError for a split that the task does not have, for a file that cannot
    be read, and, with file and line, for a row that does not fit the task.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    examples = []
    for number, (where, row) in enumerate(_rows(task, split)):
        key = str(number) if task.index is None else _text(_value(task.index, row, where), where)
        first = _value(task.text_a, row, where)
        has_words = task.kind == "token_classification"
        text_a = _list(first, where) if has_words else _text(first, where)
        text_b = None if task.text_b is None else _text(_value(task.text_b, row, where), where)
        label = _class_numbers(task, _label(task, split, row, where), where)
        if isinstance(label, list) and len(label) != len(text_a):
            raise UserError(
                f"{where}: {len(text_a)} words and {len(label)} tags; expected one tag per word"
            )
        examples.append(Example(key, text_a, text_b, label))
    return examples


def _class_numbers(task: Task, label: RawLabel, where: str) -> int | float | list[int] | None:
    """A label with its texts replaced by their indices in task.labels."""
    if label is None or isinstance(label, float):
        return label
    labels = task.labels or []
    numbers = {name: number for number, name in enumerate(labels)}
    names = label if isinstance(label, list) else [label]
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(
            f"{where}: unknown label {unknown[0]!r}{nearest(unknown[0], labels)}; expected one of "
            f"{', '.join(labels)}; correct the row, or the labels of the task"
        )
    return [numbers[name] for name in names] if isinstance(label, list) else numbers[label]


def read_file(task: Task, path: Path) -> list[Example]:
    """Read a file in the format of the task; labels are read if the file has their column."""
    files = {"folder": str(path.parent), "splits": {"test": path.name}, "dataset": None}
    return read_examples(task.model_copy(update=files), "test")


def seen_labels(task: Task) -> list[Any]:
    """Every distinct label of the training split, sorted: texts, tags or numbers."""
    seen: set[Any] = set()
    for where, row in _rows(task, "train"):
        label = _label(task, "train", row, where)
        seen.update(label if isinstance(label, list) else [label])
    return sorted(seen)


def _label(task: Task, split: str, row: dict[str | int, Any], where: str) -> RawLabel:
    """The label as stored in the file; None only outside train and valid."""
    is_required = split.startswith(("train", "valid"))
    if task.label is None or (not is_required and row.get(task.label) is None):
        return None
    value = _value(task.label, row, where)
    if task.kind == "token_classification":
        return _list(value, where)
    if task.kind == "classification":
        return _text(value, where)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{where}: {task.label} is {value!r}; expected a number; correct or remove the row"
        )
    return number


def _value(column: str | int, row: dict[str | int, Any], where: str) -> Any:
    """The value of a column, by name or by number."""
    key = column
    if isinstance(column, int) and -len(row) <= column < len(row):
        key = list(row)[column]
    if row.get(key) is None:
        names = [str(name) for name in row]
        raise UserError(
            f"{where}: no column {column!r}{nearest(str(column), names)}; found "
            f"{', '.join(names)}; name the columns in the task, or correct the file"
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
    """The rows of a split. UserError for an unknown format and for a file without rows."""
    if task.dataset is not None:
        yield from _dataset(task, task.dataset, split)
        return
    path = task.path(split)
    text = _read(path)
    rows = _rows_of_text(path, text, task, split)
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise UserError(
            f"{path}: holds no example; expected at least one line after the header; "
            "check that the file is complete"
        )


def _rows_of_text(path: Path, text: str, task: Task, split: str) -> Iterator[Row]:
    file_format = task.format or path.suffix.lstrip(".")
    if file_format == "tsv":
        return _table(path, _tsv(text), task, split)
    if file_format == "csv":
        return _table(path, _csv(path, text), task, split)
    if file_format in ("jsonl", "json"):
        return _jsonl(path, text)
    if file_format == "conll":
        return _conll(path, text)
    raise UserError(
        f"{path}: unknown suffix {path.suffix!r}; give the task a format: tsv, csv, jsonl, conll"
    )


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a file of examples; check --data and `splits`"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8; "
            "try: iconv -f latin1 -t utf-8"
        ) from None


def _table(path: Path, lines: Lines, task: Task, split: str) -> Iterator[Row]:
    """Rows of a table; the first line has the names of the columns unless the task gives them."""
    columns = task.columns.get(split)
    short_rows = 0
    for line, cells in lines:
        if columns is None:
            columns = cells if task.header else [str(number) for number in range(len(cells))]
            if task.header:
                continue
        if len(cells) == len(columns):
            yield f"{path}:{line}", dict(zip(columns, cells, strict=True))
        elif len(cells) < len(columns) and split in task.skip_short:
            short_rows += 1
        else:
            raise UserError(
                f"{path}:{line}: found {len(cells)} columns, expected {len(columns)} "
                f"({', '.join(columns)}); look for a missing or an extra separator (a text cannot "
                "hold a tab)"
            )
    if short_rows:
        warnings.warn(f"{path}: {short_rows} rows with too few columns are skipped", stacklevel=2)


def _tsv(text: str) -> Lines:
    """Lines of a TSV. Quotes are literal.

    Only a line feed ends a line, since texts contain other line separators of Unicode.
    """
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        yield number, line.rstrip("\r").split("\t")


def _csv(path: Path, text: str) -> Lines:
    """Rows of a CSV with the number of their first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first_line = 1
    try:
        for cells in reader:
            if cells:
                yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{first_line}: odd quote in the row that begins here ({error}); expected each "
            "quote inside a quoted text to be doubled; correct the row, or use TSV, where quotes "
            "are literal"
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: found {line[:60]!r}; expected one JSON object per line"
            )
        yield f"{path}:{number}", row


def _conll(path: Path, text: str) -> Iterator[Row]:
    """Sentences with the columns `words` and `tags`: the first and the last column of the file.

    One word a line; a blank line or -DOCSTART- ends a sentence.
    """
    sentence: list[list[str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            sentence.append(cells)
        elif sentence:
            where = f"{path}:{number - len(sentence)}"
            if len({len(cells) for cells in sentence}) > 1:
                raise UserError(
                    f"{where}: the lines of a sentence have different numbers of columns; expected "
                    "word tag"
                )
            row: dict[str | int, Any] = {"words": [cells[0] for cells in sentence]}
            if len(sentence[0]) > 1:
                row["tags"] = [cells[-1] for cells in sentence]
            yield where, row
            sentence = []


def _dataset(task: Task, dataset: str, split: str) -> Iterator[Row]:
    """Rows of a dataset of the Hugging Face hub, or of a folder that `datasets` reads.

    Class numbers become the names of the dataset's ClassLabel; -1 becomes None.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"task {task.name} reads a dataset: pip install 'electra_ds[hf]', or give files"
        ) from None
    local = Path(task.folder, dataset)
    part = task.splits[split]
    source = f"dataset {dataset}, split {part}"
    name = str(local) if local.exists() else dataset
    try:
        table = datasets.load_dataset(name, task.dataset_config, split=part)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {error}") from None
    feature = table.features.get(task.label)
    # Names of a ClassLabel, or of the ClassLabel inside a sequence.
    names = getattr(getattr(feature, "feature", feature), "names", None)
    for number, row in enumerate(table):
        label = row.get(task.label)
        if names and label is not None:
            row = row | {task.label: _label_names(names, label)}
        yield f"{source}, row {number}", row


def _label_names(names: list[str], label: int | list[int]) -> str | list[str] | None:
    if isinstance(label, list):
        return [names[tag] for tag in label]
    return names[label] if label >= 0 else None
