"""The folder of a built-in task in --data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable


def plain_name(name: str) -> str:
    """Return the letters a to z, in lower case, and the digits of a name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def task_folder(
    name: str, spellings: Iterable[str], files: Iterable[str], data: Path | None
) -> Path:
    """Return the folder of a task in `data`, or `data` if it holds one of the task's files.

    name: of the task, for messages. spellings: names of its folder as `plain_name` returns them.
    """
    spellings, files = list(spellings), list(files)
    expected = f"the folder that contains {spellings[0]}/, or the folder with {files[0]}"
    if data is None:
        raise UserError(f"task {name}: give --data DIR, {expected}")
    if not data.is_dir():
        raise UserError(f"task {name}: --data {data} is not a folder; expected {expected}")
    folders = sorted(child for child in data.iterdir() if child.is_dir())
    if matching := [folder for folder in folders if plain_name(folder.name) in spellings]:
        return matching[0]
    if any((data / file).is_file() for file in files):
        return data
    listed = ", ".join(printable(folder.name) for folder in folders[:20]) or "no folder"
    raise UserError(
        f"task {name}: {data} has no folder {spellings[0]} (in any spelling); found {listed}; give "
        f"--data {expected}"
    )
