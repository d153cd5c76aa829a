"""The folder of compiled code belongs to the user of the run alone."""

import getpass
import os
import stat
import tempfile

import pytest

from electra_ds.common.errors import UserError
from electra_ds.training.compile_cache import compile_cache, secure_compile_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return compile_cache()


def mode(folder) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


@pytest.mark.parametrize("name", ["user", r"domain\user", None])
def test_the_folder_is_the_one_that_torch_uses(folder, monkeypatch, name):
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    def user() -> str:
        if name is None:
            raise KeyError("no entry for this number")
        return name

    monkeypatch.setattr(getpass, "getuser", user)
    assert str(compile_cache()) == default_cache_dir()


def test_a_new_folder_is_made_for_this_user_alone_and_used_again(folder):
    for _ in range(2):
        secure_compile_cache()
        assert mode(folder) == 0o700


def test_an_own_folder_is_used_and_no_longer_writable_by_the_group(folder):
    folder.mkdir()
    for before, after in ((0o755, 0o755), (0o775, 0o755)):
        folder.chmod(before)
        secure_compile_cache()
        assert mode(folder) == after


def test_a_folder_that_everyone_can_write_is_refused(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"can write to it.*TMPDIR"):
        secure_compile_cache()


def test_a_link_and_a_file_are_refused(folder, tmp_path):
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to("other")
    with pytest.raises(UserError, match="TMPDIR"):
        secure_compile_cache()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(UserError, match="TMPDIR"):
        secure_compile_cache()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, -1)
    with pytest.raises(UserError, match="another user owns it"):
        secure_compile_cache()
