"""Output paths: refused before the work, written whole or not at all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import write_output
from electra_ds.common.outputs import (
    check_output_file,
    check_output_folder,
    check_outside,
    new_folder,
)


@pytest.fixture
def no_replace(monkeypatch):
    """No file is renamed: a test of root that fails would replace a device of the machine."""
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail(f"os.replace{paths}"))


def test_a_new_folder_appears_whole(tmp_path):
    for name in ("missing", "below/missing", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        with new_folder(path, "--out") as unfinished:
            (unfinished / "x").write_text("1")
            assert not path.exists() or not any(path.iterdir())
        assert (path / "x").read_text() == "1" and not unfinished.exists()


def test_a_failed_block_leaves_nothing_and_names_the_path(tmp_path):
    for existing in (False, True):
        path = tmp_path / f"new{existing}"
        if existing:
            path.mkdir()
        for error in (
            lambda folder: OSError(28, "No space left on device", f"{folder}/y"),
            lambda folder: OSError(f"{folder}/y: No space left on device"),
        ):
            with (
                pytest.raises(RunFailure, match=r"--out .*No space left") as caught,
                new_folder(path, "--out") as unfinished,
            ):
                (unfinished / "x").write_text("1")
                raise error(unfinished)
            assert ".tmp" not in str(caught.value)
        assert path.exists() == existing and not list(tmp_path.glob(".*"))


def test_a_new_folder_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "new", "--out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("file", "is a file|is also an input"),
        ("file/below", "cannot be written|is a file"),
        ("x" * 300, "too long"),
        ("full", "not empty|is a folder"),
    ],
)
def test_impossible_places_are_refused(tmp_path, place, part):
    (tmp_path / "file").write_text("content")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    path = tmp_path / place
    with pytest.raises(UserError, match=part), new_folder(path, "--out"):
        pass
    with pytest.raises(UserError, match=part):
        check_output_file(path, "--out", (tmp_path / "file",))
    if place != "full":
        with pytest.raises(UserError, match=part):
            check_output_folder(path, "--out")
    assert (tmp_path / "file").read_text() == "content"


def test_an_output_in_an_input_folder_is_refused(tmp_path):
    (tmp_path / "read" / "below").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "read")
    inputs = {"MODEL": tmp_path / "read", "--tokenizer": None, "SRC": tmp_path / "file"}
    for place in ("read", "read/new/x", "read/below/x", "link/x", "read/../link/x"):
        with pytest.raises(UserError, match=r"--out .*\(MODEL .*read\); choose a path outside"):
            check_outside(tmp_path / place, "--out", inputs)
    with pytest.raises(UserError, match="MODEL"):
        check_outside(tmp_path / "read" / "x", "--out", {"MODEL": tmp_path / "link"})
    for place in ("new", "reading", "read/../x", "file", "."):
        check_outside(tmp_path / place, "--out", inputs)
    with pytest.raises(UserError, match="null"):
        check_outside(Path("a\0b"), "--out", inputs)


def test_an_unreadable_input_is_not_said_to_be_unwritable(tmp_path):
    read = str(tmp_path / "input")
    with pytest.raises(PermissionError, match="input"), new_folder(tmp_path / "new", "--out"):
        raise PermissionError(13, "Permission denied", read)


def test_character_devices_and_streams_are_written_as_they_are(tmp_path, no_replace):
    check_output_file(Path(os.devnull), "--out")
    write_output(os.devnull, b"x")
    assert not Path(os.devnull).is_file()
    reader, writer = os.pipe()  # as `>(command)` in bash
    check_output_file(Path(f"/dev/fd/{writer}"), "--out")
    write_output(f"/dev/fd/{writer}", b"content")
    assert os.read(reader, 99) == b"content"
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="No space left") as caught:
        write_output("/dev/full", b"x")
    assert caught.value.filename == "/dev/full"


def test_an_output_at_a_redirected_stream_is_written_into_its_file(tmp_path):
    code = "import os; from electra_ds.common.files import write_output; os.replace = None; "
    code += "write_output('/dev/stdout', b'x')"
    with open(tmp_path / "file", "wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("is_link", [False, True])
def test_pipes_and_sockets_are_refused(tmp_path, is_link):
    """Opening a pipe waits until another process reads it."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/socket")  # the full path may be too long
        os.close(folder)
        for name in ("pipe", "socket"):
            path = tmp_path / name
            if is_link:
                path = tmp_path / f"{name}-link"
                path.symlink_to(tmp_path / name)
            with pytest.raises(UserError, match=r"--out .*is a named pipe, a socket or a disk"):
                check_output_file(path, "--out")
