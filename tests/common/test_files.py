"""Files: written atomically, never through links, FIFOs or devices; only regular ones are read."""

import os
import stat

import pytest

from electra_ds.common import files
from electra_ds.common.files import (
    TEMPORARY,
    is_device,
    open_regular,
    replacing,
    sha256_file,
    write_bytes,
)


def test_what_is_at_the_path_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "created")
    os.mkfifo(tmp_path / "fifo")
    for name in ("new", "link", "dangling", "fifo"):
        write_bytes(tmp_path / name, b"x")
        assert stat.S_ISREG((tmp_path / name).lstat().st_mode)
        assert (tmp_path / name).read_bytes() == b"x"
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "created").exists() and not list(tmp_path.glob(".*"))


def test_devices_and_standard_streams_are_never_replaced(monkeypatch):
    def refuse(*_arguments):
        pytest.fail("a device of the machine would be replaced")

    for name in ("replace", "open"):
        monkeypatch.setattr(files.os, name, refuse)
    monkeypatch.setattr("builtins.open", refuse)
    for path in ("/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        with pytest.raises(OSError, match="is a device") as caught:
            write_bytes(path, b"x")
        assert caught.value.filename == path


def test_a_folder_in_shared_memory_holds_files_and_no_devices():
    assert not is_device(files.Path("/dev/shm/D/shards/train-000000.tar"))
    assert is_device(files.Path("/dev/stdout")) and is_device(files.Path("/dev/null"))


def test_a_failed_block_leaves_the_old_content(tmp_path):
    write_bytes(tmp_path / "x", b"old")
    with pytest.raises(KeyError), replacing(tmp_path / "x") as file:
        file.write(b"new")
        raise KeyError
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["write", "replace", "fsync", "fsync_folder"])
def test_an_error_names_the_file(tmp_path, monkeypatch, call):
    def fail(*_arguments):
        raise OSError(5, "Input/output error", str(tmp_path))

    if call != "write":
        monkeypatch.setattr(files if call == "fsync_folder" else files.os, call, fail)
    with pytest.raises(OSError, match=r"error|No such file") as caught:
        write_bytes(tmp_path / ("none/x" if call == "write" else "x"), b"x")
    assert caught.value.filename == str(tmp_path / ("none/x" if call == "write" else "x"))


def test_names_of_temporary_files_are_recognized(tmp_path, monkeypatch):
    made = []
    replace = os.replace
    monkeypatch.setattr(
        files.os, "replace", lambda old, new: (made.append(old.name), replace(old, new))
    )
    for name in ("x.json", "y" * 250):
        write_bytes(tmp_path / name, b"x")
    assert len(made) == 2 and all(map(TEMPORARY.fullmatch, made))
    assert not any(map(TEMPORARY.fullmatch, (".profile.tmp", ".a.0123.tmp", "a.0123456789ab.tmp")))


def test_only_regular_files_are_opened_and_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "link", "."):
        for read in (open_regular, sha256_file):
            with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
                read(tmp_path / name)
    (tmp_path / "x").write_bytes(b"x")
    with open_regular(tmp_path / "x") as file:
        assert file.read() == b"x"
