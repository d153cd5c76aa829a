"""Suggestions for misspelled names."""

import difflib
from collections.abc import Sequence


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or an empty text if no word is similar."""
    matches = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
