"""Which files are the input, and how is it cut into units of work?

The plan depends on names (relative to the input root), sizes and first bytes only, never on the machine, the order of
the arguments or the number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from braceexpand import braceexpand

from data_tools.formats.corpus import BUILTIN, Source, detect_format
from data_tools.inputs import docstring_corpus
from data_tools.inputs.hub import DATASET, find_shards
from data_tools.inputs.streams import COMPRESSED, HEAD, content_of, fingerprint, open_input
from electra_ds.common.errors import UserError

Unit = tuple[
    tuple[int, int, int], ...
]  # (file, start, end) in bytes; more than one for small files
UNIT_BYTES = 32 << 20
FORMATS = ("auto", "text", "text_file", "wikitext", "wiki", "jsonl", "webdataset", "tfrecord")
CARDS = {
    "README.md",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}  # of a folder


@dataclass(frozen=True)
class Plan:
    """The input files and the units they are cut into."""

    sources: tuple[Source, ...]
    units: tuple[Unit, ...]

    def identity(self) -> dict:
        """What the plan means, as JSON values, without a path of this machine."""
        return {
            "files": [[s.name, s.size, s.format, s.digest] for s in self.sources],
            "units": self.units,
        }


def unit_size(unit: Unit) -> int:
    """Bytes on disk of one unit."""
    return sum(end - start for _, start, end in unit)


def plan_hash(value: object) -> str:
    """Fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_plan(inputs: Sequence[str], *, format: str = "auto", unit_bytes: int = UNIT_BYTES) -> Plan:
    """Find the files behind paths, folders, globs, braces, URLs, datasets and builtin:docs, and cut them.

    UserError: nothing there, or it cannot be read.
    """
    if format not in FORMATS:
        raise UserError(f"format = {format!r}; expected one of {', '.join(FORMATS)}")
    datasets = {given for given in inputs if given.startswith(DATASET)}
    files = {f for given in {*inputs} - datasets - {BUILTIN} for f in _expand(given)}
    files = sorted(files, key=lambda f: f.split("/"))
    folders = [os.path.dirname(file) for file in files if "://" not in file]
    root = os.path.commonpath(folders) if folders else ""
    sources = [_source(file, root, format) for file in files]
    for shards in sorted(
        {_shards(given) for given in datasets},
        key=lambda shards: (shards[0].name, shards[0].digest),
    ):
        sources += shards
    if BUILTIN in inputs:
        sources.append(_docs_source())
    if not sources:
        raise UserError("no input; give files, folders, globs, URLs, dataset:NAME or builtin:docs")
    if not any(source.size for source in sources):
        raise UserError(f"{', '.join(inputs)}: all {len(sources)} input files are empty")
    return Plan(tuple(sources), tuple(_cut(sources, unit_bytes)))


@contextmanager
def readable(name: str, extra: str = "remote") -> Iterator[None]:
    """What is inside reads from `name`, whose file system may have errors of its own; `extra` installs it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        install = f"; pip install 'electra_ds[{extra}]'" if isinstance(error, ImportError) else ""
        found = (
            error.__cause__ or error
        )  # fsspec's http says only that there is no file, whatever went wrong
        raise UserError(
            f"{name}: cannot be read ({type(found).__name__}: {found}){install}"
        ) from error


def _expand(given: str) -> list[str]:
    """The real paths, or URLs, of the files that one argument names."""
    given = given.removeprefix("file://")
    with readable(given):
        if not os.path.exists(given) and len(names := list(braceexpand(given, escape=False))) > 1:
            return [file for name in names for file in _expand(name)]
        if "://" in given:
            found = _remote(given)
        else:
            path = os.path.expanduser(given)
            there = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
            found = [file for one in there for file in _local(one)]
    if not found:
        raise UserError(
            f"{given}: no such file, and no file matches it; expected text, WikiText, WikiExtractor, "
            f"JSONL, parquet, arrow or tars of text (also {' '.join(COMPRESSED)}), folders, globs, "
            f"{{00..09}} or URLs of them, {DATASET}NAME or {BUILTIN}"
        )
    return found


def _local(path: str, above: tuple[str, ...] = ()) -> list[str]:
    """The real paths of a file, or of the files that count as input in a folder; links are followed, once."""
    real = os.path.realpath(path)
    if os.path.isfile(real):
        return [real]
    if not os.path.isdir(real):
        raise UserError(
            f"{path}: neither a file nor a folder, or a link to nothing; expected text; remove it"
        )
    names = [name for name in os.listdir(real) if _is_data(name)] if real not in above else []
    return [file for name in names for file in _local(os.path.join(real, name), (*above, real))]


def _remote(given: str) -> list[str]:
    """The URLs of the files that a URL means: a folder ends with a slash, `*` makes a glob."""
    import fsspec

    system, path = fsspec.core.url_to_fs(given)
    if given.endswith("/"):
        there = {path.rstrip("/"): {"type": "directory"}}
    elif "*" in given:
        there = system.glob(path, detail=True)
    else:
        return [given]
    found = []
    for one, info in there.items():
        if info["type"] == "directory":
            found += [f for f in system.find(one) if _is_data(f.removeprefix(f"{one}/"))]
        else:
            found.append(one)
    return [system.unstrip_protocol(f) for f in found]


def _is_data(name: str) -> bool:
    """Does a file of a folder, given by its name there, count as input?"""
    return "/." not in f"/{name}" and os.path.basename(name) not in CARDS


def _source(file: str, root: str, format: str) -> Source:
    url = re.sub(
        "//[^/]*@", "//", file.partition("?")[0]
    )  # passwords and signatures stay out of the name
    name = url if "://" in file else os.path.relpath(file, root)
    with readable(name), open_input(file) as raw:
        size, digest = fingerprint(raw)
        head = content_of(raw, name).read(HEAD)
        found = detect_format(name, head, format) if size else "text"
    return Source(name, file, size, found, digest)


def _shards(given: str) -> tuple[Source, ...]:
    with readable(given, "hf"):
        return tuple(Source(*shard) for shard in find_shards(given))


def _docs_source() -> Source:
    files = [(name, path.stat().st_size) for name, path in docstring_corpus.source_files()]
    return Source(BUILTIN, BUILTIN, sum(size for _, size in files), "docs", plan_hash(files)[:16])


def _cut(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """Big files in byte ranges, a stream (compressed, tar, arrow) whole, neighbouring small files together."""
    units: list[Unit] = []
    small: list[tuple[int, int, int]] = []
    held = 0  # bytes of the small ones
    for number, source in enumerate(sources):
        alone = source.is_stream or source.size > unit_bytes
        if small and (alone or held + source.size > unit_bytes):
            units.append(tuple(small))
            small, held = [], 0
        if alone:
            step = (
                max(1, source.size)
                if source.is_stream or source.format == "text_file"
                else unit_bytes
            )
            units += [
                ((number, at, min(at + step, source.size)),) for at in range(0, source.size, step)
            ]
        elif source.size:
            small.append((number, 0, source.size))
            held += source.size
    return [*units, tuple(small)] if small else units
