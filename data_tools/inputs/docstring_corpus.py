"""The input builtin:docs: English prose from the docstrings of the installed Python modules.

Modules are parsed with `ast` and not imported. A document is one module, or one topic of the
language reference; a line of it is one paragraph. Lines that look like code, signatures or tables
are left out. A paragraph that occurred in an earlier document is left out, too, because packages
copy text from one another and held-out text must not be training text.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

BUILTIN = "builtin:docs"
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "_vendor",
    "vendor",
    "extern",
    "__pycache__",
}
MIN_PARAGRAPH = 6  # words
MIN_DOCUMENT = 200  # characters
MIN_PLAIN = 0.8  # share of a paragraph's words that consist of letters
MIN_QUOTED = 0.05  # least share of a source in triple quotes; with less it is not parsed
TOPICS = "pydoc_data/topics.py"  # a dictionary: topic -> text of the language reference
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ROLE = re.compile(r":[\w:.+-]+:`~?([^`<]*?)(?: ?<[^`>]*>)?`")  # :class:`~a.b.C` -> a.b.C
_MARKUP = re.compile(r"``?([^`]*)``?_?|\*\*(\S[^*]*)\*\*|(?<!\w)\*(\w[^*]*)\*(?!\w)")
# Start of a list item.
_ITEM = re.compile(
    r"^(?:[-*+\u2022]|\d+[.)]|\(?[a-z\d]\)|:\w+[^:]*:|\*{0,2}\w+ ?(?:\([^)]*\))? ?:)\s+"
)
_HEADER = re.compile(r"^[\w*, ]+ : \S")  # head line of a parameter: "x, y : array_like"
_CODE = re.compile(r">>>|[|{}\\@$~^]|[<>=]=|->|https?:")
_CODE_LINE = re.compile(r"^(?:\.\.|\W+$)")  # a directive, a continued example, a rule
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def source_files(roots: list[Path] | None = None) -> list[tuple[str, Path]]:
    """Return (name, path) of each module.

    The standard library comes first, then the installed packages, each sorted by path.
    """
    if roots is None:
        roots = [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")]
    skipped = {*SKIPPED_FOLDERS, "site-packages", "dist-packages"}
    names: dict[Path, str] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not skipped.intersection(parts):
                names.setdefault(path, "/".join(parts))
    return [(name, path) for path, name in names.items()]


def docstrings(source: str, name: str) -> list[list[str]]:
    """Return the documents of one module, each a list of raw docstrings.

    The list is empty when the source has few docstrings or cannot be parsed.
    """
    quoted = sum(map(len, source.split('"""')[1::2]))
    if quoted < MIN_QUOTED * len(source) and name != TOPICS:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    if name == TOPICS:
        return [
            [value.value]
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for value in node.values
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        ]
    return [list(_docstrings_of(tree))]


def _docstrings_of(node: Any) -> Iterator[str]:
    """Yield the docstrings of an ast node and of its definitions, in the order of the source.

    node: a module, class, function, or a statement with a body
    """
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and (
        text := ast.get_docstring(node, clean=False)
    ):
        yield text
    for child in node.body:
        if isinstance(child, (*_DEFINITIONS, ast.If, ast.Try, ast.With)):
            yield from _docstrings_of(child)


def paragraphs(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of prose of a docstring.

    A paragraph is a run of lines of equal indentation that holds no code.
    """
    run: list[str] = []
    indent: int | None = None  # None after the first line of a list item; the next line sets it
    for line in [*inspect.cleandoc(docstring).split("\n"), ""]:
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        item = _ITEM.match(text)
        header = _HEADER.match(text)
        if run and (not text or item or header or indent not in (None, depth)):
            if prose := _prose(run):
                yield prose
            run = []
        if text and not header:
            indent = None if item else depth
            run.append(text[item.end() :] if item else text)


def _prose(lines: list[str]) -> str | None:
    """Return the lines as one line without markup; None if they do not look like prose."""
    text = _MARKUP.sub(lambda m: m[1] or m[2] or m[3] or "", _ROLE.sub(r"\1", " ".join(lines)))
    words = text.split()
    if len(words) < MIN_PARAGRAPH or any(map(_CODE_LINE.match, lines)) or _CODE.search(text):
        return None
    plain = sum(bool(_WORD.fullmatch(word.strip(".,;:!?()\"'"))) for word in words)
    if plain < MIN_PLAIN * len(words) or text[-1] not in ".:;!?)\"'" or not text[0].isalnum():
        return None
    return re.sub("::$", ":", " ".join(words))


def documents(files: list[tuple[str, Path]] | None = None) -> Iterator[tuple[str, int, str]]:
    """Yield (module name, bytes of its source, text) of each document, without repeated paragraphs.

    The order is that of `source_files`. The text is empty for a document that is too short. If a
    module has several documents, the first one has its bytes and the others have 0.
    """
    seen: set[bytes] = set()
    for name, path in files if files is not None else source_files():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        size = path.stat().st_size
        for texts in docstrings(source, name) or [[]]:
            kept = []
            for paragraph in (p for text in texts for p in paragraphs(text)):
                words = " ".join(_WORD.findall(paragraph.lower()))
                key = blake2b(words.encode(), digest_size=10).digest()
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
            document = "\n".join(kept)
            yield name, size, document if len(document) >= MIN_DOCUMENT else ""
            size = 0
