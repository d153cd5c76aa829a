"""Which files are the input, and how is it cut into units of work?

The plan depends on names (relative to the input root), sizes and first bytes only, never on the machine, the order of
the arguments or the number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools import docs
from data_tools.corpus import BUILTIN, COMPRESSED, Source, detect_format
from electra_ds.errors import UserError

Unit = tuple[tuple[int, int, int], ...]  # (file, start, end) in bytes; more than one for small files
UNIT_BYTES = 32 << 20
FORMATS = ("auto", "text", "text_file", "wiki", "jsonl")


@dataclass(frozen=True)
class Plan:
    """The input files and the units they are cut into."""

    sources: tuple[Source, ...]
    units: tuple[Unit, ...]

    def identity(self) -> dict:
        """What the plan means, as JSON values, without a path of this machine."""
        return {"files": [[s.name, s.size, s.format, s.digest] for s in self.sources], "units": self.units}


def unit_size(unit: Unit) -> int:
    """Bytes on disk of one unit."""
    return sum(end - start for _, start, end in unit)


def plan_hash(value: object) -> str:
    """Fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_plan(inputs: Sequence[str], *, format: str = "auto", unit_bytes: int = UNIT_BYTES) -> Plan:
    """Find the files behind paths, folders, globs and builtin:docs, and cut them. UserError: nothing there."""
    if format not in FORMATS:
        raise UserError(f"format = {format!r}; expected one of {', '.join(FORMATS)}")
    files = sorted({file for given in inputs if given != BUILTIN for file in _expand(given)})
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    sources = [_source(file, root, format) for file in files]
    if BUILTIN in inputs:
        sources.append(_docs_source())
    if not sources:
        raise UserError("no input; give files, folders, globs or builtin:docs")
    if not any(source.size for source in sources):
        raise UserError(f"{', '.join(inputs)}: all {len(sources)} input files are empty")
    return Plan(tuple(sources), tuple(_cut(sources, unit_bytes)))


def _expand(given: str) -> list[Path]:
    """The real paths of the files that one argument names."""
    path = Path(given).expanduser()
    if path.is_dir():
        found = [f for f in path.rglob("*") if f.is_file() and "/." not in f"/{f.relative_to(path).as_posix()}"]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if os.path.isfile(f)]
    if not found:
        raise UserError(f"{given}: no such file, and no file matches it; expected text, WikiExtractor or JSONL files "
                        f"(also {' '.join(COMPRESSED)}), folders or globs of them, or {BUILTIN}")
    return [f.resolve() for f in found]


def _source(file: Path, root: str, format: str) -> Source:
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(1 << 16)).hexdigest()[:16]
    size = file.stat().st_size
    found = detect_format(str(file)) if format == "auto" and size else "text" if format == "auto" else format
    return Source(os.path.relpath(file, root), str(file), size, found, digest)


def _docs_source() -> Source:
    files = [(name, path.stat().st_size) for name, path in docs.source_files()]
    return Source(BUILTIN, BUILTIN, sum(size for _, size in files), "docs", plan_hash(files)[:16])


def _cut(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """Big plain files in byte ranges, a compressed file whole, neighbouring small files together."""
    units: list[Unit] = []
    small: list[tuple[int, int, int]] = []
    held = 0  # bytes of the small ones
    for number, source in enumerate(sources):
        whole = source.format == "docs" or Path(source.name).suffix in COMPRESSED
        alone = whole or source.size > unit_bytes
        if small and (alone or held + source.size > unit_bytes):
            units.append(tuple(small))
            small, held = [], 0
        if alone:
            step = max(1, source.size) if whole or source.format == "text_file" else unit_bytes
            units += [((number, at, min(at + step, source.size)),) for at in range(0, source.size, step)]
        elif source.size:
            small.append((number, 0, source.size))
            held += source.size
    return [*units, tuple(small)] if small else units
