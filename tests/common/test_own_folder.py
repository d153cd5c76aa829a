"""Own folders: nothing is written, opened or removed through a link that leads out of them."""

import os

import pytest

from electra_ds.common.errors import UserError
from electra_ds.common.own_folder import (
    open_to_append,
    own_folder,
    own_path,
    remove_own,
    remove_temporary_files,
)


@pytest.fixture
def folder(tmp_path):
    """An own folder, beside a folder `victim` with a file; its links lead there."""
    (tmp_path / "victim" / "below").mkdir(parents=True)
    (tmp_path / "victim" / "below" / "file").write_text("precious")
    (tmp_path / "own" / "inside").mkdir(parents=True)
    for name, target in {"link": "../victim", "dangling": "../new", "within": "inside"}.items():
        (tmp_path / "own" / name).symlink_to(target)
    yield tmp_path / "own"
    assert (tmp_path / "victim" / "below" / "file").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_a_link_out_of_the_folder_is_refused_and_named(folder):
    for names in (
        ("link",),
        ("link", "below"),
        ("link", "none"),
        ("dangling",),
        ("inside", "..", ".."),
    ):
        for use in (own_path, own_folder):
            with pytest.raises(UserError, match=r"out of .*own; expected a path inside"):
                use(folder, *names)
    for names in (("new", "deep"), ("within", "x"), ("inside",), ()):
        assert own_folder(folder, *names).is_dir()


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert own_folder(tmp_path / "alias", "x").samefile(folder / "x")
    with pytest.raises(UserError, match="link"):
        own_folder(tmp_path / "alias", "link")


def test_links_are_removed_and_not_followed(folder):
    remove_own(folder, "link", "below")
    assert (folder / "link" / "below").exists()
    (folder / "inside" / "deep").symlink_to(folder.parent / "victim")
    for names in (("inside",), ("link",), ("dangling",), ("none",), ("none", "below")):
        remove_own(folder, *names)
    assert os.listdir(folder) == ["within"]


def test_a_file_is_appended_to_and_everything_else_is_set_aside(folder, tmp_path):
    os.mkfifo(folder / "fifo")
    (folder / "file").symlink_to(tmp_path / "victim" / "below" / "file")
    for name in ("new", "fifo", "file", "dangling", "inside"):
        for part in (b"a", b"b"):
            with open_to_append(folder / name) as file:
                file.write(part)
                assert file.name == str(folder / name)  # for messages
        assert (folder / name).read_bytes() == b"ab" and (folder / name).is_file()
    assert {path.name for path in folder.glob("*.damaged")} == {
        f"{name}.damaged" for name in ("fifo", "file", "dangling", "inside")
    }


def test_only_temporary_files_of_the_own_folder_are_removed(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own / "below", other):
        folder.mkdir(parents=True)
        for name in (".x.0123456789ab.tmp", ".notes.tmp", "x.0123456789ab.tmp"):
            (folder / name).touch()
    (own / "link").symlink_to(other)
    (own / "below" / ".0123456789ab.tmp").mkdir()
    remove_temporary_files(own)
    remove_temporary_files(own, "link")
    remove_temporary_files(own, "below")
    remove_temporary_files(own, "missing")
    assert len(list(other.iterdir())) == 3
    left = {path.name for path in (own / "below").iterdir()}
    assert left == {".notes.tmp", "x.0123456789ab.tmp", ".0123456789ab.tmp"}
