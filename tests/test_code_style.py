"""Style of the code: linter, formatter, types, length of functions, docstrings, plain words."""

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

PACKAGES = ("electra_ds", "data_tools")
CODE = (*PACKAGES, "bench", "tests")
LONGEST_BODY = 60  # lines of a function
# Words of sentences without a clear subject.
RIDDLE = re.compile(
    r"\b(whose|whom|nobody|somebody|(gone|goes|go) on with|(is|are|was|were) told|at work"
    r"|what is said)\b",
    re.IGNORECASE,
)
# Pages that are not in the repository.
FOREIGN_PAGES = re.compile(r"\bseams\b|\blearning\.md\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """The Python files below folders of the repository."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def texts() -> list[Path]:
    """Files with text for readers, except this one, which contains the words to find."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").iterdir()]
    files = [*sources(*CODE), *(path for path in sorted(pages) if path.is_file())]
    return [path for path in files if path != Path(__file__).resolve()]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def tool(name: str) -> str:
    """The path of a program of this environment; without it the test is skipped."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"no {name} here (pip install -e '.[test]')")


def succeeds(*command: str) -> None:
    """Run a command in the root of the repository; fails with its output."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def none_found(places: Iterator[str]) -> None:
    """Fail with all places."""
    found = list(places)
    assert not found, "\n" + "\n".join(found)


# ------------------------------------------------------------------------------------------- tools


def test_the_code_passes_ruff() -> None:
    succeeds(tool("ruff"), "check", "--no-cache", *CODE, "setup.py")


def test_the_code_is_formatted() -> None:
    succeeds(tool("ruff"), "format", "--check", "--no-cache", *CODE, "setup.py")


def test_the_packages_pass_mypy() -> None:
    succeeds(tool("mypy"))


# --------------------------------------------------------------------------- functions, docstrings


def test_no_function_is_too_long() -> None:
    """The lines of the body count; the parameters of a verb are a table of its options."""

    def long_functions() -> Iterator[str]:
        for path in sources(*PACKAGES):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, Function):
                    lines = node.end_lineno - node.body[0].lineno + 1
                    if lines > LONGEST_BODY:
                        yield f"{path}:{node.lineno}: {node.name} has {lines} lines"

    none_found(long_functions())


def test_modules_public_classes_and_functions_have_docstrings() -> None:
    def undocumented() -> Iterator[str]:
        for path in sources(*PACKAGES):
            tree = tree_of(path)
            if tree.body and not ast.get_docstring(tree):
                yield f"{path}: the module"
            for node in tree.body:
                is_public = isinstance(node, ast.ClassDef | Function) and node.name[0] != "_"
                if is_public and not ast.get_docstring(node):
                    yield f"{path}:{node.lineno}: {node.name}"

    none_found(undocumented())


def test_only_tables_of_data_are_not_formatted() -> None:
    """`fmt: skip` ends an assignment of a literal table only; `fmt: off` is not used."""
    tables = (ast.Dict, ast.List, ast.Tuple, ast.Set)

    def unformatted() -> Iterator[str]:
        for path in sources(*CODE):
            ends = {
                node.end_lineno
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, tables)
            }
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                mark = re.search(r"# fmt: (skip|off)", line)
                if mark and (mark[1] == "off" or number not in ends):
                    yield f"{path}:{number}"

    none_found(unformatted())


# ------------------------------------------------------------------------------------------- words


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a person reads: strings and comments of Python, lines of other files."""
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    if path.suffix != ".py":
        yield from lines
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    yield from ((number, line.partition("# ")[2]) for number, line in lines)


def test_sentences_have_a_clear_subject() -> None:
    none_found(
        f"{path}:{number}: {match[0]}"
        for path in texts()
        for number, text in prose(path)
        for match in RIDDLE.finditer(text)
    )


def test_no_module_docstring_begins_with_a_question() -> None:
    none_found(
        str(path)
        for path in sources(*CODE)
        if (ast.get_docstring(tree_of(path)) or "").partition("\n")[0].rstrip().endswith("?")
    )


def test_texts_refer_only_to_pages_of_the_repository() -> None:
    none_found(
        f"{path}: {match[0]}"
        for path in texts()
        for match in FOREIGN_PAGES.finditer(path.read_text(encoding="utf-8"))
    )
