"""How does one unit of input become token ids on disk? Cleaned, tokenized, shuffled in runs, written with a marker.

A unit's output depends on the unit and the options only: unit-000003.ids holds documents one after the other, each
line of a document ended by [SEP] (text cannot make that id); unit-000003.documents.npy says what lies where;
unit-000003.signatures, where near-duplicates are looked for, holds the signatures in the order of that table. Within a
run of at most RUN_TOKENS the documents are sorted by their shuffling key, so that any range of keys, whatever the
number of shards, is one stretch per run. Letters: D documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np

from data_tools.formats.corpus import Source, Tally, documents
from data_tools.inputs.plan import Unit, unit_size
from data_tools.pipeline.clean import clean_lines, signatures, text_hash
from data_tools.pipeline.unknowns import Unknowns
from electra_ds.common.errors import UserError
from electra_ds.common.files import fsync_folder, read_json, sha256_file, write_bytes, write_json
from electra_ds.common.plugins import load_function
from electra_ds.data.shard_format import ids_dtype
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

REMOVED = (
    "control_characters",
    "repeated_lines",
    "too_short",
    "filtered",
)  # what cleaning counts, in its order
BATCH_CHARS = 4 << 20  # text tokenized at a time
RUN_TOKENS = 32 << 20  # ids held in memory at a time
tokenizers: dict[str, Tokenizer] = {}  # of this process by fingerprint, with their word caches
DOCUMENT = np.dtype(
    [
        ("key", "<u8"),  # place in the shuffled corpus
        ("hash", "<u8", 2),  # of the normalised text
        ("start", "<u8"),  # in the ids file
        ("stored", "<u4"),  # ids there, line ends included
        ("tokens", "<u4"),  # ids without the line ends
        ("document", "<u4"),  # number in the unit, in reading order
    ]
)


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
    drop_repeated_lines: bool
    keep: str | None  # "package.module:function"
    signatures: bool


def unit_paths(folder: str | Path, number: int) -> tuple[Path, ...]:
    """(ids, document table, marker, signatures, unknown words) of a unit."""
    stem = Path(folder) / f"unit-{number:06d}"
    return tuple(
        map(stem.with_suffix, (".ids", ".documents.npy", ".json", ".signatures", ".unknowns"))
    )


def array_bytes(array: np.ndarray) -> bytes:
    """The content of an .npy file."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def finished(marker: Path, plan_sha256: str) -> dict | None:
    """What a marker says, when the files it names (relative to it) are whole and of this plan; else None.

    A marker is JSON, written last: `plan_sha256`, `files` {name: sha256}, and what its owner counted.
    """
    if not marker.exists():
        return None
    found = read_json(marker, "a marker of finished work")
    if (
        found["plan_sha256"] != plan_sha256 or "files" not in found
    ):  # other settings, another version's marker
        return None
    files = {marker.parent / name: digest for name, digest in found["files"].items()}
    whole = all(file.is_file() and sha256_file(file) == digest for file, digest in files.items())
    return found if whole else None


def tokenize_unit(task: UnitTask, on_progress: Callable[[int], None]) -> dict:
    """Make a unit's files unless they are there and whole; returns its marker. `moved` hears of input bytes done."""
    if found := finished(unit_paths(task.folder, task.number)[2], task.plan_sha256):
        on_progress(unit_size(task.unit))
        return found
    if task.fingerprint not in tokenizers:
        tokenizers[task.fingerprint] = load_tokenizer(task.tokenizer)
    tokenizer, tally, unknowns = tokenizers[task.fingerprint], Tally(), Unknowns()
    removed = dict.fromkeys(REMOVED, 0)
    with UnitWriter(task, ids_dtype(tokenizer.vocab_size)) as writer:
        for batch in _batches(_cleaned(task, tally, removed, on_progress)):
            encoded, texts = _encode(tokenizer, [lines for _, lines in batch], unknowns)
            signed = signatures(texts) if task.signatures else [None] * len(batch)
            for (number, lines), own, text, signature in zip(
                batch, encoded, texts, signed, strict=True
            ):
                if len(text):
                    writer.add(number, text_hash(lines), own, len(text), signature)
                else:
                    removed["too_short"] += 1
        return writer.close(removed, tally, unknowns)


def _cleaned(
    task: UnitTask,
    tally: Tally,
    removed: dict[str, int],
    on_progress: Callable[[int], None],
) -> Iterator[tuple[int, list[str]]]:
    """(number, lines) of the documents that the cleaning leaves; `removed` counts what it does not."""
    keep = task.keep and load_function("keep", task.keep)
    texts = (
        (source, text)
        for source, (_, start, end) in zip(task.sources, task.unit, strict=True)
        for text in documents(
            source, start, end, text_field=task.text_field, tally=tally, on_progress=on_progress
        )
    )
    for number, (source, text) in enumerate(texts):
        lines, characters = clean_lines(text)
        removed["control_characters"] += characters
        if task.drop_repeated_lines:
            removed["repeated_lines"] += len(lines) - len(lines := list(dict.fromkeys(lines)))
        if not lines or sum(map(len, lines)) < task.min_chars:
            removed["too_short"] += 1
            continue
        try:
            stays = not keep or keep("\n".join(lines))
        except Exception as error:
            raise UserError(
                f"{source.name}: keep = {task.keep!r} raised {type(error).__name__}: {error}; document "
                f"{number} of unit {task.number}, it begins {lines[0][:60]!r}"
            ) from error
        if stays:
            yield number, lines
        else:
            removed["filtered"] += 1


def _batches(documents: Iterator[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Documents of about BATCH_CHARS together."""
    batch, size = [], 0
    for number, lines in documents:
        batch.append((number, lines))
        size += sum(map(len, lines))
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Tokenizer, texts: list[list[str]], unknowns: Unknowns
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The ids of each document, given as lines: as stored, a [SEP] after each line; and without."""
    flat = [line for lines in texts for line in lines]
    ids, lengths = tokenizer.encode_flat(flat)
    unknowns.look(tokenizer, flat, ids, lengths)
    line_ends, lines = np.cumsum(lengths), np.cumsum([len(lines) for lines in texts])[:-1]
    stored = np.insert(
        ids.astype(ids_dtype(tokenizer.vocab_size)), line_ends, tokenizer.special_ids.sep
    )
    ends = line_ends[lines - 1]
    return np.split(stored, ends + lines), np.split(ids, ends)


class UnitWriter:
    """Collects documents, writes them in sorted runs, renames the finished files into place, the marker last."""

    def __init__(self, task: UnitTask, dtype: np.dtype) -> None:
        self.task, self.dtype = task, dtype
        ids, self.table, self.marker, signed, self.words = unit_paths(task.folder, task.number)
        self.marker.unlink(missing_ok=True)  # whatever is there is not whole
        self.paths = [ids, signed] if task.signatures else [ids]
        self.temporaries = [
            path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in self.paths
        ]
        self.files = [open(temporary, "wb") for temporary in self.temporaries]  # noqa: SIM115 (closed by __exit__)
        self.written = self.held = 0  # ids
        self.run: list[tuple] = []  # (a row of DOCUMENT but for its start, ids, signature)
        self.tables: list[np.ndarray] = []

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file, temporary in zip(self.files, self.temporaries, strict=True):
            file.close()
            temporary.unlink(missing_ok=True)  # nothing is there after `close`

    def add(
        self,
        number: int,
        hashed: tuple[int, int],
        ids: np.ndarray,
        tokens: int,
        signature: np.ndarray | None = None,
    ) -> None:
        word = f"{self.task.seed}/{self.task.number}/{number}".encode()
        key = int.from_bytes(blake2b(word, digest_size=8).digest(), "little")
        self.run.append(
            (
                (key, hashed, 0, len(ids), tokens, number),
                ids.astype(self.dtype, copy=False),
                signature,
            )
        )
        self.held += len(ids)
        if (
            self.held + 128 * len(self.run) >= RUN_TOKENS
        ):  # a document takes some 350 bytes beside its ids
            self._flush()

    def _flush(self) -> None:
        self.run.sort(key=lambda document: (document[0][0], document[0][5]))  # by key, then number
        table = np.array([row for row, _, _ in self.run], DOCUMENT)
        ends = self.written + np.cumsum(table["stored"], dtype=np.uint64)
        table["start"] = ends - table["stored"]
        self.tables.append(table)
        for file, part in zip(self.files, (1, 2), strict=False):
            file.writelines(document[part].data for document in self.run)
        self.written += self.held
        self.run, self.held = [], 0

    def close(self, removed: dict[str, int], tally: Tally, unknowns: Unknowns) -> dict:
        """Finish the files; returns the marker."""
        self._flush()
        table = np.concatenate(self.tables)
        write_bytes(self.table, array_bytes(table))
        write_json(self.words, unknowns.record())
        for file, temporary, path in zip(self.files, self.temporaries, self.paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        fsync_folder(self.marker.parent)
        found = {
            "plan_sha256": self.task.plan_sha256,
            "removed": removed,
            "lines": tally.lines,
            "files": {
                path.name: sha256_file(path) for path in [*self.paths, self.table, self.words]
            },
            "documents": len(table),
            "tokens": int(table["tokens"].sum(dtype=np.int64)),
            "bad_lines": dict(sorted(tally.bad.items())),
            "places": tally.places,
        }
        write_json(self.marker, found)
        return found
