"""Markers of finished work, with which an interrupted `prepare` resumes.

A marker is a JSON file that is written after the files that it names. The marker of a folder
contains the settings of its content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.json_files import (
    MAX_VALUES_OF_DATA,
    Record,
    read_json,
    read_record,
    write_json,
)
from electra_ds.data.shard_format import Count, Sha256, ShardInfo

_SHOWN = 90  # characters of a value in a message


class Marker(Record):
    """The content of a marker. A subclass adds the results of the work."""

    plan_sha256: Sha256  # of all settings that determine the files
    files: dict[str, Sha256]  # name relative to the marker -> digest


class UnitMarker(Marker):
    """The results of a tokenized unit."""

    removed: dict[str, Count]
    lines: Count
    documents: Count
    tokens: Count
    bad_lines: dict[str, Count]
    places: tuple[str, ...]


class ShardMarker(Marker):
    """The results of a packed shard."""

    documents: Count
    tokens: Count
    pieces: Count
    pad: Count
    shard: ShardInfo


def finished(
    marker: Path, plan_sha256: str, files: Iterable[Path], kind: type[Marker]
) -> dict | None:
    """Return a marker's content if the work is finished, else None.

    files: the files that the work writes
    kind:  the type of the marker
    The work is finished when the marker is valid and has this `plan_sha256`, names exactly `files`,
    and every file has the recorded sha256. A damaged marker, or one of an older version, counts as
    unfinished, so the work is done again.
    """
    if not marker.exists():
        return None
    try:
        found = read_record(marker, kind, "a marker of finished work")
    except UserError:
        return None
    paths = {os.path.relpath(path, marker.parent): path for path in files}
    if found.plan_sha256 != plan_sha256 or found.files.keys() != paths.keys():
        return None
    whole = all(
        path.is_file() and sha256_file(path) == found.files[name] for name, path in paths.items()
    )
    return found.model_dump(mode="json") if whole else None


def claim_folder(
    marker: Path, wanted: dict[str, Any], fixed: dict[str, Any], units: Path, locked: bool = False
) -> None:
    """Write the marker of a new folder, or compare an existing marker with the wanted settings.

    marker: file in the folder with its settings
    wanted: all settings of this call
    fixed:  the part of `wanted` that is written to a new folder. The caller writes the other
            settings later; they may change until then.
    units:  folder of the tokenized units
    locked: whether the caller holds the lock of the folder
    Different settings are replaced if the folder has no shard and no finished unit has a document,
    as after an attempt that ended at an unreadable input or a wrong --text-field. That attempt may
    still be active, so only a call with `locked` replaces them; other calls accept them.
    Raises UserError when the folder has files but no marker, and when settings differ.
    """
    folder = marker.parent
    if not marker.exists():
        others = sorted(path.name for path in folder.glob("[!.]*"))
        # Another `prepare` may have written the marker meanwhile; then the settings are compared.
        if others and not marker.exists():
            raise UserError(
                f"{folder}: found {others[0]} but no {marker.name}, so `prepare` did not make it; "
                "expected a new or empty folder"
            )
        if not others:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, fixed)
            return
    what = "the settings of an earlier `prepare`"
    stored = read_json(marker, what, max_values=MAX_VALUES_OF_DATA)
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differences = [
        f"{key}: {_difference(stored.get(key), wanted.get(key))}"
        for key in sorted({*stored, *fixed})
        if stored.get(key) != wanted.get(key)
    ]
    if not differences:
        return
    has_shards = any((folder / "shards").glob("*.tar"))
    if has_shards or (folder / "manifest.json").exists() or _has_documents(units):
        raise UserError(
            f"{folder} holds other data ({'; '.join(differences)}); choose another folder or "
            "remove this one"
        )
    if locked:
        write_json(marker, fixed)


def _has_documents(units: Path) -> bool:
    """Whether a finished unit in a folder has a document. A damaged marker counts as one that has."""
    for marker in units.glob("unit-*.json"):
        try:
            if read_record(marker, UnitMarker, "a marker of finished work").documents:
                return True
        except UserError:
            return True
    return False


def _difference(stored: Any, wanted: Any) -> str:
    """Describe two different values. Of two lists, only the first different entry is shown."""
    if isinstance(stored, list) and isinstance(wanted, list):
        pairs = zip_longest(stored, wanted)
        stored, wanted = next(pair for pair in pairs if pair[0] != pair[1])
    return f"found {_shorten(stored)}, expected {_shorten(wanted)}"


def _shorten(value: Any) -> str:
    """Return a value as JSON, truncated if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < _SHOWN + 10 else f"{text[:_SHOWN]}..."
