"""Suggestions for misspelled names."""

import difflib


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no word is near."""
    found = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {found[0]!r}?" if found else ""
