"""What English prose does every Python carry? The docstrings of its modules, read with `ast`: nothing is imported.

A document is one module (or one topic of the language reference), a line of it one paragraph. Lines that look like
code, signatures or tables are left out, and so is each paragraph that has stood in an earlier document: packages copy
text from one another, and held-out text must not be training text.
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

SKIPPED = {
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
MIN_WORDS, MIN_DOCUMENT = 6, 200  # words in a paragraph, characters in a document
MIN_PLAIN = 0.8  # share of a paragraph's words that are letters only
MIN_SHARE = 0.05  # of a source in triple quotes; others are not worth parsing
TOPICS = "pydoc_data/topics.py"
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ROLE = re.compile(r":[\w:.+-]+:`~?([^`<]*?)(?: ?<[^`>]*>)?`")  # :class:`~a.b.C` -> a.b.C
_MARKUP = re.compile(r"``?([^`]*)``?_?|\*\*(\S[^*]*)\*\*|(?<!\w)\*(\w[^*]*)\*(?!\w)")
_ITEM = re.compile(
    r"^(?:[-*+\u2022]|\d+[.)]|\(?[a-z\d]\)|:\w+[^:]*:|\*{0,2}\w+ ?(?:\([^)]*\))? ?:)\s+"
)  # of a list
_HEADER = re.compile(r"^[\w*, ]+ : \S")  # of a parameter: "x, y : array_like"
_CODE = re.compile(r">>>|[|{}\\@$~^]|[<>=]=|->|https?:")
_CODE_LINE = re.compile(r"^(?:\.\.|\W+$)")  # a directive, a continued example, a rule
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def source_files(roots: list[Path] | None = None) -> list[tuple[str, Path]]:
    """(name, path) of each module read: the standard library first, then the installed packages, by name."""
    if roots is None:
        roots = [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")]
    found: dict[Path, str] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if (
                not SKIPPED.intersection(parts)
                and "site-packages" not in parts
                and "dist-packages" not in parts
            ):
                found.setdefault(path, "/".join(parts))
    return [(name, path) for path, name in found.items()]


def docstrings(source: str, name: str) -> list[list[str]]:
    """The documents of one module, each a list of raw docstrings; none when it does not parse."""
    if sum(map(len, source.split('"""')[1::2])) < MIN_SHARE * len(source) and name != TOPICS:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    if name == TOPICS:  # a dictionary: topic -> text of the language reference
        return [
            [v.value]
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for v in node.values
            if isinstance(v, ast.Constant) and isinstance(v.value, str)
        ]
    return [list(_docstrings_of(tree))]


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of all inside it, in the order of the source."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and (
        text := ast.get_docstring(node, clean=False)
    ):
        yield text
    for child in node.body:
        if isinstance(child, (*_DEFINITIONS, ast.If, ast.Try, ast.With)):
            yield from _docstrings_of(child)


def paragraphs(docstring: str) -> Iterator[str]:
    """The prose of a docstring, one paragraph at a time: a run of lines of equal indentation without code in it."""
    run: list[str] = []
    indent: int | None = None  # None after the first line of a list item: its second line decides
    for line in [*inspect.cleandoc(docstring).split("\n"), ""]:
        text, depth = line.strip(), len(line) - len(line.lstrip())
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
    text = _MARKUP.sub(lambda m: m[1] or m[2] or m[3] or "", _ROLE.sub(r"\1", " ".join(lines)))
    words = text.split()
    if len(words) < MIN_WORDS or any(map(_CODE_LINE.match, lines)) or _CODE.search(text):
        return None
    plain = sum(bool(_WORD.fullmatch(word.strip(".,;:!?()\"'"))) for word in words)
    if plain < MIN_PLAIN * len(words) or text[-1] not in ".:;!?)\"'" or not text[0].isalnum():
        return None
    return re.sub("::$", ":", " ".join(words))


def documents(files: list[tuple[str, Path]] | None = None) -> Iterator[tuple[str, int, str]]:
    """(module name, bytes of its source, text) of each document, in the order of `source_files`, no paragraph twice."""
    seen: set[bytes] = set()
    for name, path in files if files is not None else source_files():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        size = path.stat().st_size  # told once
        for texts in docstrings(source, name) or [[]]:
            kept = []
            for paragraph in (p for text in texts for p in paragraphs(text)):
                key = blake2b(
                    " ".join(_WORD.findall(paragraph.lower())).encode(), digest_size=10
                ).digest()
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
            document = "\n".join(kept)
            yield name, size, document if len(document) >= MIN_DOCUMENT else ""
            size = 0
