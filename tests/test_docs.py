"""README and docs: links resolve, verbs and options exist, batch sizes fit the ranks, lines stay short."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from running import ROOT

from electra_ds.cli import app
from electra_ds.config.loading import config_names, load_run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands
# Scripts of launch/ and the verb that gets their words.
SCRIPTS = {
    **dict.fromkeys(("local", "deepspeed", "torchrun", "mpi", "pretrain"), "pretrain"),
    "prepare": "prepare",
    "glue": "finetune",
}
GPUS_PER_NODE = 8  # of the nodes in the pages, as in launch/hostfile.example
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
    """The words of a command line; none of a line that is no command."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe
        return []


def without_variables(words: list[str]) -> list[str]:
    """The words from the command on, without the variables before it."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def call_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(verb, its words) of a command of ours, from the words of its line; else None.

    `electra-ds VERB ...`, `... -m electra_ds VERB ...`, `VERB ...` in inline code, and the scripts
    of launch/, which pass their words to a verb; what stands before a script is for sbatch.
    """
    words = without_variables(words)
    script = next((word for word in words if word.startswith("launch/")), "")
    verb = SCRIPTS.get(Path(script).stem)
    if not words:
        return None
    if verb:
        return verb, words[words.index(script) + 1 :]
    program = next((name for name in ("electra-ds", "electra_ds") if name in words[:6]), words[0])
    rest = words[words.index(program) + 1 :]
    if program in ("electra-ds", "electra_ds") and re.fullmatch(r"[a-z][a-z-]*", "".join(rest[:1])):
        return rest[0], rest[1:]
    return (words[0], words[1:]) if words[0] in VERBS else None


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(verb, its words) of every command of ours that a page names."""
    for line in code(page):
        call = call_of(words_of(line))
        if call:
            yield call


def option(words: list[str], *names: str) -> str | None:
    """The value of an option, given as `NAME VALUE` or `NAME=VALUE`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return None


def number_of_ranks(line: str, words: list[str]) -> int | None:
    """The number of ranks that a line with `check` or `pretrain` starts, None if it is a letter.

    A launcher without a number starts GPUS_PER_NODE ranks on each node.
    """

    def number(text: str | None, default: int) -> int:
        return default if text is None else int(text)

    variables = dict(re.findall(r"\b(RANKS|NODES)=(\w+)", line))
    try:
        if "--world-size" in words:
            return number(option(words, "--world-size"), 1)
        if "pretrain.sbatch" in line:
            tasks = number(option(words, "--ntasks-per-node"), GPUS_PER_NODE)
            return number(option(words, "--nodes"), 1) * tasks
        if "deepspeed.sh" in line:
            hosts = (ROOT / "launch/hostfile.example").read_text(encoding="utf-8")
            return sum(int(slots) for slots in re.findall(r"slots=(\d+)", hosts))
        if "launch/" in line:  # RANKS: of each node of torchrun.sh, of all nodes elsewhere
            nodes = number(variables.get("NODES"), 1)
            return nodes * number(variables.get("RANKS"), GPUS_PER_NODE)
        if "torchrun" in words or "deepspeed" in words:
            return number(option(words, "--nproc_per_node", "--num_gpus"), GPUS_PER_NODE)
        return 1
    except ValueError:  # RANKS=N
        return None


def runs(page: Path) -> Iterator[tuple[str, list[str], int]]:
    """(preset, settings, number of ranks) of every complete `check` and `pretrain` of a page."""
    for line in code(page):
        for part in re.split(r";\s*|&&", line.strip('"')):  # `pdsh ... "cd P; COMMAND"`
            words = words_of(part.strip().strip('"'))
            verb, rest = call_of(words) or ("", [])
            if (
                verb not in ("check", "pretrain")
                or not rest
                or rest[0] not in config_names("pretrain")
            ):
                continue
            values = [value for name, value in pairwise(rest) if name == "--set"]
            ranks = number_of_ranks(part, words)
            if ranks is not None:
                yield rest[0], [value for value in values if "=" in value], ranks


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
            name = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][a-z-]*", name) and name != "--help":
                assert name in options, f"{page.name}: electra-ds {verb} {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_batch_sizes_of_the_examples_fit_their_ranks(page: Path) -> None:
    """`check` and `pretrain` with a preset: the global batch can be divided among the ranks."""
    for preset, settings, ranks in runs(page):
        load_run(preset, settings).accumulation(ranks)  # UserError if the rows cannot be divided


def test_the_commands_of_the_pages_are_found() -> None:
    """The tests above find commands in blocks, in inline code, after variables and in scripts."""
    found = {verb for page in PAGES for verb, _ in calls(page)}
    assert set(VERBS) <= found, set(VERBS) - found
    launched = [words for verb, words in calls(ROOT / "docs/clusters.md") if verb == "pretrain"]
    assert any("--data" in words for words in launched)
    ranks = [ranks for _, _, ranks in runs(ROOT / "docs/clusters.md")]
    # check, SLURM, torchrun: 32 ranks; a hostfile, torchrun under pdsh, MPI: 16 ranks
    assert ranks.count(32) >= 4 and ranks.count(16) >= 4 and 2 in ranks, ranks


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
