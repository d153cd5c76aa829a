"""Encodings of text other than UTF-8: how UTF-16 and UTF-32 are found, and advice on the others."""

import codecs
import unicodedata

CONVERT = (
    "convert it to UTF-8 from its encoding, such as GB18030, EUC-KR, Shift_JIS, windows-874, "
    "windows-1250, windows-1251, windows-1253 to windows-1256, windows-1258 or latin1 "
    "(iconv -f ENCODING -t utf-8)"
)
HEAD = 65536  # bytes at the beginning of a file that are examined
MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
LEAST_BYTES = 8
# Control characters. They are the high bytes in UTF-16 of Latin, Cyrillic and Thai, and such bytes are
# often valid UTF-8. CONTROL_SHARE: their least share in such text.
CONTROLS = bytes([*range(9), *range(14, 32)])
CONTROL_SHARE = 0.25


def wide_encoding(head: bytes) -> str | None:
    """Return the encoding of text in UTF-16 or UTF-32, as iconv names it, or None.

    With a byte order mark it is UTF-16 or UTF-32, without one UTF-16LE, UTF-16BE, UTF-32LE or
    UTF-32BE. head: the first bytes of a file. Returns None for other content, and for text without
    a mark that is not valid UTF-8 and has no NUL, because it has no space and no line feed.
    """
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if len(head) < LEAST_BYTES:
        return None
    if _decoded(head, "utf-8") is None:
        counted = b"\0"
        if counted not in head:
            return None
    else:
        counted = CONTROLS
        if _count(head, counted) < CONTROL_SHARE * len(head):
            return None
    little = _count(head[1::2], counted) > _count(head[::2], counted)
    order = "LE" if little else "BE"
    names = (f"UTF-32{order}", f"UTF-32{'BE' if little else 'LE'}", f"UTF-16{order}")
    return next((name for name in names if _is_text(head, name)), None)


def _count(content: bytes, values: bytes) -> int:
    """Return the number of bytes that are one of some values."""
    return len(content) - len(content.translate(None, values))


def _is_text(head: bytes, encoding: str) -> bool:
    """Whether the bytes are text without control and unassigned characters."""
    text = _decoded(head, encoding)
    return text is not None and all(
        c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cn", "Co") for c in text
    )


def _decoded(head: bytes, encoding: str) -> str | None:
    """Return the text of bytes; None if they are of another encoding.

    The last character may be cut.
    """
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None
