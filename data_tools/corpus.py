"""How do the documents of one input file come out, from any byte range of it?

Formats: text (a blank line ends a document, or the file is one), WikiExtractor `<doc>` blocks, JSONL, and builtin:docs.
A document belongs to the range in which its first line starts, so ranges that cut a file anywhere give each document
exactly once. Lines that cannot be read are left out and counted by class.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools import docs
from electra_ds.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BUILTIN = "builtin:docs"
PLACES = 20  # bad lines named in messages
_BACK = 4096  # bytes looked at before a range to see whether the line before it is blank


class Source(NamedTuple):
    """One input file."""

    name: str  # relative to the input root; the only name that reaches the output
    path: str
    size: int  # bytes on disk
    format: str  # text, text_file (the file is the document), wiki, jsonl, docs
    digest: str  # of the first 64 KiB


@dataclass
class Tally:
    """What a reader counted beside the documents."""

    lines: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)  # the first bad lines: "file: byte n: class"

    def add_bad(self, kind: str, source: Source, offset: int) -> None:
        """Count a bad line, remember where the first ones are."""
        self.bad[kind] += 1
        if len(self.places) < PLACES:
            self.places.append(f"{source.name}: byte {offset}: {kind}")


class _ZstdFile(io.RawIOBase):
    """A zstd stream that notices when it ends too early (zstandard's own reader does not)."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError("reading .zst needs the zstandard package: pip install zstandard") from None
        self._raw, self._new = raw, lambda: zstandard.ZstdDecompressor().decompressobj()
        self._errors, self._stream, self._left = zstandard.ZstdError, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._left:
            data = self._stream.unused_data if self._stream is not None and self._stream.eof else b""
            data = data or self._raw.read(1 << 17)
            if not data and (self._stream is None or self._stream.eof):
                return 0
            if not data:
                raise EOFError("Compressed file ended before the end of its frame")
            if self._stream is None or self._stream.eof:
                self._stream = self._new()
            try:
                self._left = self._stream.decompress(data)
            except self._errors as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def open_source(path: str, raw: BinaryIO) -> BinaryIO:
    """The decompressed stream of an open file, by its name's ending."""
    suffix = Path(path).suffix
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), 1 << 20)
    if suffix in COMPRESSED:
        return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix](raw)
    return raw


def detect_format(path: str) -> str:
    """wiki, jsonl or text, from the name and the first line that is not blank."""
    name = Path(path)
    while name.suffix in COMPRESSED:
        name = name.with_suffix("")
    if name.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    with open(path, "rb") as raw:
        first = next((line for _, line in _lines(Source(path, path, 0, "", ""), raw, 0) if line.strip()), b"")
    if first.startswith(b"<doc ") or first.startswith(b"<doc>"):
        return "wiki"
    return "jsonl" if first.startswith(b"{") and first.rstrip().endswith(b"}") else "text"


def documents(source: Source, start: int, end: int, *, text_field: str, tally: Tally,
              moved: Callable[[int], None]) -> Iterator[str]:
    """The texts of the documents that start in bytes [start, end) of a file; `moved` hears of bytes read, in sum.

    Raises UserError with file and offset when a compressed file is broken.
    """
    if source.format == "docs":
        for _, size, text in docs.documents():
            tally.lines += text.count("\n")
            moved(size)
            if text:
                yield text
        return
    read = {"text": _text, "text_file": _whole, "wiki": _wiki, "jsonl": _jsonl}[source.format]
    whole = Path(source.path).suffix in COMPRESSED  # one unit: lines have offsets in the content, not in the file
    with open(source.path, "rb") as raw:
        told = start
        for text in read(source, raw, start, 1 << 62 if whole else end, tally, text_field):
            if raw.tell() - told >= 1 << 18:  # raw: bytes on disk, also of a compressed file
                moved(min(raw.tell(), end) - told)
                told = min(raw.tell(), end)
            yield text
        moved(end - told)


def _lines(source: Source, raw: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts at `start` or later."""
    stream, offset = open_source(source.path, raw), 0
    try:
        if start:
            stream.seek(start - 1)
            offset = start - 1 + len(stream.readline())
        for line in stream:
            yield offset, line if offset else line.removeprefix(b"\xef\xbb\xbf")
            offset += len(line)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(f"{source.name}: broken after byte {offset} of its content ({error}); expected a whole "
                        f"{Path(source.path).suffix} file; copy it again or leave it out") from None


def _decode(lines: list[tuple[int, bytes]], source: Source, tally: Tally) -> str:
    """The text of some lines; those that are not UTF-8 are left out and counted."""
    tally.lines += len(lines)
    try:
        return b"".join(line for _, line in lines).decode()
    except UnicodeDecodeError:
        kept = []
        for offset, line in lines:
            try:
                kept.append(line.decode())
            except UnicodeDecodeError:
                tally.add_bad("not UTF-8", source, offset)
        return "".join(kept)


def _text(source: Source, raw: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    blank_before = start == 0 or _blank_before(raw, start)
    document: list[tuple[int, bytes]] = []
    for offset, line in _lines(source, raw, start):
        blank = not line.strip()
        if document and blank:
            yield _decode(document, source, tally)
            document = []
        elif document:
            document.append((offset, line))
        elif offset >= end:
            return
        elif not blank and blank_before:
            document = [(offset, line)]
        blank_before = blank
    if document:
        yield _decode(document, source, tally)


def _blank_before(raw: BinaryIO, start: int) -> bool:
    """Is the line blank that ends before the first line starting at `start` or later? (Uncompressed files only.)"""
    raw.seek(start - 1)
    first = start - 1 + len(raw.readline())
    back = max(0, first - _BACK)
    raw.seek(back)
    return not raw.read(first - back)[:-1].rpartition(b"\n")[2].strip()


def _whole(source: Source, raw: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    yield _decode(list(_lines(source, raw, 0)), source, tally)


def _wiki(source: Source, raw: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    document: list[tuple[int, bytes]] | None = None
    for offset, line in _lines(source, raw, start):
        if line.startswith((b"<doc ", b"<doc>")):
            if document is not None:
                tally.add_bad("<doc> without </doc>", source, offset)
                yield _decode(document, source, tally)
            document = None
            if offset >= end:
                return
            document = []
        elif line.startswith(b"</doc>"):
            if document is not None:
                yield _decode(document, source, tally)
            document = None
        elif document is not None:
            document.append((offset, line))
    if document is not None:
        tally.add_bad("<doc> without </doc>", source, offset)
        yield _decode(document, source, tally)


def _jsonl(source: Source, raw: BinaryIO, start: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    for offset, line in _lines(source, raw, start):
        if offset >= end:
            return
        if not line.strip():
            continue
        tally.lines += 1
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            tally.add_bad("not UTF-8", source, offset)
            continue
        except (json.JSONDecodeError, RecursionError):
            tally.add_bad("not JSON", source, offset)
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            tally.add_bad(f"no text in field {text_field!r}", source, offset)
        elif any("\ud800" <= c <= "\udfff" for c in set(text)):
            tally.add_bad("half a surrogate pair", source, offset)
        else:
            yield text
