"""README and docs: links resolve, verbs and options that they name exist, lines stay short."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from running import ROOT

from electra_ds.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands
# Scripts of launch/ and the verb that gets their words.
SCRIPTS = {
    **dict.fromkeys(("local", "deepspeed", "torchrun", "mpi", "pretrain"), "pretrain"),
    "prepare": "prepare",
    "glue": "finetune",
}
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def code(page: Path) -> Iterator[str]:
    """The lines of fenced blocks, joined where they end in a backslash, and the inline code."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"(?ms)^```\w*\n(.*?)^```")
    for block in fenced.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for inline in re.findall(r"`([^`]+)`", fenced.sub("", text)):
        yield " ".join(inline.split())


def words_of(line: str) -> list[str]:
    """The words of a command line, without variables before the command."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: no command
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(verb, its words) of every command of ours that a page names.

    `electra-ds VERB ...`, `VERB ...` in inline code, and the scripts of launch/, which pass their
    words to a verb; what stands before a script is for sbatch.
    """
    for line in code(page):
        words = words_of(line)
        if not words:
            continue
        script = next((word for word in words if word.startswith("launch/")), "")
        verb = SCRIPTS.get(Path(script).stem)
        if words[0] == "electra-ds" and re.fullmatch(r"[a-z][a-z-]*", " ".join(words[1:2])):
            yield words[1], words[2:]
        elif verb:
            yield verb, words[words.index(script) + 1 :]
        elif words[0] in VERBS:
            yield words[0], words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor[1:] in anchors(there), f"{page.name}: {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_exist(page: Path) -> None:
    for verb, words in calls(page):
        assert verb in VERBS, f"{page.name}: electra-ds {verb}"
        params = VERBS[verb].params
        options = {name for param in params for name in (*param.opts, *param.secondary_opts)}
        for word in words:
            option = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][a-z-]*", option) and option != "--help":
                assert option in options, f"{page.name}: electra-ds {verb} {option}"


def test_the_commands_of_the_pages_are_found() -> None:
    """The test above finds commands in blocks, in inline code, after variables and in scripts."""
    found = {verb for page in PAGES for verb, _ in calls(page)}
    assert set(VERBS) <= found, set(VERBS) - found
    launched = [words for verb, words in calls(ROOT / "docs/clusters.md") if verb == "pretrain"]
    assert any("--data" in words for words in launched)


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    in_block = False
    for line in lines:
        in_block ^= line.startswith("```")
        if line.startswith("|"):
            assert all(len(cell.strip()) <= 100 for cell in line.split("|")), line
        elif not in_block:
            assert len(line) <= 120, line
