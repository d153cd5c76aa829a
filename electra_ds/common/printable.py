"""Escapes for text from files and URLs that is printed to terminals, logs and tables."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

# Cc: control characters; Cf: format characters such as bidirectional overrides; Cs: surrogates;
# Zl, Zp: line and paragraph separators.
ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Format characters that words of natural languages need: zero-width non-joiner and joiner.
KEPT = "\u200c\u200d"
SHOWN_OF_WORD = 20  # characters of a long word in a message
PLAIN = re.compile(r"[ -~]*")
OTHER_THAN_ASCII = re.compile(r"[^ -~\n]+")  # a line feed in a text of JSON is escaped already


def printable(value: str | Path) -> str:
    """Return `value` as text with escapes for control, format and line-separator characters.

    These characters move the cursor, start a terminal sequence, change the direction of text, or
    cannot be encoded. A line feed becomes `\\n`, the escape character `\\x1b`. Letters of all
    scripts are unchanged.
    """
    text = str(value)
    return text if PLAIN.fullmatch(text) else "".join(map(_escaped, text))


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON for a terminal or a file; `json.loads` gives the value again.

    Letters of all scripts are written as they are. What `printable` escapes is escaped as JSON
    (`\\u001b`), as are surrogates.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return OTHER_THAN_ASCII.sub(_escaped_as_json, text)


def _escaped_as_json(found: re.Match[str]) -> str:
    text = found.group()
    if text.isprintable():
        return text
    return "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Like `printable`, but without escapes for line feeds and tabs: for texts of several lines."""
    return re.sub(r"[^\n\t]+", lambda part: printable(part.group()), text)


def shortened(value: Any, limit: int = 80) -> str:
    """Describe a value in at most `limit` printable characters.

    Returns the repr of text, numbers and None, truncated with "..." if it is longer, and type and
    length of a list, dict or other container.
    """
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif isinstance(value, (bool, int, float, type(None))):
        text = repr(value)
    else:
        text = (
            f"a {type(value).__name__} of {len(value)}"
            if hasattr(value, "__len__")
            else repr(value)
        )
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def word_shown(word: str) -> str:
    """Return a word for a message: printable, and with its first characters only if it is long."""
    return printable(word[:SHOWN_OF_WORD]) + "..." * (len(word) > SHOWN_OF_WORD)


def _escaped(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in ESCAPED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def counted(number: int, noun: str) -> str:
    """Return "1 document" or "1,234 documents". noun: singular of a noun with a plural in -s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
