"""Markers of finished work, from which an interrupted `prepare` resumes.

A marker is a JSON file that is written after the files it names. A folder is marked with the
settings of its content.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.json_files import read_json, write_json

_SHOWN = 90  # characters of a value in a message


def finished(marker: Path, plan_sha256: str) -> dict | None:
    """Return a marker's content if the work is finished, else None.

    The work is finished when the marker has this `plan_sha256`, and all `files` {name relative to
    the marker: sha256} exist with these digests.
    """
    if not marker.exists():
        return None
    content = read_json(marker, "a marker of finished work")
    if content["plan_sha256"] != plan_sha256:
        return None
    if "files" not in content:  # a marker of an older version
        return None
    files = {marker.parent / name: digest for name, digest in content["files"].items()}
    whole = all(file.is_file() and sha256_file(file) == digest for file, digest in files.items())
    return content if whole else None


def claim_folder(marker: Path, wanted: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Mark a new folder with settings, or check that its marker agrees with the wanted settings.

    marker: file in the folder that holds its settings
    wanted: all settings of this call
    fixed:  the part of `wanted` that is written into a new folder; the caller writes the other
            settings later, and until then they may change
    Raises UserError when the folder has files but no marker, and when settings differ.
    """
    folder = marker.parent
    if not marker.exists():
        if others := sorted(path.name for path in folder.glob("[!.]*")):
            raise UserError(
                f"{folder}: holds {others[0]} but no {marker.name}, so `prepare` did not make it; "
                "give a new or empty folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, fixed)
        return
    stored = read_json(marker, "the settings of an earlier `prepare`")
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differences = [
        f"{key}: {_difference(stored.get(key), wanted.get(key))}"
        for key in sorted({*stored, *fixed})
        if stored.get(key) != wanted.get(key)
    ]
    if differences:
        raise UserError(
            f"{folder} holds other data ({'; '.join(differences)}); give another folder or remove "
            "it"
        )


def _difference(stored: Any, wanted: Any) -> str:
    """Describe two different values. Of two lists, only the first different entries are shown."""
    if isinstance(stored, list) and isinstance(wanted, list):
        pairs = zip_longest(stored, wanted)
        stored, wanted = next(pair for pair in pairs if pair[0] != pair[1])
    return f"found {_shorten(stored)}, expected {_shorten(wanted)}"


def _shorten(value: Any) -> str:
    """Return a value as JSON, truncated if it is long."""
    text = json.dumps(value)
    return text if len(text) < _SHOWN + 10 else f"{text[:_SHOWN]}..."
