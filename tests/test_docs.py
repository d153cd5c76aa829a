"""README and docs: links resolve, verbs and options that they name exist, lines stay short."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from running import ROOT

from electra_ds.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def commands(page: Path) -> list[list[str]]:
    """The words of each `electra-ds VERB ...` in fenced blocks; lines that end in \\ are joined."""
    found = []
    for block in re.findall(r"(?ms)^```\w*\n(.*?)^```", page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?electra-ds (\S+.*)", line)
            if match:
                found.append(shlex.split(match[1], comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor[1:] in anchors(there), f"{page.name}: {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_exist(page: Path) -> None:
    for words in commands(page):
        if not re.fullmatch(r"[a-z-]+", words[0]) or words[0].startswith("-"):
            continue
        assert words[0] in VERBS, f"{page.name}: electra-ds {words[0]}"
        options = {name for p in VERBS[words[0]].params for name in (*p.opts, *p.secondary_opts)}
        for word in words[1:]:
            option = word.partition("=")[0]
            if re.fullmatch(r"--[a-z-]+", option) and option != "--help":
                assert option in options, f"{page.name}: electra-ds {words[0]} {option}"


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
