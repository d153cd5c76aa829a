"""Cleaning of documents, and the hashes that identify equal and similar documents.

Dimensions: D documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer.normalization import Form, nfc, normalize, without_control

LINE_FEEDS = re.compile("[\n\r]+")
SHINGLE = 5  # tokens
SLOTS = 128  # of a signature; the estimate of a similarity of 0.8 has a standard error of 0.035
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd factor that spreads low bits over all 64 bits


def clean_lines(text: str, normalization: Form = "nfc") -> tuple[list[str], int]:
    """Return (cleaned lines, number of removed control characters).

    normalization: that of the tokenizer; the lines are normalized by it
    The lines have no leading and trailing white space, and empty lines are removed. With
    normalization none, the text is divided only at line feeds and carriage returns, because BERT's
    own cleaning deletes most other line ends instead of treating them as white space. So is it with
    nfc_only, where all other characters have tokens; control characters then stay, too.
    """
    lines = []
    removed = 0
    keeps_all = normalization == "nfc_only"
    is_divided_at_feeds = keeps_all or normalization == "none"
    parts = LINE_FEEDS.split(text) if is_divided_at_feeds else text.splitlines()
    for part in parts:  # line by line, because most lines are ASCII and need little work
        line = part
        if not keeps_all and (not part.isprintable() or "\ufffd" in part):
            line, count = without_control(part)
            removed += count
        # Normalized after the removal: a control character may separate a letter from its accent.
        if stripped := normalize(line, normalization).strip():
            lines.append(stripped)
    return lines, removed


def text_hash(lines: list[str]) -> tuple[int, int]:
    """Return a hash of 128 bits of cleaned lines, as two unsigned integers of 64 bits.

    Texts that differ only in case, white space and composition have equal hashes.
    """
    digest = blake2b(" ".join(map(_normalized, lines)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _normalized(line: str) -> str:
    """Return a cleaned line in lower case, with single spaces as its only white space."""
    lower = nfc(line).lower()  # a tokenizer may keep decomposed text
    if lower.isprintable() and "  " not in lower:  # the space is the only printable white space
        return lower
    return " ".join(lower.split())


def minhash() -> Any:
    """Return rensa's class for MinHash signatures. Raises UserError when rensa is not installed."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("near_duplicates needs rensa: pip install 'electra_ds[clean]'") from None
    return RMinHash


def hash_rows(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Return a uint64 hash of each row of a table, [n], given its columns of integers, each [n]."""
    hashes: np.ndarray = np.zeros(1, np.uint64)
    for column in columns:
        hashes = (hashes + column) * _SPREAD
        hashes ^= hashes >> np.uint64(32)
    return hashes


def signatures(documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return MinHash signatures (Broder, 1997) of documents: [D, SLOTS] uint16.

    documents: token ids of each document, [tokens], at least one document
    The share of equal slots estimates the Jaccard similarity of two sets of shingles. A shingle is
    SHINGLE consecutive tokens. One shingle starts at each token; those at the end are filled with
    zeros. A slot is the low 16 bits of a 32-bit slot of rensa.
    """
    ids = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    # tokens from each token to the end of its document, that token included
    remaining = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(len(ids))
    shingles = hash_rows(np.where(remaining > i, np.roll(ids, -i), 0) for i in range(SHINGLE))
    matrix = minhash().digest_matrix_from_flat_token_hashes(
        shingles, np.insert(ends, 0, 0), SLOTS, 0
    )
    return np.array(matrix.to_rows(), np.uint32).astype(np.uint16)
