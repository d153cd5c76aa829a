"""Suggestions for misspelled names."""

import difflib
from collections.abc import Sequence
from unicodedata import normalize


def nearest(word: str, words: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" with the most similar word, or "" if no word is similar."""
    for other in words:
        if word != other and normalize("NFC", word) == normalize("NFC", other):
            return f"; did you mean {other!a}? {word!a} is another Unicode form of it"
    matches = difflib.get_close_matches(word, words, 1)
    if not matches:
        return ""
    return f"; did you mean {matches[0]!r}?"
