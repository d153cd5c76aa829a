"""The verbs of data with every kind of wrong path, number and file: one message, no traceback."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_tools import workers
from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from electra_ds import cli

Verb = Callable[..., tuple[int, str]]


class Exited(BaseException):
    """Raised in the place of os._exit."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokenizer T and its data folder D."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text("the river is old .\n\nthe house of stone .\n\n" * 40)
    train_tokenizer([str(folder / "a.txt")], folder / "T", vocab_size=64)
    options = dict(sequence_length=16, valid_fraction=0.2, deduplicate=False)
    text = "\n\n".join(f"the river {i} is old" for i in range(60))
    (folder / "b.txt").write_text(text)
    prepare([str(folder / "b.txt")], folder / "T", folder / "D", **options)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: copies of a text, a tokenizer and a data folder, and odd files."""
    shutil.copytree(made, tmp_path / "here")
    folder = tmp_path / "here"
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "noise").write_bytes(bytes(range(256)) * 40)
    (folder / "cut.json").write_text('{"format": "electra_ds sha')
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))).write_text("one\n\ntwo\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Verb]:
    """Run the command line here: arguments -> (exit code, all that it printed)."""

    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", leave)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["electra-ds", *map(str, arguments)])
        code: int = 0
        try:
            cli.main()
        except Exited as exited:
            code = exited.args[0]
        except SystemExit as exited:
            code = int(exited.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    yield run


PATHS = [
    "", ".", "..", "/", "nowhere", "nowhere/deep", "a.txt", "a.txt/x", "empty", "folder", "noise",
    "cut.json", "pipe", "link", "loop", "T", "D", "D/manifest.json", "D/shards", "caf\udce9",
    "\x1b[2J", "a\nb", "x" * 300, "/".join(["y" * 200] * 30), "/dev/null", "/dev/full", "/proc/x",
    "~", "*", "[", "{a,b", "http://127.0.0.1:9/x", "http://[", "s4://x", "pipe:ls", "data:,x",
    "file:///nowhere", "memory://nowhere", "zip://a.txt::http://x", "hf://", "dataset:", "dataset:.",
]  # fmt: skip
TRAIN = ("train-tokenizer", "--vocab-size", 64)
PREPARE = ("prepare", "--sequence-length", 16, "--valid-fraction", 0)
USES = {
    "train-tokenizer --input": (*TRAIN, "--out", "new/T", "--input", "PATH"),
    "train-tokenizer --out": (*TRAIN, "--input", "a.txt", "--out", "PATH"),
    "prepare --input": (*PREPARE, "--tokenizer", "T", "--out", "new/D", "--input", "PATH"),
    "prepare --tokenizer": (*PREPARE, "--input", "a.txt", "--out", "new/D", "--tokenizer", "PATH"),
    "prepare --out": (*PREPARE, "--input", "a.txt", "--tokenizer", "T", "--out", "PATH"),
    "prepare --units": (
        *(*PREPARE, "--input", "a.txt", "--tokenizer", "T", "--out", "new/D", "--units", "PATH"),
    ),
    "prepare --keep": (
        *(*PREPARE, "--input", "a.txt", "--tokenizer", "T", "--out", "new/D", "--keep", "PATH"),
    ),
    "convert SRC": ("convert", "PATH", "--tokenizer", "T", "--out", "new/D"),
    "convert --out": ("convert", "a.txt", "--tokenizer", "T", "--out", "PATH"),
    "stage SRC": ("stage", "PATH", "--to", "new/S"),
    "stage --to": ("stage", "D", "--to", "PATH"),
    "verify": ("verify", "PATH"),
    "stats": ("stats", "PATH"),
    "stats --html": ("stats", "D", "--html", "PATH"),
    "inspect": ("inspect", "PATH"),
    "inspect --input": ("inspect", "D", "--input", "PATH"),
    "inspect --split": ("inspect", "D", "--split", "PATH"),
}
# These would fill the current folder, or one above it.
WRITE_ANYWHERE = {"", ".", "..", "/", "~", "memory://nowhere"}


def is_one_message(code: int, printed: str) -> bool:
    """Whether a command succeeded, or failed with a message for the user."""
    is_usage = code == 2 and "Usage:" in printed
    is_message = code in (1, 2) and (printed.count("error: ") >= 1 or "problem(s)" in printed)
    return (
        "Traceback" not in printed
        and "\x1b[2J" not in printed
        and (code == 0 or is_usage or is_message)
    )


@pytest.mark.parametrize("use", USES)
def test_a_wrong_path_is_one_message(verb: Verb, here: Path, use: str, monkeypatch) -> None:
    monkeypatch.setattr("electra_ds.data.remote_reader.RETRY_PAUSES", (0.01,))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failures = []
    for path in PATHS:
        writes = use.endswith(("--out", "--to", "--units", "--html"))
        if use == "stats --html" and path == "pipe":
            continue  # waits for a reader, as for any program
        if (writes and path in WRITE_ANYWHERE) or (use.endswith("--input") and path in ("/", "..")):
            continue
        shutil.rmtree(here / "new", ignore_errors=True)
        arguments = [path if part == "PATH" else part for part in USES[use]]
        code, printed = verb(*arguments)
        if not is_one_message(code, printed):
            failures.append((path[:40], code, printed[-300:]))
    assert not failures, "\n".join(map(str, failures))
    assert Path("/dev/full").is_char_device() and Path("/dev/null").is_char_device()


NUMBERS = [
    "0",
    "-1",
    "1",
    "7",
    "1e30",
    str(10**30),
    "-" + "9" * 30,
    "nan",
    "inf",
    "-inf",
    "1.5",
    "x",
    "",
]
OPTIONS = [
    (TRAIN, "--vocab-size"),
    *((PREPARE, f"--{name}") for name in (
        "sequence-length", "valid-fraction", "workers", "seed", "near-duplicates", "min-chars",
        "max-bad-fraction",
    )),
    (("stage", "D"), "--workers"),
    (("inspect", "D"), "ROW"),
    (("convert", "a.txt"), "--valid-fraction"),
]  # fmt: skip


def test_a_file_in_the_place_of_a_row_names_the_option_for_files(verb: Verb, here: Path) -> None:
    code, error = verb("inspect", "D", "--source", "b.txt")
    assert code == 2 and "ROW = 'b.txt'; expected a row number" in error
    assert "--input names the files" in error
    code, error = verb("inspect", "D", "--input", "a.txt")
    assert (
        code == 2 and "b.txt: not among the files of --input; give with --input the file" in error
    )


@pytest.mark.parametrize(("start", "option"), OPTIONS, ids=lambda part: str(part)[:30])
def test_a_wrong_number_is_one_message(verb: Verb, here: Path, start, option, monkeypatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 1)
    rest = {
        "train-tokenizer": ("--input", "a.txt", "--out", "new/T"),
        "prepare": ("--input", "a.txt", "--tokenizer", "T", "--out", "new/D"),
        "stage": ("--to", "new/S"),
        "inspect": (),
        "convert": ("--tokenizer", "T", "--out", "new/D"),
    }[start[0]]
    failures = []
    for number in NUMBERS:
        if option == "--vocab-size" and number in (str(10**30), "1e30"):
            continue  # the trainer takes any number; the option has a limit of its own
        if option == "--workers" and start[0] == "prepare" and number == "7":
            continue  # seven processes take long
        shutil.rmtree(here / "new", ignore_errors=True)
        given = ("--", number) if option == "ROW" else (f"{option}={number}",)
        code, printed = verb(*start, *rest, *given)
        if not is_one_message(code, printed):
            failures.append((number, code, printed[-300:]))
        if number in ("nan", "x", "") and code == 0:
            failures.append((number, code, "was accepted"))
    assert not failures, "\n".join(map(str, failures))


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("no such format\n"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
FILES = [
    "manifest.json", "index-train.bin", "index-valid.bin", "unigrams.npy", "tokenizer/vocab.txt",
    "tokenizer/options.json", "shards/train-000000.tar", "prepare.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_data_folder_is_one_message(verb: Verb, here: Path, name: str) -> None:
    failures = []
    for kind in DAMAGE:
        shutil.copytree("D", "damaged")
        DAMAGE[kind](here / "damaged" / name)
        for words in (
            ("verify", "damaged"),
            ("stats", "damaged"),
            ("inspect", "damaged", "0", "--source"),
            ("inspect", "damaged", "0", "--input", "b.txt"),
            ("stage", "damaged", "--to", "new"),
            ("check", "tiny", "--data", "./damaged"),
        ):
            code, printed = verb(*words)
            if not is_one_message(code, printed):
                failures.append((kind, words, code, printed[-300:]))
            is_whole = code == 0 and (words[0] == "verify" or (here / "new").exists())
            if is_whole and name not in ("prepare.json", "tokenizer/options.json"):
                failures.append((kind, words, "was accepted"))
            shutil.rmtree(here / "new", ignore_errors=True)
        shutil.rmtree("damaged")
    assert not failures, "\n".join(map(str, failures))


def test_a_file_in_the_place_of_a_data_folder_is_said_to_be_one(verb: Verb, here: Path) -> None:
    for words in (("verify", "a.txt"), ("stats", "D/manifest.json"), ("inspect", "a.txt")):
        code, error = verb(*words)
        assert code == 2 and words[1] in error
        assert "it is a file; expected a data folder" in error
    code, error = verb("stage", "a.txt", "--to", "new")
    assert code == 2 and "a.txt: is a file; expected a data folder" in error
    for path in ("pipe", "loop", "link"):
        code, error = verb(*PREPARE, "--input", "a.txt", "--out", "new", "--tokenizer", path)
        assert code == 2 and f"{path}: is a pipe, a device or a link to nothing" in error
    code, error = verb("stage", "loop", "--to", "new")
    assert code == 2 and "loop/manifest.json: cannot be read" in error


def test_the_report_of_stats_does_not_replace_a_file_of_the_data(verb: Verb, here: Path) -> None:
    before = (here / "D" / "manifest.json").read_bytes()
    code, error = verb("stats", "D", "--html", "D/manifest.json")
    assert code == 2 and "lies in the folder that the command reads" in error
    assert (here / "D" / "manifest.json").read_bytes() == before
    for _ in range(2):
        assert verb("stats", "D", "--html", "report.html")[0] == 0


def test_a_damaged_marker_is_made_again(here: Path) -> None:
    options = dict(sequence_length=16, valid_fraction=0, units=here / "U")
    whole = prepare(["a.txt"], here / "T", here / "whole", **options)
    (unit,) = (here / "U").glob("unit-*.json")
    for number, content in enumerate(
        [
            "",
            "{}",
            "[]",
            '{"plan_sha256": 1}',
            "{" * 10**5,
            unit.read_text().replace('"documents": ', '"documents": -'),
        ]
    ):
        unit.write_text(content)
        made = prepare(["a.txt"], here / "T", here / f"D{number}", **options)
        assert made == whole


def test_every_verb_of_data_is_tested() -> None:
    from electra_ds.cli import data

    verbs = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in cli.app.registered_commands
        if command.callback is not None and command.callback.__module__ == data.__name__
    }
    assert verbs == {words[0] for words in itertools.chain(USES.values())}
