"""Suggestions for misspelled names."""

import difflib
from collections.abc import Sequence


def nearest(word: str, words: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" with the most similar word, or "" if no word is similar."""
    matches = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
