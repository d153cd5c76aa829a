"""Plan of an input: its files, and the units of work that they are divided into.

The plan depends only on names (relative to the input root), sizes and first bytes of the files. The
machine, the order of the arguments and the number of processes do not change it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.formats.detect import detect_format
from data_tools.formats.source import Source, as_text
from data_tools.inputs import docstring_corpus
from data_tools.inputs.braces import expand_braces
from data_tools.inputs.docstring_corpus import BUILTIN
from data_tools.inputs.hub import DATASET, find_shards
from data_tools.inputs.matching import RemoteFolders, local_matches
from data_tools.inputs.streams import HEAD, fingerprint, open_input
from electra_ds.common.decompression import COMPRESSED, content_of
from electra_ds.common.errors import UserError
from electra_ds.common.files import is_lfs_pointer
from electra_ds.common.printable import printable, shortened
from electra_ds.common.redaction import redacted
from electra_ds.common.suggestions import other_form_of_file
from electra_ds.common.urls import file_system, is_url
from electra_ds.data.tokenizer import VOCABULARY_FILES

Segment = tuple[int, int, int]  # (file, start, end) in bytes
Unit = tuple[Segment, ...]  # several segments where files are small
UNIT_BYTES = 32 << 20
FORMATS = ("auto", "text", "text_file", "wikitext", "wiki", "jsonl", "webdataset", "tfrecord")
TEXT_FIELD = "text"  # the default of --text-field
WITHOUT_FIELDS = {"text", "text_file", "wikitext", "wiki", "docs"}  # formats
# Files beside the data of a folder that hold no documents.
METADATA_FILES = {
    "README.md",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}
# Files of folders that `prepare` and `train-tokenizer` wrote; these are no inputs.
OUTPUT_MARKS = (
    ("prepare.json",),
    ("manifest.json", "unigrams.npy"),
    ("plan.json", "unit-000000.json"),
    ("options.json", "vocab.txt"),
    ("options.json", "spm.model"),
    ("options.json", "tokenizer.json"),
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "options.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Plan:
    """The input files and the units that they are divided into."""

    sources: tuple[Source, ...]
    units: tuple[Unit, ...]

    def identity(self) -> dict:
        """Return the plan as JSON values, without paths of this machine."""
        return {
            "files": [[s.name, s.size, s.format, s.digest] for s in self.sources],
            "units": self.units,
        }


def unit_size(unit: Unit) -> int:
    """Return the bytes on disk of one unit."""
    return sum(end - start for _, start, end in unit)


def plan_hash(value: object) -> str:
    """Return a fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_plan(
    inputs: Sequence[str],
    *,
    format: str = "auto",
    text_field: str = TEXT_FIELD,
    unit_bytes: int = UNIT_BYTES,
    outputs: Sequence[str | Path] = (),
    vocabulary: Path | None = None,
) -> Plan:
    """Find the files of the inputs and divide them into units.

    inputs:  files, folders, globs, brace patterns, URLs, dataset:NAME, builtin:docs
    text_field: UserError for another one than TEXT_FIELD if no input has fields or columns
    outputs: folders of this command. They are left out where they lie in an input folder; so are
             data folders and tokenizers of earlier commands.
    vocabulary: file or folder of the tokenizer, which is left out in the same way
    Raises UserError when a file is missing or cannot be read, and for an input inside of `outputs`.
    """
    if format not in FORMATS:
        raise UserError(f"format = {format!r}; expected one of {', '.join(FORMATS)}")
    datasets = {given for given in inputs if given.startswith(DATASET)}
    left_out = LeftOut(outputs, vocabulary)
    files_of = ({*inputs} - datasets) - {BUILTIN}
    names = {file for given in files_of for file in _expand(given, left_out)}
    files = sorted(names, key=lambda file: file.split("/"))
    folders = [os.path.dirname(file) for file in files if not is_url(file)]
    root = os.path.commonpath(folders) if folders else ""
    sources = [_file_source(file, root, format) for file in files]
    for shards in sorted({_dataset_sources(given) for given in datasets}, key=_first_shard):
        sources += shards
    if BUILTIN in inputs:
        sources.append(_docs_source())
    if not sources:
        raise UserError("no input; give files, folders, globs, URLs, dataset:NAME or builtin:docs")
    if not any(source.size for source in sources):
        raise UserError(
            f"{printable(redacted(', '.join(inputs)))}: all {len(sources)} input files are empty"
        )
    formats = {source.format for source in sources}
    if text_field != TEXT_FIELD and formats <= WITHOUT_FIELDS:
        raise UserError(
            f"--text-field {shortened(text_field)}: the inputs are read as "
            f"{', '.join(sorted(formats))}, which has no fields; leave --text-field out, or set "
            "--format jsonl if the inputs are JSONL"
        )
    return Plan(tuple(sources), tuple(_divide(sources, unit_bytes)))


class LeftOut:
    """Files and folders that are no inputs though they lie in an input folder."""

    def __init__(self, outputs: Sequence[str | Path], vocabulary: Path | None) -> None:
        self.outputs = [os.path.realpath(path) for path in outputs]
        self.files: set[str] = set()
        if vocabulary is not None:
            is_folder = vocabulary.is_dir()
            paths = [vocabulary / name for name in TOKENIZER_FILES] if is_folder else [vocabulary]
            self.files = {os.path.realpath(path) for path in paths}

    def has(self, path: str) -> bool:
        """Whether a path below an input folder is left out."""
        real = os.path.realpath(path)
        is_marked = os.path.isdir(real) and any(
            all(os.path.isfile(os.path.join(path, mark)) for mark in marks)
            for marks in OUTPUT_MARKS
        )
        return is_marked or real in self.files or self._is_in_output(real)

    def check(self, path: str) -> None:
        """Raise UserError when an input that the user names lies in a folder of the output."""
        if self._is_in_output(os.path.realpath(path)):
            raise UserError(
                f"{printable(path)}: this input lies in the folder of the output; give another "
                "input, or another --out"
            )

    def _is_in_output(self, real: str) -> bool:
        return any(real == folder or real.startswith(f"{folder}/") for folder in self.outputs)


@contextmanager
def readable(name: str, extra: str = "remote") -> Iterator[None]:
    """Turn the errors of reading from `name` into UserError.

    extra: the extra of electra_ds (`pip install 'electra_ds[...]'`) with the library that it needs
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system raises its own types
        install = f"; pip install 'electra_ds[{extra}]'" if isinstance(error, ImportError) else ""
        # fsspec's http file system raises FileNotFoundError for every error, with the true cause.
        cause = error.__cause__ or error
        reason = printable(redacted(f"{type(cause).__name__}: {cause}"))
        raise UserError(
            f"{printable(redacted(name))}: cannot be read ({reason}){install}"
        ) from error


def _expand(given: str, left_out: LeftOut) -> list[str]:
    """Return the real paths, or the URLs, of the files that one argument names."""
    given = given.removeprefix("file://")
    with readable(given):
        if not os.path.exists(given):
            names = expand_braces(given)
            if len(names) > 1:
                return [file for name in names for file in _expand(name, left_out)]
        if is_url(given):
            system, path = file_system(given)
            files = [given]
            if given.endswith("/") or "*" in given:
                inside = RemoteFolders(system).files(path, is_folder=given.endswith("/"))
                files = [system.unstrip_protocol(file) for file, name in inside if _is_input(name)]
        else:
            path = os.path.expanduser(given)
            if _is_there(path):
                left_out.check(path)
                matches = [path]
            else:
                matches = _glob(path, left_out)
            files = _local_files(matches, left_out)
    if not files and os.path.isdir(os.path.expanduser(given)):
        raise UserError(
            f"{printable(given)}: no input file in this folder; files of outputs, hidden files and "
            f"{', '.join(sorted(METADATA_FILES))} are not read"
        )
    if not files:
        raise UserError(
            f"{printable(redacted(given))}: no such file, and no file matches it; expected text, "
            "WikiText, WikiExtractor, JSONL, parquet, arrow or tars of text (also "
            f"{' '.join(COMPRESSED)}), folders, globs, {{00..09}} or URLs of them, "
            f"{DATASET}NAME or {BUILTIN}{other_form_of_file(given)}"
        )
    return files


def _is_there(path: str) -> bool:
    """Whether a path exists, also as a link to nothing. OSError when its folder cannot be read."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # a pattern may be long
            return False
        raise
    return True


def _glob(pattern: str, left_out: LeftOut) -> list[str]:
    """Return the files and folders that a pattern matches, without those in output folders."""
    fixed = re.split("[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    known: dict[str, bool] = {fixed: False, "": False, "/": False}

    def is_left_out(path: str) -> bool:
        if path not in known:
            known[path] = is_left_out(os.path.dirname(path)) or left_out.has(path)
        return known[path]

    return [match for match in local_matches(pattern) if not is_left_out(match)]


def _local_files(paths: Sequence[str], left_out: LeftOut) -> list[str]:
    """Return the real paths of the input files among files and in folders.

    Links are followed; each folder is searched once.
    """
    files = []
    searched = set()
    left = list(paths)
    while left:
        path = left.pop()
        real = os.path.realpath(path)
        if os.path.isfile(real):
            files.append(real)
        elif not os.path.isdir(real):
            raise UserError(
                f"{printable(path)}: neither a file nor a folder, or a link to nothing; expected a "
                "file; remove it"
            )
        elif real not in searched:
            searched.add(real)
            inside = [os.path.join(real, name) for name in os.listdir(real) if _is_input(name)]
            left += [path for path in inside if not left_out.has(path)]
    return files


def _is_input(name: str) -> bool:
    """Whether a file of a folder is an input. `name` is its path below the folder."""
    return "/." not in f"/{name}" and os.path.basename(name) not in METADATA_FILES


def _file_source(file: str, root: str, format: str) -> Source:
    """Return the source of one file."""
    if is_url(file):  # without passwords and signatures
        name = printable(redacted(file.partition("?")[0]).replace("***@", ""))
    else:
        name = as_text(os.path.relpath(file, root))
    with readable(name), open_input(file) as raw:
        size, digest = fingerprint(raw)
        if is_lfs_pointer(raw.peek(HEAD)):
            raise UserError(
                f"{name}: a Git LFS pointer, not the file itself; run `git lfs pull` where it lies"
            )
        head = content_of(raw, name).read(HEAD)
        detected = detect_format(name, head, format) if size else "text"
    return Source(name, file, size, detected, digest)


def _dataset_sources(given: str) -> tuple[Source, ...]:
    """Return the sources of a Hugging Face dataset, one per shard."""
    with readable(given, "hf"):
        return tuple(Source(*shard) for shard in find_shards(given))


def _first_shard(shards: tuple[Source, ...]) -> tuple[str, str]:
    """Sort key of a dataset."""
    return shards[0].name, shards[0].digest


def _docs_source() -> Source:
    """Return the source of builtin:docs."""
    files = [(name, path.stat().st_size) for name, path in docstring_corpus.source_files()]
    return Source(BUILTIN, BUILTIN, sum(size for _, size in files), "docs", plan_hash(files)[:16])


def _divide(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """Divide files into units.

    A large file becomes byte ranges. A stream (compressed, tar, arrow) is one unit. Consecutive
    small files share a unit.
    """
    units: list[Unit] = []
    shared: list[Segment] = []
    shared_bytes = 0
    for number, source in enumerate(sources):
        alone = source.is_stream or source.size > unit_bytes
        if shared and (alone or shared_bytes + source.size > unit_bytes):
            units.append(tuple(shared))
            shared = []
            shared_bytes = 0
        if alone:
            indivisible = source.is_stream or source.format == "text_file"
            step = max(1, source.size) if indivisible else unit_bytes
            for start in range(0, source.size, step):
                units.append(((number, start, min(start + step, source.size)),))
        elif source.size:
            shared.append((number, 0, source.size))
            shared_bytes += source.size
    if shared:
        units.append(tuple(shared))
    return units
