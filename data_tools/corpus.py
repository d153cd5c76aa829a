"""How do the documents of one input file come out, from any byte range of it?

Formats: text (a blank line ends a document, or the file is one), WikiExtractor `<doc>` blocks, JSONL, and builtin:docs.
A document belongs to the range in which its first line starts, so ranges that cut a file anywhere give each document
exactly once. Lines that cannot be read are left out and counted by class.
"""

from __future__ import annotations

import bz2
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools import docs
from electra_ds.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREAD = (".json", ".parquet", ".arrow", ".tar", ".tgz", ".zip")  # names that promise something else than lines
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


def detect_format(path: str) -> str:
    """wiki, jsonl or text, from the name and the first line that is not blank. UserError for other things."""
    name = Path(path)
    while name.suffix in COMPRESSED:
        name = name.with_suffix("")
    if name.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    with open(path, "rb") as raw:
        first = next((line for _, line in _lines(Source(path, path, 0, "", ""), raw, 0) if line.strip()), b"")
    if first.startswith(b"<doc ") or first.startswith(b"<doc>"):
        return "wiki"
    if first.startswith(b"{") and first.rstrip().endswith(b"}"):
        return "jsonl"
    if name.suffix in UNREAD or b"\0" in first:
        raise UserError(f"{path}: not text; expected plain text, WikiExtractor output or JSONL (one object per line), "
                        f"also {' '.join(COMPRESSED)}; convert it, or leave it out")
    return "text"


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
    offset, suffix = 0, Path(source.path).suffix
    if start:
        raw.seek(start - 1)
        offset = start - 1 + len(raw.readline())
    try:
        for line in raw if suffix not in COMPRESSED else _decompressed_lines(raw, suffix):
            yield offset, line if offset else line.removeprefix(b"\xef\xbb\xbf")
            offset += len(line)
    except UserError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        if suffix not in COMPRESSED:
            raise
        raise UserError(f"{source.name}: broken after byte {offset} of its content ({error}); expected a whole "
                        f"{suffix} file; copy it again or leave it out") from None


def _decompressed_lines(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Lines of a compressed file of one or more streams; raises when the last one is not whole."""
    stream, tail = None, b""
    while data := raw.read(1 << 16):
        while data := data if stream is not None and not stream.eof else data.lstrip(b"\0"):  # padding between streams
            if stream is None or stream.eof:
                stream = _decompressor(suffix)
            tail += stream.decompress(data)
            data = stream.unused_data if stream.eof else b""
        *lines, tail = tail.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if stream is not None and not stream.eof:
        raise EOFError("the file ends inside its compressed stream")
    if tail:
        yield tail


def _decompressor(suffix: str) -> Any:
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError("reading .zst needs the zstandard package: pip install zstandard") from None
        return zstandard.ZstdDecompressor().decompressobj()
    return {".gz": lambda: zlib.decompressobj(31), ".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}[suffix]()


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
    for offset, line in chain(_lines(source, raw, start), [(end, b"")]):  # a blank line more ends the last document
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
    for offset, line in chain(_lines(source, raw, start), [(end, b"<doc>")]):  # one <doc> more ends the last document
        begins = line.startswith((b"<doc ", b"<doc>"))
        if document is not None and (begins or line.startswith(b"</doc>")):
            if begins:
                tally.add_bad("<doc> without </doc>", source, offset)
            yield _decode(document, source, tally)
            document = None
        if begins and offset >= end:
            return
        if begins:
            document = []
        elif document is not None:
            document.append((offset, line))


def _jsonl(source: Source, raw: BinaryIO, start: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    for offset, line in _lines(source, raw, start):
        if offset >= end:
            return
        if not line.strip():
            continue
        tally.lines += 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
            tally.add_bad("not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON", source, offset)
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            tally.add_bad(f"no text in field {text_field!r}", source, offset)
        elif any("\ud800" <= c <= "\udfff" for c in set(text)):
            tally.add_bad("half a surrogate pair", source, offset)
        else:
            yield text
