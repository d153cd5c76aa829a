"""How does one unit of input become token ids on disk? Cleaned, tokenized, shuffled in runs, written with a marker.

A unit's output depends on the unit and the options only: unit-000003.ids holds documents one after the other, each
line of a document ended by [SEP] (text cannot make that id); unit-000003.documents.npy says what lies where. Within a
run of at most RUN_TOKENS the documents are sorted by their shuffling key, so that any range of keys, whatever the
number of shards, is one stretch per run. Letters: D documents.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data_tools.clean import clean_lines, text_hash
from data_tools.corpus import Source, Tally, documents
from data_tools.plan import Unit
from electra_ds.files import fsync_folder, read_json, sha256_file, write_json
from electra_ds.shards import ids_dtype
from electra_ds.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARS = 4 << 20  # text tokenized at a time
RUN_TOKENS = 32 << 20  # ids held in memory at a time
DOCUMENT = np.dtype([
    ("key", "<u8"),  # place in the shuffled corpus
    ("hash", "<u8", 2),  # of the normalised text
    ("start", "<u8"),  # in the ids file
    ("stored", "<u4"),  # ids there, line ends included
    ("tokens", "<u4"),  # ids without the line ends
    ("document", "<u4"),  # number in the unit, in reading order
])


@dataclass(frozen=True)
class UnitTask:
    """Everything that the output of one unit follows from, and where it goes."""

    number: int
    unit: Unit
    sources: tuple[Source, ...]  # of this unit's segments, in their order
    folder: str
    tokenizer: str  # folder
    fingerprint: str  # of that tokenizer
    plan_sha256: str
    seed: int
    text_field: str
    min_chars: int


@lru_cache(maxsize=2)
def _cached_tokenizer(folder: str, fingerprint: str) -> Tokenizer:
    """One tokenizer, with its word cache, per process."""
    return load_tokenizer(folder)


def unit_paths(folder: str | Path, number: int) -> tuple[Path, Path, Path]:
    """(ids, document table, marker) of a unit."""
    stem = Path(folder) / f"unit-{number:06d}"
    return stem.with_suffix(".ids"), stem.with_suffix(".documents.npy"), stem.with_suffix(".json")


def finished_unit(task: UnitTask) -> dict | None:
    """The marker of a unit that is whole on disk and made by this plan, else None."""
    ids, table, marker = unit_paths(task.folder, task.number)
    if not marker.exists():
        return None
    found = read_json(marker, "a unit's marker")
    whole = (found["plan_sha256"] == task.plan_sha256 and ids.exists() and table.exists()
             and ids.stat().st_size == found["ids_bytes"]
             and sha256_file(ids) == found["ids_sha256"] and sha256_file(table) == found["table_sha256"])
    return found if whole else None


def tokenize_unit(task: UnitTask, moved: Callable[[int], None]) -> dict:
    """Make a unit's files unless they are there and whole; returns its marker. `moved` hears of input bytes done."""
    if found := finished_unit(task):
        moved(sum(end - start for _, start, end in task.unit))
        return found
    tokenizer, tally, writer = _cached_tokenizer(task.tokenizer, task.fingerprint), Tally(), _Writer(task)
    dtype = ids_dtype(tokenizer.vocab_size)
    texts = (text for source, (_, start, end) in zip(task.sources, task.unit, strict=True)
             for text in documents(source, start, end, text_field=task.text_field, tally=tally, moved=moved))
    short, total = 0, 0
    try:
        for first, batch in _batches(texts):
            total = first + len(batch)
            kept = [(first + i, lines) for i, text in enumerate(batch)
                    if (lines := clean_lines(text)) and sum(map(len, lines)) >= task.min_chars]
            ids, stored = _encode(tokenizer, [lines for _, lines in kept])
            counted = 0
            for (number, lines), begin, end in zip(kept, np.cumsum(stored) - stored, np.cumsum(stored), strict=True):
                tokens = int((ids[begin:end] != tokenizer.special_ids.sep).sum())
                if tokens:
                    writer.add(number, text_hash(lines), ids[begin:end].astype(dtype), tokens)
                counted += tokens > 0
            short += len(batch) - counted
        marker = writer.close()
    finally:
        writer.discard()
    marker |= {"documents_read": total, "too_short": short, "lines": tally.lines,
               "bad_lines": dict(sorted(tally.bad.items())), "places": tally.places}
    write_json(unit_paths(task.folder, task.number)[2], marker)
    return marker


def _batches(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first, documents) of about BATCH_CHARS."""
    batch: list[str] = []
    first = size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield first, batch
            first, batch, size = first + len(batch), [], 0
    if batch:
        yield first, batch


def _encode(tokenizer: Tokenizer, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Lines of documents -> (ids with a [SEP] after each line, ids per document [D])."""
    ids, lengths = tokenizer.encode_flat([line for lines in texts for line in lines])
    ids = np.insert(ids, np.cumsum(lengths), tokenizer.special_ids.sep)
    ends = np.cumsum(lengths + 1)[np.cumsum([len(lines) for lines in texts], dtype=np.int64) - 1] if texts else []
    return ids, np.diff(ends, prepend=0).astype(np.int64)


class _Writer:
    """Collects documents, writes them in sorted runs, renames the finished files into place."""

    def __init__(self, task: UnitTask) -> None:
        self.task = task
        self.ids_path, self.table_path, self.marker = unit_paths(task.folder, task.number)
        self.marker.unlink(missing_ok=True)  # whatever is there is not whole
        self.temporary = self.ids_path.with_name(f".{self.ids_path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed by discard)
        self.digest, self.written, self.held = hashlib.sha256(), 0, 0
        self.run: list[tuple[int, tuple[int, int], np.ndarray, int, int]] = []
        self.tables: list[np.ndarray] = []

    def add(self, number: int, hashed: tuple[int, int], ids: np.ndarray, tokens: int) -> None:
        word = f"{self.task.seed}/{self.task.number}/{number}".encode()
        key = int.from_bytes(blake2b(word, digest_size=8).digest(), "little")
        self.run.append((key, hashed, ids, tokens, number))
        self.held += len(ids)
        if self.held >= RUN_TOKENS:
            self.flush()

    def flush(self) -> None:
        self.run.sort(key=lambda document: (document[0], document[4]))
        table = np.zeros(len(self.run), DOCUMENT)
        for row, (key, hashed, ids, tokens, number) in zip(table, self.run, strict=True):
            row["key"], row["hash"], row["stored"] = key, hashed, len(ids)
            row["tokens"], row["document"] = tokens, number
        sizes = table["stored"].astype(np.uint64)
        table["start"] = self.written + np.cumsum(sizes) - sizes
        data = b"".join(document[2].tobytes() for document in self.run)
        self.file.write(data)
        self.digest.update(data)
        self.written += int(sizes.sum())
        self.tables.append(table)
        self.run, self.held = [], 0

    def close(self) -> dict:
        """Finish both files; returns the first half of the marker."""
        self.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        table = np.concatenate(self.tables)
        temporary = self.temporary.with_name(f".{self.table_path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, table)
            file.flush()
            os.fsync(file.fileno())
        size = self.file.tell()
        os.replace(temporary, self.table_path)
        os.replace(self.temporary, self.ids_path)
        fsync_folder(self.ids_path.parent)
        return {"plan_sha256": self.task.plan_sha256, "ids_bytes": size, "ids_sha256": self.digest.hexdigest(),
                "table_sha256": sha256_file(self.table_path), "documents": len(table),
                "tokens": int(table["tokens"].sum())}

    def discard(self) -> None:
        """Close and take the unfinished file away (after close: nothing is left to take)."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)
