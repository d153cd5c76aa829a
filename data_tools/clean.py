"""What does a document's text become before it is tokenized, and when are two documents the same?"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

_BREAKS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # what ends a line in some alphabet or system
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffd]")  # carries no text; tab and newline stay


def clean_lines(text: str) -> list[str]:
    """The text's lines in Unicode NFC, without control characters and outer white space; empty ones left out."""
    text = _CONTROL.sub("", _BREAKS.sub("\n", text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # last: what was deleted may have stood before an accent
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def text_hash(lines: list[str]) -> tuple[int, int]:
    """128 bits that are equal for texts equal but for case and white space, as two unsigned 64-bit halves."""
    digest = blake2b(" ".join(" ".join(lines).lower().split()).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
