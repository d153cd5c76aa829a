"""How do the documents of one input file come out, from any byte range of it?

Formats: text (a blank line ends a document, or the file is one), WikiText, WikiExtractor `<doc>` blocks, JSONL,
parquet, tars of all but parquet, and builtin:docs. A document belongs to the range in which its first line (of parquet:
its row group) starts, so ranges that cut a file anywhere give each document exactly once. Lines that cannot be read are
left out and counted by class.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools import docs
from data_tools.streams import COMPRESSED, HEAD, TarMember, content_of, open_input
from electra_ds.errors import UserError

UNREAD = (".json", ".parquet", ".arrow", ".tar", ".zip")  # names that promise something else than lines
BUILTIN = "builtin:docs"
UNKNOWN = "\ufdd0"  # the <unk> of WikiText: a noncharacter, which no text carries, so every vocabulary makes it [UNK]
PLACES = 20  # bad lines named in messages
_BACK = 4096  # bytes looked at before a range to see whether the line before it is blank
_END = 1 << 62  # of a range that is all of a stream: its lines have offsets in the content, not in the file
_TITLE = re.compile(rb"= (?!= ).*(?<! =) =")  # of a WikiText article; ` = = Title = = ` is a section's


class Source(NamedTuple):
    """One input file."""

    name: str  # relative to the input root, or a URL; the only name that reaches the output
    path: str  # or URL
    size: int  # bytes on disk
    format: str  # text, text_file (the file is the document), wikitext, wiki, jsonl, parquet, docs, tar, tar:text ...
    digest: str  # of the first 64 KiB

    @property
    def is_stream(self) -> bool:
        """Can it only be read from its beginning?"""
        return self.format.startswith(("docs", "tar", "tfrecord")) or Path(self.name).suffix in COMPRESSED


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


def detect_format(name: str, head: bytes, asked: str = "auto") -> str:
    """The format of a file (see Source), from its name and first bytes. UserError when it is none of ours.

    `asked` is how the user wants lines to be read: it holds for a tar's members, and does not change what a parquet is.
    """
    if head[257:262] == b"ustar":
        return "tar" if asked == "auto" else f"tar:{asked}"
    if head.startswith(b"PAR1"):
        return "parquet"
    if asked == "webdataset":
        raise UserError(f"{name}: not a tar, which --format webdataset reads; leave it out")
    if asked != "auto":
        return asked
    plain = Path(name)
    while plain.suffix in COMPRESSED:
        plain = plain.with_suffix("")
    if plain.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if first.startswith((b"<doc ", b"<doc>")):
        return "wiki"
    goes_on = first is lines[-1]  # behind the head
    if first.startswith(b"{") and (first.rstrip().endswith(b"}") or goes_on):
        return "jsonl"
    if plain.suffix in UNREAD or b"\0" in first:
        raise UserError(f"{name}: not text; expected plain text, WikiText, WikiExtractor output, JSONL (one object per "
                        f"line), parquet or a tar of text, also {' '.join(COMPRESSED)}; convert it, or leave it out")
    return "wikitext" if _TITLE.fullmatch(first.strip()) else "text"


def documents(source: Source, start: int, end: int, *, text_field: str, tally: Tally,
              moved: Callable[[int], None]) -> Iterator[str]:
    """The texts of the documents that start in bytes [start, end) of a file; `moved` hears of bytes read, in sum.

    Raises UserError with file and offset when a compressed file, a tar or a parquet is broken; OSError when a remote
    file cannot be read any more.
    """
    if source.format == "docs":
        for _, size, text in docs.documents():
            tally.lines += text.count("\n")
            moved(size)
            if text:
                yield text
        return
    try:
        with open_input(source.path) as raw:
            told = start
            content = content_of(raw, source.name)
            for text in _documents(source, content, start, _END if source.is_stream else end, tally, text_field):
                if raw.tell() - told >= 1 << 18:  # raw: bytes on disk, also of a compressed file
                    moved(min(raw.tell(), end) - told)
                    told = min(raw.tell(), end)
                yield text
            moved(end - told)
    except (UserError, OSError):
        raise
    except Exception as error:  # each file system has errors of its own
        if "://" not in source.path:
            raise
        raise OSError(f"{source.name}: {error or type(error).__name__}") from error


def _documents(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    if source.format == "tfrecord":
        raise UserError(f"{source.name}: holds rows, not text; `electra-ds convert` takes it")
    formats = {"text": _text, "text_file": _whole, "wikitext": _wikitext, "wiki": _wiki, "jsonl": _jsonl,
               "parquet": _parquet, "tar": _tar}
    return formats[source.format.partition(":")[0]](source, content, start, end, tally, text_field)


def _lines(content: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts at `start` or later."""
    offset = 0
    if start:
        content.seek(start - 1)
        offset = start - 1 + len(content.readline())
    for line in content:
        yield offset, line if offset else line.removeprefix(b"\xef\xbb\xbf")
        offset += len(line)


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


def _text(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    blank_before = start == 0 or _blank_before(content, start)
    document: list[tuple[int, bytes]] = []
    for offset, line in chain(_lines(content, start), [(end, b"")]):  # a blank line more ends the last document
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


def _blank_before(content: BinaryIO, start: int) -> bool:
    """Is the line blank that ends before the first line starting at `start` or later? (Uncompressed files only.)"""
    content.seek(start - 1)
    first = start - 1 + len(content.readline())
    back = max(0, first - _BACK)
    content.seek(back)
    return not content.read(first - back)[:-1].rpartition(b"\n")[2].strip()


def _whole(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    yield _decode(list(_lines(content, 0)), source, tally)


def _wikitext(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    document: list[tuple[int, bytes]] = []
    begun = start == 0  # what stands before the first title is a document, too
    blank_before = start == 0 or _blank_before(content, start)
    for offset, line in chain(_lines(content, start), [(end, b""), (end, b"= . =")]):  # a title more: ends the last one
        stripped = line.strip()
        if blank_before and _TITLE.fullmatch(stripped):
            if document:
                yield _decode(document, source, tally).replace("<unk>", f" {UNKNOWN} ")
            if offset >= end:
                return
            document, begun = [], True
        if begun and stripped:
            document.append((offset, stripped + b"\n"))
        blank_before = not stripped


def _wiki(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str) -> Iterator[str]:
    document: list[tuple[int, bytes]] | None = None
    for offset, line in chain(_lines(content, start), [(end, b"<doc>")]):  # one <doc> more ends the last document
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


def _jsonl(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    for offset, line in _lines(content, start):
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
        elif not text.isascii() and re.search("[\ud800-\udfff]", text):
            tally.add_bad("half a surrogate pair", source, offset)
        else:
            yield text


def _parquet(source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    if end == _END:
        raise UserError(f"{source.name}: parquet compressed or in a tar cannot be read; unpack it, or leave it out")
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{source.name}: reading parquet needs pyarrow: pip install 'electra_ds[parquet]'") from None
    try:
        table = ParquetFile(content, buffer_size=1 << 20)  # pages, not whole row groups, in memory
        column = table.schema_arrow.field(text_field)
        for group in range(table.num_row_groups):
            first = table.metadata.row_group(group).column(0)
            offset = first.dictionary_page_offset or first.data_page_offset
            if not start <= offset < end:
                continue
            for batch in table.iter_batches(256, [group], [column.name], use_threads=False):
                for text in batch.column(0).to_pylist():
                    tally.lines += 1
                    if isinstance(text, str):
                        yield text
                    else:
                        tally.add_bad(f"no text in field {text_field!r}", source, offset)
    except KeyError:
        raise UserError(f"{source.name}: no column {text_field!r}; expected --text-field to be one of "
                        f"{', '.join(table.schema_arrow.names)}") from None
    except (pyarrow.ArrowException, OSError) as error:
        if "://" in source.path:
            raise
        raise UserError(f"{source.name}: broken ({' '.join(str(error).split())}); expected a whole parquet file; copy "
                        f"it again or leave it out") from None


def _member(name: str, content: BinaryIO, asked: str, text_field: str) -> tuple[str, BinaryIO, str] | None:
    """(format, content, text field) of a tar's member; None for what is not asked for of a webdataset sample.

    Of webdataset samples the text is KEY.txt for the text_field txt, and the field f of KEY.json for json.f.
    """
    if asked != "webdataset":
        found = detect_format(name, content.peek(HEAD), asked)
        return "text_file" if (found, asked) == ("text", "auto") else found, content, text_field
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    if extension == text_field:
        return "text_file", content, ""
    if text_field.startswith(f"{extension}."):  # an object on several lines is one of JSONL without the line ends
        return "jsonl", BytesIO(content.read().replace(b"\n", b" ")), text_field.removeprefix(f"{extension}.")
    return None


def _tar(source: Source, content: BinaryIO, _: int, end: int, tally: Tally, text_field: str) -> Iterator[str]:
    """Of a tar every regular member that is not hidden, read as a file of its own; text is one document."""
    asked, name = source.format.partition(":")[2] or "auto", source.name
    met = asked != "webdataset"
    try:
        with tarfile.open(fileobj=content, mode="r|", tarinfo=TarMember) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # there may be millions
                if not member.isfile() or not member.size or "/." in f"/{member.name.removeprefix('./')}":
                    continue
                name = f"{source.name}/{member.name}"
                inside = content_of(tar.extractfile(member), name)
                if own := _member(name, inside, asked, text_field):
                    met, (found, inside, asked_field) = True, own
                    yield from _documents(Source(name, "", member.size, found, ""), inside, 0, end, tally, asked_field)
            while rest := content.read(HEAD):  # to the end, where a compressed stream has its checksum
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more data after its end")
            if not met:
                raise UserError(f"{name}: nothing for --text-field {text_field} in this tar; expected the extension of "
                                f"a member with text, or of a JSON member and its field (txt, json.text)")
    except tarfile.TarError as error:
        raise UserError(f"{source.name}: broken, last read {name} ({error}); expected a whole tar; copy it again or "
                        f"leave it out") from None
