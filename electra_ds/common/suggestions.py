"""Suggestions for misspelled names."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import normalize


def nearest(word: str, words: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" with the most similar word, or "" if no word is similar."""
    if hint := other_form(word, words):
        return hint
    matches = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def other_form(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean ..." with a word that is `word` in another Unicode form, or ""."""
    for other in words:
        if word != other and normalize("NFC", word) == normalize("NFC", other):
            # !a shows the difference
            return f"; did you mean {other!a}? {word!a} is another Unicode form of it"
    return ""


def other_form_of_file(path: str | Path) -> str:
    """Like `other_form`, for the name of a missing file and the names in its folder."""
    name = os.path.basename(path)
    if name.isascii():
        return ""
    try:
        return other_form(name, os.listdir(os.path.dirname(path) or "."))
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return ""
