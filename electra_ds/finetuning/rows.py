"""Rows of example files: TSV, CSV, JSONL and CoNLL.

A row that cannot be read raises a UserError that names file and line.
"""

from __future__ import annotations

import csv
import io
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.common.encodings import CONVERT, HEAD, wide_encoding
from electra_ds.common.errors import UserError
from electra_ds.common.files import is_lfs_pointer, open_regular
from electra_ds.common.json_files import parse_strictly
from electra_ds.common.printable import shortened
from electra_ds.common.suggestions import other_form_of_file
from electra_ds.finetuning.superglue_rows import SHAPES, superglue_rows

if TYPE_CHECKING:
    from electra_ds.finetuning.tasks import Task

Row = tuple[str, dict[str | int, Any]]  # (location for messages, values by column)
Lines = Iterator[tuple[int, list[str]]]  # (line number from 1, cells)
# First bytes of files that are not text -> what the user can do.
BINARY = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it",
    b"BZh": "it is compressed with bzip2; unpack it",
    b"\xfd7zXZ": "it is compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it",
    b"PK\x03\x04": "it is a zip or a spreadsheet; save it as TSV, CSV or JSONL",
    b"PAR1": "it is Parquet; give its folder as `dataset` of the task, or convert it to JSONL",
}

# Separators of tables in files of another format -> what the user can do.
OTHER_SEPARATORS = {
    "\t": 'name the file .tsv, or give the task "format": "tsv"',
    ";": "save the file with commas (some spreadsheets write ; by default) or as TSV",
    ",": 'name the file .csv, or give the task "format": "csv"',
    "|": "save the file as TSV or CSV",
}


def file_rows(task: Task, split: str) -> Iterator[Row]:
    """Yield the rows of the file of a split.

    Raises UserError for an unknown format, a file that cannot be read, a row that cannot be read,
    and a file without rows.
    """
    path = task.path(split)
    rows = _rows_of_text(path, _read(path), task, split)
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise UserError(
            f"{path}: contains no example; expected at least one line after the header; "
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
    if file_format in SHAPES:
        return superglue_rows(_jsonl(path, text), file_format, split)
    raise UserError(
        f"{path}: unknown suffix {path.suffix!r}; expected .tsv, .csv, .jsonl, .json (one object per line) "
        "or .conll; or give the task a format: tsv, csv, jsonl, conll"
    )


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: {reason}; expected a file of examples; check --data and `splits`"
            f"{other_form_of_file(path)}"
        ) from None
    if is_lfs_pointer(data):
        raise UserError(f"{path}: is a Git LFS pointer, not the file; run: git lfs pull")
    for start, advice in BINARY.items():
        if data.startswith(start):
            raise UserError(f"{path}: expected text in UTF-8, but {advice}")
    if encoding := wide_encoding(data[:HEAD]):
        raise UserError(
            f"{path}: expected text in UTF-8, but it is {encoding}; try: iconv -f {encoding} "
            "-t utf-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8; {CONVERT}"
        ) from None


def _table(path: Path, lines: Lines, task: Task, split: str) -> Iterator[Row]:
    """Yield the rows of a table. The first line has the column names unless the task gives them."""
    columns = task.columns.get(split)
    short_rows = 0
    for line, cells in lines:
        if columns is None:
            columns = _distinct(path, cells, task)
            _check_separator(path, columns, task)
            if task.header:
                continue
        if len(cells) == len(columns):
            yield f"{path}:{line}", dict(zip(columns, cells, strict=True))
        elif len(cells) < len(columns) and split in task.skip_short:
            short_rows += 1
        else:
            raise UserError(
                f"{path}:{line}: found {len(cells)} columns, expected {len(columns)} "
                f"({', '.join(columns)}); look for a missing or an extra separator (a text "
                "cannot contain a tab)"
            )
    if short_rows:
        warnings.warn(f"{path}: {short_rows} rows with too few columns are skipped", stacklevel=2)


def _check_separator(path: Path, columns: list[str], task: Task) -> None:
    """Raise UserError if the header looks separated by another character than the format's."""
    if len(columns) > 1 or not task.header:
        return
    expected = "a tab" if (task.format or path.suffix.lstrip(".")) == "tsv" else "','"
    for found, advice in OTHER_SEPARATORS.items():
        if found in columns[0]:
            raise UserError(
                f"{path}:1: found one column, {shortened(columns[0])}; expected columns separated "
                f"by {expected}; the line looks separated by {found!r}; {advice}"
            )


def _distinct(path: Path, cells: list[str], task: Task) -> list[str]:
    """Return distinct names for the columns of a table. cells: the first line.

    Raises UserError if the task reads a column with a repeated name.
    """
    if not task.header:
        return [str(number) for number in range(len(cells))]
    repeated = {name for name, count in Counter(cells).items() if count > 1}
    read = {task.text_a, task.text_b, task.label, task.index, *task.choice_columns}
    if both := sorted(repeated & {name for name in read if isinstance(name, str)}):
        raise UserError(
            f"{path}:1: several columns are named {both[0]!r}; expected one; rename the others, or "
            "give the number of the column in the task"
        )
    return [f"{name} ({number})" if name in repeated else name for number, name in enumerate(cells)]


def _tsv(text: str) -> Lines:
    """Yield the lines of a TSV file, without blank lines at its end. Quotes are literal.

    Only a line feed ends a line, because texts may contain other line separators of Unicode.
    """
    lines = text.split("\n")
    while lines and not lines[-1].strip(" \r"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.rstrip("\r").split("\t")


def _csv(path: Path, text: str) -> Lines:
    """Yield the rows of a CSV file, each with the number of its first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default is 131,072 characters
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
    """Yield the rows of a JSONL file. Blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_strictly(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: found {shortened(line, 60)} ({error}); {_one_object(line)}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {shortened(line, 60)}; {_one_object(line)}")
        yield f"{path}:{number}", row


def _one_object(line: str) -> str:
    """Describe what a line of JSONL has to be. line: a line that is none, perhaps of an array."""
    expected = "expected one JSON object per line"
    is_array = line.lstrip().startswith("[")
    return f"{expected}; convert an array: jq -c '.[]' FILE > x.jsonl" if is_array else expected


def _conll(path: Path, text: str) -> Iterator[Row]:
    """Yield the sentences of a CoNLL file: `words` (first column) and `tags` (last column).

    A line contains one word. A blank line or -DOCSTART- ends a sentence. Columns are separated by
    tabs, or by spaces in lines without tabs. Other white space, such as a no-break space, is part
    of a word. Without a second column, rows have no `tags`.
    """
    sentence: list[list[str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        parts = line.strip(" \t\r").split("\t" if "\t" in line.strip(" \t\r") else " ")
        cells = [cell.strip(" ") for cell in parts if cell.strip(" ")]
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
