"""What does a document's text become before it is tokenized, and when are two documents the same?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError

_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffd]"
)  # carries no text; tab and newline stay
SHINGLE = 5  # tokens
SLOTS = 128  # of a signature: the standard error of a similarity estimated as 0.8 is at most 0.035
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads bits over 64


def clean_lines(text: str) -> tuple[list[str], int]:
    """The text's lines in Unicode NFC, without control characters and outer white space; empty ones left out.

    With them the number of control characters removed.
    """
    lines, removed = [], 0
    for line in text.splitlines():  # one by one: most are ASCII, where all of this is quick
        if (
            not line.isprintable() or "\ufffd" in line
        ):  # control characters are not printable, but for U+FFFD
            line, count = _CONTROL.subn("", line)
            removed += count
        if not line.isascii():
            line = unicodedata.normalize(
                "NFC", line
            )  # last: what was deleted may have stood before an accent
        if stripped := line.strip():
            lines.append(stripped)
    return lines, removed


def text_hash(lines: list[str]) -> tuple[int, int]:
    """128 bits that are equal for texts equal but for case and white space, as two unsigned 64-bit halves."""
    digest = blake2b(" ".join(map(_normalised, lines)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _normalised(line: str) -> str:
    """A cleaned line without upper case, its white space single spaces, which alone of white space are printable."""
    lower = line.lower()
    return lower if lower.isprintable() and "  " not in lower else " ".join(lower.split())


def minhash() -> Any:
    """Rensa's class for signatures; UserError when it is not installed."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("near_duplicates needs rensa: pip install 'electra_ds[clean]'") from None
    return RMinHash


def hash_rows(columns: Iterable[np.ndarray]) -> np.ndarray:
    """A uint64 hash of each row, given as columns of whole numbers."""
    hashes = np.uint64(0)
    for column in columns:
        hashes = (hashes + column) * _ODD
        hashes ^= hashes >> np.uint64(32)
    return hashes


def signatures(documents: Sequence[np.ndarray]) -> np.ndarray:
    """[D, SLOTS] uint16: MinHash signatures (Broder, 1997) of documents given as token ids, the low halves of rensa's.

    The share of equal slots estimates the Jaccard similarity of the sets of shingles: SHINGLE tokens in a row, from
    each token on, those at the end filled up by zeros.
    """
    ids, ends = np.concatenate(documents), np.cumsum([len(document) for document in documents])
    left = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(
        len(ids)
    )  # tokens from each one to its document's end
    shingles = hash_rows(np.where(left > i, np.roll(ids, -i), 0) for i in range(SHINGLE))
    matrix = minhash().digest_matrix_from_flat_token_hashes(
        shingles, np.insert(ends, 0, 0), SLOTS, 0
    )
    return np.array(matrix.to_rows(), np.uint32).astype(np.uint16)
