"""How do the documents of one input file come out, from any byte range of it?

Formats: text (a blank line ends a document, or the file is one), WikiText, WikiExtractor `<doc>` blocks, JSONL,
parquet, arrow, tars of all but these two, shards of datasets, and builtin:docs. A document belongs to the range in
which its first line (of parquet: its row group) starts, so ranges that cut a file anywhere give each document exactly
once. Lines that cannot be read are left out and counted by class; a text longer than LONGEST is several documents.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools.inputs import docstring_corpus, hub
from data_tools.inputs.streams import (
    COMPRESSED,
    HEAD,
    TarMember,
    content_of,
    fingerprint,
    open_input,
)
from electra_ds.common.errors import UserError

UNREAD = (
    ".json",
    ".parquet",
    ".arrow",
    ".tar",
    ".zip",
)  # names that promise something else than lines
BUILTIN = "builtin:docs"
UNKNOWN = "\ufdd0"  # the <unk> of WikiText: a noncharacter, which no text carries, so every vocabulary makes it [UNK]
PLACES = 20  # bad lines named in messages
LONGEST = 4 << 20  # bytes, about, of a document
LONGEST_LINE = 16 << 20  # bytes of JSON
ARROW = (b"ARROW1\0\0", b"\xff\xff\xff\xff")  # first bytes of its files, and of its streams
_BACK = 4096  # bytes looked at before a range to see whether the line before it is blank
_END = (
    1 << 62
)  # of a range that is all of a stream: its lines have offsets in the content, not in the file
_TITLE = re.compile(
    rb"= (?!= ).*(?<! =) ="
)  # of a WikiText article; ` = = Title = = ` is a section's


class Source(NamedTuple):
    """One input file."""

    name: str  # relative to the input root, or a URL; the only name that reaches the output
    path: str  # or URL
    size: int  # bytes on disk
    format: str  # text, text_file (the file is the document), wikitext, wiki, jsonl, parquet, arrow, tar, tar:text ...,
    #              docs, dataset:7 (a shard of a dataset)
    digest: str  # of the first HEAD bytes

    @property
    def is_stream(self) -> bool:
        """Can it only be read from its beginning?"""
        return (
            self.format.startswith(("docs", "dataset", "arrow", "tar", "tfrecord"))
            or Path(self.name).suffix in COMPRESSED
        )


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

    `asked` is how the user wants lines to be read: it holds for a tar's members, and changes no parquet or arrow.
    """
    if head[257:262] == b"ustar":
        return "tar" if asked == "auto" else f"tar:{asked}"
    if head.startswith((b"PAR1", *ARROW)):
        return "arrow" if head.startswith(ARROW) else "parquet"
    if asked == "webdataset":
        raise UserError(
            f"{name}: not a tar, and --format webdataset reads nothing else; prepare it by itself and "
            f"train on both with --data MIX.json"
        )
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
        raise UserError(
            f"{name}: not text; expected plain text, WikiText, WikiExtractor output, JSONL (one object per "
            f"line), parquet, arrow or a tar of text, also {' '.join(COMPRESSED)}; convert it, or leave it "
            f"out"
        )
    return "wikitext" if _TITLE.fullmatch(first.strip()) else "text"


def documents(
    source: Source,
    start: int,
    end: int,
    *,
    text_field: str,
    tally: Tally,
    on_progress: Callable[[int], None],
) -> Iterator[str]:
    """The texts of the documents that start in bytes [start, end) of a file; `moved` hears of bytes read, in sum.

    Raises UserError with file and offset when a compressed file, a tar, a parquet or arrow file is broken, and when a
    file is no longer the planned one; OSError when a remote file cannot be read any more.
    """
    told = start
    try:
        for done, text in _read(source, start, end, tally, text_field):
            if min(done, end) - told >= 1 << 18:
                on_progress(min(done, end) - told)
                told = min(done, end)
            yield text
        on_progress(end - told)
    except (UserError, OSError):
        raise
    except (
        Exception
    ) as error:  # each file system has errors of its own, and so has the library of datasets
        if "://" not in source.path and not source.format.startswith("dataset"):
            raise
        raise OSError(f"{source.name}: {error or type(error).__name__}") from error


def _read(
    source: Source, start: int, end: int, tally: Tally, text_field: str
) -> Iterator[tuple[int, str]]:
    """(bytes on disk read so far, about; a document)."""
    done = 0
    if source.format == "docs":
        for _, size, text in docstring_corpus.documents():
            done += size
            tally.lines += text.count("\n")
            if text:
                yield done, text
    elif source.format.startswith("dataset"):
        for value in hub.read_shard(source.path, int(source.format.partition(":")[2]), text_field):
            tally.lines += 1
            for text in _checked(value, source, done, tally, text_field):
                done += len(text)
                yield done, text
    else:
        with open_input(source.path) as raw:
            found = fingerprint(raw) if start == 0 else (raw.seek(0, os.SEEK_END), source.digest)
            if found != (source.size, source.digest):
                raise UserError(
                    f"{source.name}: changed since the start: {found[0]} bytes, {source.size} then; give "
                    f"another --out, and files that stay as they are"
                )
            raw.seek(0)
            for text in _documents(
                source,
                content_of(raw, source.name),
                start,
                _END if source.is_stream else end,
                tally,
                text_field,
            ):
                yield raw.tell(), text


def _documents(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str
) -> Iterator[str]:
    if source.format == "tfrecord":
        raise UserError(f"{source.name}: holds rows, not text; `electra-ds convert` takes it")
    formats = {
        "text": _text,
        "text_file": _text,
        "wikitext": _wikitext,
        "wiki": _wiki,
        "jsonl": _jsonl,
        "parquet": _table,
        "arrow": _table,
        "tar": _tar,
    }
    return formats[source.format.partition(":")[0]](source, content, start, end, tally, text_field)


def _seek_line(content: BinaryIO, start: int) -> int:
    """Go to the first line that starts at `start`, which is not 0, or later; its offset."""
    content.seek(start - 1)
    while (line := content.readline(LONGEST)) and not line.endswith(b"\n"):
        pass
    return content.tell()


def _lines(content: BinaryIO, start: int, longest: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts at `start` or later; one longer than `longest` comes in parts."""
    offset, begins = _seek_line(content, start) if start else 0, True
    while line := content.readline(longest):
        while longest <= len(line) < longest + 3 and b"\x80" <= content.peek(1)[:1] < b"\xc0":
            line += content.read(1)  # no character is cut
        if begins or line.strip():  # the end of a long line is no blank line
            yield offset, line if offset else line.removeprefix(b"\xef\xbb\xbf")
        offset, begins = offset + len(line), line.endswith(b"\n")


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


def _text(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str
) -> Iterator[str]:
    """Documents up to a blank line, or the whole file as one."""
    blank_before = start == 0 or _blank_before(content, start)
    document: list[tuple[int, bytes]] = []
    for offset, line in chain(
        _lines(content, start, LONGEST), [(end, b"")]
    ):  # a blank line more ends the last
        blank = not (line if source.format == "text_file" else line.strip())
        if document and (blank or _is_long(document, offset)):
            yield _decode(document, source, tally)
            document = [] if blank else [(offset, line)]
        elif document:
            document.append((offset, line))
        elif offset >= end:
            return
        elif not blank and blank_before:
            document = [(offset, line)]
        blank_before = blank


def _is_long(document: list[tuple[int, bytes]], offset: int) -> bool:
    """Is a document whose next line is at `offset` long enough to be taken for one?"""
    return offset - document[0][0] >= LONGEST


def _blank_before(content: BinaryIO, start: int) -> bool:
    """Is the line blank that ends before the first line starting at `start` or later? (Uncompressed files only.)"""
    first = _seek_line(content, start)
    back = max(0, first - _BACK)
    content.seek(back)
    return not content.read(first - back)[:-1].rpartition(b"\n")[2].strip()


def _wikitext(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str
) -> Iterator[str]:
    document: list[tuple[int, bytes]] = []
    begun = start == 0  # what stands before the first title is a document, too
    blank_before = start == 0 or _blank_before(content, start)
    for offset, line in chain(
        _lines(content, start, LONGEST), [(end, b""), (end, b"= . =")]
    ):  # a title more
        stripped = line.strip()
        title = blank_before and _TITLE.fullmatch(stripped)
        if document and (title or _is_long(document, offset)):
            yield _decode(document, source, tally).replace("<unk>", f" {UNKNOWN} ")
            document = []
        if title and offset >= end:
            return
        begun = begun or bool(title)
        if begun and stripped:
            document.append((offset, stripped + b"\n"))
        blank_before = not stripped


def _wiki(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, _: str
) -> Iterator[str]:
    document: list[tuple[int, bytes]] | None = None
    for offset, line in chain(_lines(content, start, LONGEST), [(end, b"<doc>")]):  # one <doc> more
        begins = line.startswith((b"<doc ", b"<doc>"))
        if document is not None and (begins or line.startswith(b"</doc>")):
            if begins:
                tally.add_bad("<doc> without </doc>", source, offset)
            yield _decode(document, source, tally)
            document = None
        elif document and _is_long(document, offset):
            yield _decode(document, source, tally)
            document = []
        if begins and offset >= end:
            return
        if begins:
            document = []
        elif document is not None:
            document.append((offset, line))


def _jsonl(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str
) -> Iterator[str]:
    for offset, line in _lines(content, start, LONGEST_LINE):
        if offset >= end:
            return
        if not line.strip():
            continue
        tally.lines += 1
        try:
            record = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ) as error:  # ValueError: also a number of too many digits
            kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            tally.add_bad(
                kind if len(line) < LONGEST_LINE else f"longer than {LONGEST_LINE >> 20} MiB",
                source,
                offset,
            )
            continue
        value = record.get(text_field) if isinstance(record, dict) else None
        yield from _checked(value, source, offset, tally, text_field)


def _checked(
    value: object, source: Source, offset: int, tally: Tally, text_field: str
) -> Iterator[str]:
    """The text of a row; nothing, counted as a bad line, when it has none."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        str.encode(text)
    except UnicodeDecodeError:
        tally.add_bad("not UTF-8", source, offset)
    except UnicodeEncodeError:
        tally.add_bad("half a surrogate pair", source, offset)
    except TypeError:
        tally.add_bad(f"no text in field {text_field!r}", source, offset)
    else:
        yield from (text[at : at + LONGEST] for at in range(0, len(text) or 1, LONGEST))


def _table(
    source: Source, content: BinaryIO, start: int, end: int, tally: Tally, text_field: str
) -> Iterator[str]:
    """The rows of a parquet file's groups that begin in the range, or of an arrow file."""
    kind = source.format
    if not source.path or Path(source.name).suffix in COMPRESSED:
        raise UserError(
            f"{source.name}: {kind} compressed or in a tar cannot be read; unpack it, or leave it out"
        )
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{source.name}: reading {kind} needs pyarrow: pip install 'electra_ds[parquet]'"
        ) from None
    names: list[str] = []
    try:
        names, batches = (
            _parquet(content, start, end, text_field) if kind == "parquet" else _arrow(content)
        )
        if text_field not in names:
            raise KeyError
        for offset, batch in batches:
            column = batch.column(text_field).cast(pyarrow.large_binary())
            column.validate(full=True)  # nothing in it points outside
            for value in column:
                tally.lines += 1
                yield from _checked(value.as_py(), source, offset, tally, text_field)
    except (KeyError, pyarrow.ArrowNotImplementedError):
        raise UserError(
            f"{source.name}: no column {text_field!r} of text; expected --text-field to be one of "
            f"{', '.join(names)}"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        if "://" in source.path:
            raise
        raise UserError(
            f"{source.name}: broken ({' '.join(str(error).split())}); expected a whole {kind} file; copy "
            f"it again or leave it out"
        ) from None


def _member(
    name: str, content: BinaryIO, asked: str, text_field: str
) -> tuple[str, BinaryIO, str] | None:
    """(format, content, text field) of a tar's member; None for what is not asked for of a webdataset sample.

    Of webdataset samples the text is KEY.txt for the text_field txt, and the field f of KEY.json for json.f.
    """
    if asked != "webdataset":
        found = detect_format(name, content.peek(HEAD), asked)
        return "text_file" if (found, asked) == ("text", "auto") else found, content, text_field
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    if extension == text_field:
        return "text_file", content, ""
    if text_field.startswith(
        f"{extension}."
    ):  # an object on several lines is one of JSONL without the line ends
        line = BytesIO(content.read(LONGEST_LINE).replace(b"\n", b" "))
        return "jsonl", BufferedReader(line), text_field.removeprefix(f"{extension}.")
    return None


def _parquet(
    content: BinaryIO, start: int, end: int, column: str
) -> tuple[list[str], Iterator[tuple[int, Any]]]:
    """(names of columns, (offset, batch of rows) of the groups that begin in the range)."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(content, buffer_size=1 << 20)  # pages, not whole row groups, in memory
    chunks = [table.metadata.row_group(group).column(0) for group in range(table.num_row_groups)]
    offsets = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    groups = [(group, offset) for group, offset in enumerate(offsets) if start <= offset < end]
    return table.schema_arrow.names, (
        (offset, batch)
        for group, offset in groups
        for batch in table.iter_batches(256, [group], [column], use_threads=False)
    )


def _arrow(content: BinaryIO) -> tuple[list[str], Iterator[tuple[int, Any]]]:
    """(names of columns, (offset, batch of rows)) of a file or a stream."""
    from pyarrow import ArrowInvalid, ipc

    if content.peek(len(ARROW[0])).startswith(ARROW[0]):
        table = ipc.open_file(content)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        content.seek(-8, os.SEEK_END)
        if content.read() != ARROW[1] + bytes(
            4
        ):  # the reader would take any end of a message for the last
            raise ArrowInvalid("it ends without its mark")
        content.seek(0)
        table = batches = ipc.open_stream(content)
    return table.schema.names, ((content.tell(), batch) for batch in batches)


def _tar(
    source: Source, content: BinaryIO, _: int, end: int, tally: Tally, text_field: str
) -> Iterator[str]:
    """Of a tar every regular member that is not hidden, read as a file of its own; text is one document."""
    asked, name = source.format.partition(":")[2] or "auto", source.name
    met = asked != "webdataset"
    try:
        with tarfile.open(fileobj=content, mode="r|", tarinfo=TarMember) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # there may be millions
                if (
                    not member.isfile()
                    or not member.size
                    or "/." in f"/{member.name.removeprefix('./')}"
                ):
                    continue
                name = f"{source.name}/{member.name}"
                inside = content_of(tar.extractfile(member), name)
                if own := _member(name, inside, asked, text_field):
                    met, (found, inside, asked_field) = True, own
                    yield from _documents(
                        Source(name, "", member.size, found, ""), inside, 0, end, tally, asked_field
                    )
            while rest := content.read(
                HEAD
            ):  # to the end, where a compressed stream has its checksum
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more data after its end")
            if not met:
                raise UserError(
                    f"{source.name}: nothing for --text-field {text_field}, the last member is {name}; "
                    f"expected the extension of one with text, or of JSON and its field (txt, json.text)"
                )
    except tarfile.TarError as error:
        raise UserError(
            f"{source.name}: broken, last read {name} ({error}); expected a whole tar; copy it again or "
            f"leave it out"
        ) from None
