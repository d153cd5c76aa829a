"""Tokenized units: the documents of one unit of input as token ids on disk.

The files of a unit depend only on the unit, the tokenizer and the settings:

    unit-000003.ids            token ids of the documents, a [SEP] after each line of a document
                               (no text encodes to that id)
    unit-000003.documents.npy  the document table, [D] DOCUMENT
    unit-000003.signatures     with near-duplicates: [D, SLOTS] uint16 in the order of that table
    unit-000003.unknowns       counts of unknown words, as JSON
    unit-000003.json           the marker, written last

Documents are sorted by their shuffle key within runs of about RUN_TOKENS ids. The documents in
any range of keys are therefore contiguous in each run. Dimensions: D documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.formats.documents import documents
from data_tools.formats.source import Source, Tally
from data_tools.inputs.plan import Unit, unit_size
from data_tools.pipeline.clean import clean_lines, signatures, text_hash
from data_tools.pipeline.markers import UnitMarker, finished
from data_tools.pipeline.settings import Settings
from data_tools.pipeline.unknowns import Unknowns
from data_tools.workers import OnProgress
from electra_ds.common.errors import UserError
from electra_ds.common.files import fsync_folder, sha256_file, write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.common.plugins import load_function
from electra_ds.data.shard_format import ids_dtype
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.data.tokenizer.normalization import Form

# Keys of the counts of cleaning, in the order of its steps.
REMOVED = ("control_characters", "repeated_lines", "too_short", "filtered")
BATCH_CHARS = 4 << 20  # characters that are tokenized at a time
RUN_TOKENS = 32 << 20  # ids held in memory at a time
DOCUMENT_TOKENS = 128  # memory of a document's other data (about 350 bytes), counted in ids
KEYS = 1 << 64  # number of possible shuffle keys and halves of hashes
DOCUMENT = np.dtype(
    [
        ("key", "<u8"),  # shuffle key: position in the shuffled corpus
        ("hash", "<u8", 2),  # `text_hash` of the lines
        ("start", "<u8"),  # first id in the ids file
        ("stored", "<u4"),  # number of ids there, line ends included
        ("tokens", "<u4"),  # number of ids without line ends
        ("document", "<u4"),  # number in the unit, in reading order
    ]
)
# Tokenizers of this process by fingerprint, with their caches of words.
tokenizers: dict[str, Tokenizer] = {}


@dataclass(frozen=True)
class UnitTask:
    """A unit, with all settings that determine its files."""

    number: int
    unit: Unit
    sources: tuple[Source, ...]  # file of each byte range of the unit
    folder: str  # of the units
    tokenizer: str  # folder of the tokenizer
    fingerprint: str  # of the tokenizer
    plan_sha256: str
    settings: Settings


class UnitFiles(NamedTuple):
    """The paths of a unit's files."""

    ids: Path
    table: Path
    marker: Path
    signatures: Path
    unknowns: Path


class EncodedDocument(NamedTuple):
    """A cleaned document as token ids."""

    number: int  # in the unit
    hash: tuple[int, int]  # `text_hash` of the lines
    stored: np.ndarray  # ids_dtype, a [SEP] after each line
    tokens: int  # number of ids without line ends
    signature: np.ndarray | None = None  # [SLOTS] uint16, with near-duplicates


def unit_files(folder: str | Path, number: int) -> UnitFiles:
    """Return the paths of a unit's files."""
    stem = Path(folder) / f"unit-{number:06d}"
    suffixes = (".ids", ".documents.npy", ".json", ".signatures", ".unknowns")
    return UnitFiles(*map(stem.with_suffix, suffixes))


def read_table(folder: str | Path, unit: int) -> np.ndarray:
    """Return a unit's document table, [D] DOCUMENT, memory-mapped."""
    table = np.load(unit_files(folder, unit).table, mmap_mode="r", allow_pickle=False)
    assert table.dtype == DOCUMENT
    return table


def key_range(part: int, parts: int) -> tuple[np.uint64, np.uint64]:
    """Return (first, last) number of range `part`, of `parts` equal ranges of 64-bit numbers."""
    return np.uint64(part * KEYS // parts), np.uint64((part + 1) * KEYS // parts - 1)


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the content of an .npy file."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def finished_unit(task: UnitTask) -> dict | None:
    """Return the marker of a unit if its files are finished, else None."""
    files = unit_files(task.folder, task.number)
    return finished(files.marker, task.plan_sha256, _written(task, files), UnitMarker)


def _written(task: UnitTask, files: UnitFiles) -> list[Path]:
    """Return the files that are written for a unit, besides its marker."""
    signatures = [files.signatures] if task.settings.near_duplicates else []
    return [files.ids, *signatures, files.table, files.unknowns]


def tokenize_unit(task: UnitTask, on_progress: OnProgress) -> dict:
    """Write a unit's files unless they are finished; return its marker.

    on_progress: receives the number of input bytes that were read
    Raises UserError when the function `keep` raises an error.
    """
    if marker := finished_unit(task):
        on_progress(unit_size(task.unit))
        return marker
    if task.fingerprint not in tokenizers:
        tokenizers[task.fingerprint] = load_tokenizer(task.tokenizer)
    tokenizer = tokenizers[task.fingerprint]
    tally = Tally()
    unknowns = Unknowns()
    removed = dict.fromkeys(REMOVED, 0)
    with UnitWriter(task) as writer:
        cleaned = _cleaned(task, tokenizer.normalization, tally, removed, on_progress)
        for batch in _batches(cleaned):
            for document in _encode(task, tokenizer, batch, unknowns):
                if document.tokens:
                    writer.add(document)
                else:
                    removed["too_short"] += 1
        return writer.close(removed, tally, unknowns)


CleanDocument = tuple[int, list[str]]  # (number in the unit, lines)


def _cleaned(
    task: UnitTask,
    normalization: Form,
    tally: Tally,
    removed: dict[str, int],
    on_progress: OnProgress,
) -> Iterator[CleanDocument]:
    """Yield the documents that cleaning keeps. Adds the counts of what it removes to `removed`."""
    settings = task.settings
    keep = load_function("keep", settings.keep) if settings.keep else None
    for number, (source, text) in enumerate(_unit_texts(task, tally, on_progress)):
        lines, characters = clean_lines(text, normalization)
        removed["control_characters"] += characters
        if settings.drop_repeated_lines:
            unique = list(dict.fromkeys(lines))
            removed["repeated_lines"] += len(lines) - len(unique)
            lines = unique
        if not lines or sum(map(len, lines)) < settings.min_chars:
            removed["too_short"] += 1
            continue
        try:
            kept = keep is None or keep("\n".join(lines))
        except Exception as error:  # the user's function may raise anything
            raise UserError(
                f"{source.name}: keep = {settings.keep!r} raised {type(error).__name__}: {error}; "
                f"document {number} of unit {task.number} begins with {lines[0][:60]!r}"
            ) from error
        if kept:
            yield number, lines
        else:
            removed["filtered"] += 1


def _unit_texts(
    task: UnitTask, tally: Tally, on_progress: OnProgress
) -> Iterator[tuple[Source, str]]:
    """Yield (file, text) of each document of a unit."""
    for source, (_, start, end) in zip(task.sources, task.unit, strict=True):
        for text in documents(
            source,
            start,
            end,
            text_field=task.settings.text_field,
            tally=tally,
            on_progress=on_progress,
        ):
            yield source, text


def _batches(documents: Iterator[CleanDocument]) -> Iterator[list[CleanDocument]]:
    """Group documents into batches of about BATCH_CHARS characters."""
    batch = []
    size = 0
    for number, lines in documents:
        batch.append((number, lines))
        size += sum(map(len, lines))
        if size >= BATCH_CHARS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _encode(
    task: UnitTask, tokenizer: Tokenizer, batch: list[CleanDocument], unknowns: Unknowns
) -> Iterator[EncodedDocument]:
    """Tokenize a batch of documents; count their unknown words."""
    stored, tokens = _token_ids(tokenizer, [lines for _, lines in batch], unknowns)
    signed: Iterable[np.ndarray | None] = repeat(None, len(batch))
    if task.settings.near_duplicates:
        signed = signatures(tokens)
    for (number, lines), ids, text, signature in zip(batch, stored, tokens, signed, strict=True):
        yield EncodedDocument(number, text_hash(lines), ids, len(text), signature)


def _token_ids(
    tokenizer: Tokenizer, texts: list[list[str]], unknowns: Unknowns
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return, for each document, (ids with a [SEP] after each line, ids without [SEP])."""
    lines = [line for text in texts for line in text]
    ids, lengths = tokenizer.encode_lines(texts)
    unknowns.add(tokenizer, lines, ids, lengths)
    line_ends = np.cumsum(lengths)
    lines_before = np.cumsum([len(text) for text in texts])[:-1]  # at the ends of documents
    dtype = ids_dtype(tokenizer.vocab_size)
    stored = np.insert(ids.astype(dtype), line_ends, tokenizer.special_ids.sep)
    document_ends = line_ends[lines_before - 1]
    return np.split(stored, document_ends + lines_before), np.split(ids, document_ends)


class UnitWriter:
    """Writer of a unit's files.

    Documents are collected and written in sorted runs to temporary files. `close` renames these to
    their final names and writes the marker last.
    """

    def __init__(self, task: UnitTask) -> None:
        self.task = task
        self.key_prefix = f"{task.settings.seed}/{task.number}/"
        self.files = unit_files(task.folder, task.number)
        self.files.marker.unlink(missing_ok=True)  # existing files may be incomplete
        self.paths = [self.files.ids]
        if task.settings.near_duplicates:
            self.paths.append(self.files.signatures)
        self.temporaries = [
            path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in self.paths
        ]
        self.streams = [open(path, "wb") for path in self.temporaries]  # noqa: SIM115 (see __exit__)
        self.written = 0  # ids in finished runs
        self.run_tokens = 0  # ids of the current run
        self.run: list[tuple[int, EncodedDocument]] = []  # (shuffle key, document)
        self.tables: list[np.ndarray] = []  # of finished runs, each [documents] DOCUMENT

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for stream, temporary in zip(self.streams, self.temporaries, strict=True):
            stream.close()
            temporary.unlink(missing_ok=True)  # `close` has renamed it

    def add(self, document: EncodedDocument) -> None:
        """Add a document. Its shuffle key is a hash of seed, unit and number of the document."""
        name = f"{self.key_prefix}{document.number}".encode()
        digest = blake2b(name, digest_size=8).digest()
        self.run.append((int.from_bytes(digest, "little"), document))
        self.run_tokens += len(document.stored)
        if self.run_tokens + DOCUMENT_TOKENS * len(self.run) >= RUN_TOKENS:
            self._write_run()

    def _write_run(self) -> None:
        """Write the collected documents in the order of their keys."""
        self.run.sort(key=itemgetter(0))  # stable: equal keys stay in reading order
        rows = [
            (key, document.hash, 0, len(document.stored), document.tokens, document.number)
            for key, document in self.run
        ]
        table = np.array(rows, DOCUMENT)
        ends = self.written + np.cumsum(table["stored"], dtype=np.uint64)
        table["start"] = ends - table["stored"]
        self.tables.append(table)
        self.streams[0].writelines(document.stored.data for _, document in self.run)
        for stream in self.streams[1:]:  # the file of signatures, with near-duplicates
            for _, document in self.run:
                assert document.signature is not None
                stream.write(document.signature.data)
        self.written += self.run_tokens
        self.run = []
        self.run_tokens = 0

    def close(self, removed: dict[str, int], tally: Tally, unknowns: Unknowns) -> dict:
        """Finish the files and return the marker."""
        self._write_run()
        table = np.concatenate(self.tables)
        write_bytes(self.files.table, npy_bytes(table))
        write_json(self.files.unknowns, unknowns.record())
        for stream, temporary, path in zip(self.streams, self.temporaries, self.paths, strict=True):
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
        fsync_folder(self.files.marker.parent)
        paths = _written(self.task, self.files)
        marker = {
            "plan_sha256": self.task.plan_sha256,
            "removed": removed,
            "lines": tally.lines,
            "files": {path.name: sha256_file(path) for path in paths},
            "documents": len(table),
            "tokens": int(table["tokens"].sum(dtype=np.int64)),
            "bad_lines": dict(sorted(tally.bad.items())),
            "places": tally.locations,
        }
        write_json(self.files.marker, marker)
        return marker
