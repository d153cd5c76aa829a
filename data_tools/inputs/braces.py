"""Expansion of brace patterns, such as `x-{000..003}.tar` and `{a,b}.txt`, with a limit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened

MOST = 100_000  # names of one pattern
DEEPEST = 16  # nested braces
MOST_BRACES = 100  # of one pattern
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d{1,18}))?")


def expand_braces(pattern: str) -> list[str]:
    """Return the names of a pattern in order; [pattern] if it has no braces to expand.

    Lists `{a,b}`, ranges of numbers `{000..010}` and of letters `{a..e}`, both also with a step
    (`{0..10..5}`), nested and side by side, as in bash. Other braces stay as they are. UserError
    when there are more than MOST names or MOST_BRACES braces, or braces nested more than DEEPEST deep.
    """
    if pattern.count("{") > MOST_BRACES:
        raise _too_large(pattern, "too many parts")
    names = _expand(pattern, pattern, 0)
    found = list(itertools.islice(names, MOST + 1))
    if len(found) > MOST:
        raise _too_large(pattern, f"more than {MOST:,} names")
    return found


def _too_large(pattern: str, problem: str) -> UserError:
    return UserError(
        f"{shortened(pattern)}: its braces give {problem}; expected fewer; name a folder or a glob "
        "(*) instead"
    )


def _expand(text: str, pattern: str, depth: int) -> Iterator[str]:
    """Yield the expansions of a part of a pattern."""
    if depth > DEEPEST:
        raise _too_large(pattern, f"parts nested more than {DEEPEST} deep")
    literal, choices, rest = _first_braces(text, pattern, depth)
    if choices is None:
        yield text
        return
    # The rest is expanded once, and no more names of it are kept than the limit allows.
    ends = list(itertools.islice(_expand(rest, pattern, depth), MOST + 1))
    for choice in choices:
        for end in ends:
            yield literal + choice + end


def _first_braces(text: str, pattern: str, depth: int) -> tuple[str, Iterator[str] | None, str]:
    """Return (text before the first braces to expand, their values, text after them).

    The values are None if there are no such braces.
    """
    for start, end, commas in _pairs(text):
        inside = text[start + 1 : end]
        if commas:
            cuts = [start, *commas, end]
            parts = [text[a + 1 : b] for a, b in itertools.pairwise(cuts)]
            choices = (name for part in parts for name in _expand(part, pattern, depth + 1))
            return text[:start], choices, text[end + 1 :]
        numbers = _numbers(inside, pattern)
        if numbers is not None:
            return text[:start], numbers, text[end + 1 :]
    return text, None, ""


def _pairs(text: str) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (start, end, commas of the same level) of all matching braces, sorted by start."""
    opened: list[tuple[int, list[int]]] = []
    found = []
    for position, character in enumerate(text):
        if character == "{":
            opened.append((position, []))
        elif character == "," and opened:
            opened[-1][1].append(position)
        elif character == "}" and opened:
            start, commas = opened.pop()
            found.append((start, position, commas))
    yield from sorted(found)


def _numbers(inside: str, pattern: str) -> Iterator[str] | None:
    """Return the values of a range, None if the text between the braces is no range."""
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        digits = [part.lstrip("-") for part in (match[1], match[2])]
        is_padded = any(len(part) > 1 and part[0] == "0" for part in digits)
        width = max(len(match[1]), len(match[2])) if is_padded else 0
        return (f"{value:0{width}d}" for value in _values(first, last, match[3], pattern))
    if match := _LETTERS.fullmatch(inside):
        codes = _values(ord(match[1]), ord(match[2]), match[3], pattern)
        return (chr(code) for code in codes)
    return None


def _values(first: int, last: int, step: str | None, pattern: str) -> range:
    """Return the values from `first` to `last`, both included, up or down."""
    size = abs(int(step or 1)) or 1
    values = range(first, last + 1, size) if first <= last else range(first, last - 1, -size)
    if len(values) > MOST:
        raise _too_large(pattern, f"a range of {len(values):,} numbers")
    return values
