"""Readers of text lines: plain text, WikiText, WikiExtractor.

A document belongs to the byte range in which its first line starts. Ranges that cut a file anywhere
therefore give each document exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain

from data_tools.formats.detect import WIKITEXT_TITLE
from data_tools.formats.source import LONGEST, Source, Tally
from electra_ds.common.special_ids import UNKNOWN

_LOOK_BACK = 4096  # bytes before a range that are read to see whether the line before it is blank
_UTF8_CONTINUATION = 3  # most bytes of a character after its first one

# White space in UTF-8: U+0085, U+00A0, U+1680, U+2000 to U+200B, U+2028, U+2029, U+202F, U+205F,
# U+3000; and the byte order mark, which is a zero-width space inside a file.
_BLANK = re.compile(
    rb"(?:\s|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8b\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
    rb"|\xef\xbb\xbf)*"
)

Line = tuple[int, bytes]  # (offset in the content, line)


def read_lines(content: BufferedReader, start: int, longest: int) -> Iterator[Line]:
    """Yield (offset, line) from the first line that starts at byte `start` or later.

    A line of more than `longest` bytes is yielded in parts. No UTF-8 character is cut.
    """
    offset = _seek_line(content, start) if start else 0
    begins_line = True
    while line := content.readline(longest):
        while longest <= len(line) < longest + _UTF8_CONTINUATION and _continues(content):
            line += content.read(1)
        if begins_line or line.strip():  # the end of a divided line is not a blank line
            yield offset, line if offset else line.removeprefix(b"\xef\xbb\xbf")
        offset += len(line)
        begins_line = line.endswith(b"\n")


def read_text(
    source: Source, content: BufferedReader, start: int, end: int, _: str, tally: Tally
) -> Iterator[str]:
    """Yield documents, which end at a blank line; for text_file, the whole file is one document."""
    whole_file = source.format == "text_file"
    previous_blank = start == 0 or _blank_before(content, start)
    document: list[Line] = []
    end_of_file = [(end, b"")]  # a blank line that ends the last document
    for offset, line in chain(read_lines(content, start, LONGEST), end_of_file):
        blank = not line if whole_file else is_blank(line)
        if document and (blank or _is_long(document, offset)):
            yield _decode(document, source, tally)
            document = [] if blank else [(offset, line)]
        elif document:
            document.append((offset, line))
        elif offset >= end:
            return
        elif not blank and previous_blank:
            document = [(offset, line)]
        previous_blank = blank


def read_wikitext(
    source: Source, content: BufferedReader, start: int, end: int, _: str, tally: Tally
) -> Iterator[str]:
    """Yield the articles. Text before the first title is a separate document."""
    document: list[Line] = []
    inside = start == 0
    previous_blank = start == 0 or _blank_before(content, start)
    end_of_file = [(end, b""), (end, b"= . =")]  # a title that ends the last article
    for offset, line in chain(read_lines(content, start, LONGEST), end_of_file):
        stripped = line.strip()
        is_title = previous_blank and bool(WIKITEXT_TITLE.fullmatch(stripped))
        if document and (is_title or _is_long(document, offset)):
            yield _decode(document, source, tally).replace("<unk>", f" {UNKNOWN} ")
            document = []
        if is_title and offset >= end:
            return
        inside = inside or is_title
        if inside and stripped:
            document.append((offset, stripped + b"\n"))
        previous_blank = not stripped


def read_wiki(
    source: Source, content: BufferedReader, start: int, end: int, _: str, tally: Tally
) -> Iterator[str]:
    """Yield the text inside the `<doc>` blocks that WikiExtractor writes."""
    document: list[Line] | None = None  # None outside a block
    end_of_file = [(end, b"<doc>")]  # a block that ends the last one
    for offset, line in chain(read_lines(content, start, LONGEST), end_of_file):
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


def is_blank(line: bytes) -> bool:
    """Return whether a line has only white space of Unicode and zero-width spaces."""
    stripped = line.strip()
    return not stripped or (stripped[0] >= 0x80 and bool(_BLANK.fullmatch(stripped)))


def _seek_line(content: BufferedReader, start: int) -> int:
    """Seek to the first line that starts at byte `start` (not 0) or later; return its offset."""
    content.seek(start - 1)
    while (line := content.readline(LONGEST)) and not line.endswith(b"\n"):
        pass
    return content.tell()


def _continues(content: BufferedReader) -> bool:
    """Whether the next byte continues a UTF-8 character."""
    return b"\x80" <= content.peek(1)[:1] < b"\xc0"


def _decode(lines: list[Line], source: Source, tally: Tally) -> str:
    """Return the text of some lines. Lines that are not UTF-8 are left out and counted."""
    tally.lines += len(lines)
    try:
        return b"".join(line for _, line in lines).decode()
    except UnicodeDecodeError:
        decoded = []
        for offset, line in lines:
            try:
                decoded.append(line.decode())
            except UnicodeDecodeError:
                tally.add_bad("not UTF-8", source, offset)
        return "".join(decoded)


def _is_long(document: list[Line], offset: int) -> bool:
    """Whether a document reaches the maximum length before its next line at `offset`."""
    return offset - document[0][0] >= LONGEST


def _blank_before(content: BufferedReader, start: int) -> bool:
    """Whether the line before the first line at byte `start` or later is blank.

    Only for uncompressed files.
    """
    first = _seek_line(content, start)
    back = max(0, first - _LOOK_BACK)
    content.seek(back)
    return is_blank(content.read(first - back)[:-1].rpartition(b"\n")[2])
