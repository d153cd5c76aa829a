"""Encodings of text other than UTF-8: UTF-16 and UTF-32 without a mark, and advice on the others."""

import codecs
import unicodedata

CONVERT = (
    "convert it to UTF-8 from its encoding, such as GB18030, EUC-KR, Shift_JIS, windows-1250, "
    "windows-1251, windows-1254, windows-1255 or latin1 (iconv -f ENCODING -t utf-8)"
)
LEAST_BYTES = 8
NUL_SHARE = 0.25  # least share of NUL in UTF-16 text that is also valid UTF-8


def wide_encoding(head: bytes) -> str | None:
    """Return UTF-16LE, UTF-16BE, UTF-32LE or UTF-32BE for such text without a byte order mark.

    head: the first bytes of a file. Returns None for other content, and for text without a
    character of one byte, such as a line feed or a space, because it has no NUL.
    """
    if len(head) < LEAST_BYTES or b"\0" not in head:
        return None
    if head.count(0) < NUL_SHARE * len(head) and _decoded(head, "utf-8") is not None:
        return None
    little = head[1::2].count(0) > head[::2].count(0)
    order = "LE" if little else "BE"
    names = (f"UTF-32{order}", f"UTF-32{'BE' if little else 'LE'}", f"UTF-16{order}")
    return next((name for name in names if _is_text(head, name)), None)


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
