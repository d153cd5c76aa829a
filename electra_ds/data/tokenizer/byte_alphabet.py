"""The alphabet of byte-level vocabularies: one printable character for each byte.

The entry of a token spells the bytes of its text in UTF-8, so a token may be a part of a character.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache

# Classes of characters. The pre-tokenizer ends a word where the class changes.
UNKNOWN_CLASS = 0  # of a byte inside a character that begins in an earlier token
LETTER = 1  # also combining marks
NUMBER = 2
OTHER = 3
WHITE_SPACE = 4
ONE_SPACE = 5  # of the token that is one space, which belongs to the word after it

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_NAMED = {byte: chr(byte) for byte in _PRINTABLE}
_NAMED |= {
    byte: chr(0x100 + number)
    for number, byte in enumerate(b for b in range(256) if b not in _NAMED)
}
BYTE_OF = {character: byte for byte, character in _NAMED.items()}
# Spellings of the single bytes, [256].
SPELLINGS = tuple(_NAMED[byte] for byte in range(256))
# Bytes that no text in UTF-8 contains.
UNUSED_BYTES = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def bytes_of(spelling: str) -> bytes:
    """Return the bytes of an entry; those of the text itself if it is not in the alphabet."""
    try:
        return bytes(BYTE_OF[character] for character in spelling)
    except KeyError:
        return spelling.encode("utf-8", "surrogatepass")


def readable(content: bytes) -> str:
    """Return the text of bytes; bytes of an incomplete character are escaped, such as \\xe2."""
    return content.decode("utf-8", "backslashreplace")


def readable_token(content: bytes) -> str:
    """Like `readable`, with U+2581 for each space."""
    return readable(content).replace(" ", "\u2581")


def edge_classes(content: bytes) -> tuple[int, int]:
    """Return the classes of the first and the last character of a token.

    A character that the token has only the first bytes of has the class of most characters with
    these bytes. UNKNOWN_CLASS for bytes inside a character, and for no bytes.
    """
    if content == b" ":
        return WHITE_SPACE, ONE_SPACE
    end = len(content)
    start = end - 1
    while start >= max(0, end - 4) and content[start] & 0xC0 == 0x80:
        start -= 1
    last = class_of_bytes(content[max(0, start) :])
    first_end = 1
    while first_end < end and content[first_end] & 0xC0 == 0x80:
        first_end += 1
    return class_of_bytes(content[:first_end]), last


@cache
def class_of_bytes(content: bytes) -> int:
    """Return the class of a character, given all of its bytes or the first ones."""
    if not content or content[0] & 0xC0 == 0x80 or content[0] in UNUSED_BYTES:
        return UNKNOWN_CLASS
    lead = content[0]
    if lead < 0x80:
        return _class_of(chr(lead))
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if content == b"\xf0":  # of an emoji more often than of a rare ideograph
        return OTHER
    known = content[:length]
    code = lead & (0x7F >> length)
    for byte in known[1:]:
        code = code << 6 | byte & 0x3F
    free_bits = 6 * (length - len(known))
    codes = range(code << free_bits, min((code + 1) << free_bits, 0x110000))
    assigned = (chr(i) for i in codes if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs"))
    counts = Counter(map(_class_of, assigned))
    return counts.most_common(1)[0][0] if counts else OTHER


def _class_of(character: str) -> int:
    if character.isspace() and not "\x1c" <= character <= "\x1f":  # \s of the pre-tokenizer
        return WHITE_SPACE
    return {"L": LETTER, "M": LETTER, "N": NUMBER}.get(unicodedata.category(character)[0], OTHER)
