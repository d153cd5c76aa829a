"""Mistakes in the arguments of check, pretrain, status and plot: one message, no traceback."""

import faulthandler
import json
import os
from pathlib import Path

import pytest
from logged_run import log_run
from running import run_cli
from typer.testing import CliRunner

import electra_ds.cli
from electra_ds.cli.console import app
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.config.loading import find_config

PATHS = ["nowhere", "file", "folder", "fifo", "bytes", "", "/", "x" * 300, "a\x1b[31m", "file/x"]
PATHS += [f"./{name}.json" for name in ("nowhere", "file", "folder", "fifo", "bytes", "list")]
NUMBERS = ["0", "-1", "1.5", "nan", "inf", "1e400", "9" * 5000, "x", ""]
# Words of a command, with the argument left out that the test gives.
TAKES_PATH = {
    "check": ["check"],
    "check --engine": ["check", "tiny", "--engine"],
    "check --data": ["check", "tiny", "--data"],
    "pretrain": ["pretrain", "--data", "D", "--out", "O"],
    "pretrain --engine": ["pretrain", "tiny", "--data", "D", "--out", "O", "--engine"],
    "status": ["status"],
    "plot": ["plot"],
    "plot --out": ["plot", "run", "--out"],
}
TAKES_NUMBER = {
    "check --world-size": ["check", "tiny", "--world-size"],
    "pretrain --world-size": ["pretrain", "tiny", "--data", "D", "--out", "O", "--world-size"],
    "pretrain --stop-at-step": ["pretrain", "tiny", "--data", "D", "--out", "O", "--stop-at-step"],
    "pretrain --max-minutes": ["pretrain", "tiny", "--data", "D", "--out", "O", "--max-minutes"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files of several kinds and the metrics of a run."""
    for suffix in ("", ".json"):
        (tmp_path / f"file{suffix}").write_text("")
        (tmp_path / f"bytes{suffix}").write_bytes(b"\xff\xfe")
        (tmp_path / f"folder{suffix}").mkdir()
        os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "run").mkdir()
    log_run(tmp_path / "run", [1, 2])
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def no_stacks_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams of CliRunner have no file, which faulthandler needs."""
    monkeypatch.setattr(faulthandler, "register", lambda *_, **__: None)


def is_refused_or_done(words: list[str]) -> bool:
    """Whether a command ends without a traceback."""
    error = CliRunner().invoke(app, words).exception
    if isinstance(error, OSError):
        return error.filename is not None  # `main` prints it in one line
    return isinstance(error, (UserError, RunFailure, SystemExit, type(None)))


@pytest.mark.parametrize("command", TAKES_PATH)
def test_any_path_is_one_message(folder: Path, command: str) -> None:
    for path in PATHS:
        assert is_refused_or_done([*TAKES_PATH[command], path]), path


@pytest.mark.parametrize("command", TAKES_NUMBER)
def test_any_number_is_one_message(folder: Path, command: str) -> None:
    for number in NUMBERS:
        assert is_refused_or_done([*TAKES_NUMBER[command], number]), number


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_variable_of_a_launcher_that_is_no_number_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: "abc"}.items():
        monkeypatch.setenv(key, value)
    messages: list[tuple[int, str]] = []
    monkeypatch.setattr(electra_ds.cli, "leave", lambda *arguments: messages.append(arguments))
    words = ["electra-ds", "pretrain", "tiny", "--data", "D", "--out", "O"]
    monkeypatch.setattr("sys.argv", words)
    electra_ds.cli.main()
    ((code, text),) = messages
    assert code == 2 and f"{name}='abc'" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError(2, "No such file", "a/\x1b"), 2, "error: a/\\x1b: No such file\n"),
        (PermissionError(13, "Permission denied", "a"), 2, "error: a: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (MemoryError(), 1, "error: not enough memory"),
        (RuntimeError("x: can't allocate memory: 5 bytes"), 1, "error: not enough memory"),
        (UserError("https://u:pw@h/x \x1b"), 2, "error: https://***@h/x \\x1b\n"),
        (KeyError("a bug"), 1, "Traceback"),
    ],
)
def test_errors_of_the_system_are_one_message_and_bugs_are_not(monkeypatch, error, code, message):
    def fail() -> None:
        raise error

    left: list[tuple[int, str]] = []
    monkeypatch.setattr(electra_ds.cli, "app", fail)
    monkeypatch.setattr(electra_ds.cli, "leave", lambda *arguments: left.append(arguments))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    electra_ds.cli.main()
    assert left[0][0] == code and message in left[0][1]


def test_the_version_is_printed() -> None:
    assert run_cli("--version").stdout.startswith("electra-ds ")


def test_check_says_that_it_runs_the_code_of_a_factory(folder: Path) -> None:
    values = json.loads(find_config("tiny", "pretrain").read_text())
    values |= {"model": {"factory": "no_such_module:build"}, "generator": None}
    (folder / "own.json").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["check", "./own.json"])
    assert "running the code of model.factory = no_such_module:build" in result.output
    assert isinstance(result.exception, UserError)
