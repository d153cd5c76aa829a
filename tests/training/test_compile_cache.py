"""The folder of compiled code belongs to the user of the run alone."""

import os
import tempfile

import pytest

from electra_ds.common.errors import UserError
from electra_ds.training.compile_cache import NAME, VARIABLE, set_compile_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / NAME.format(user=os.geteuid())


def test_a_new_folder_is_made_for_this_user_alone_and_used_again(folder):
    for _ in range(2):
        os.environ[VARIABLE] = ""
        set_compile_cache()
        assert os.environ[VARIABLE] == str(folder) and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_the_environment_is_kept(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, "own")
    set_compile_cache()
    assert os.environ[VARIABLE] == "own" and not folder.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UserError, match=f"can write to it.*{VARIABLE}"):
        set_compile_cache()
    assert not os.environ[VARIABLE]


def test_a_link_and_a_file_are_refused(folder, tmp_path):
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to("other")
    with pytest.raises(UserError, match=VARIABLE):
        set_compile_cache()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(UserError, match=VARIABLE):
        set_compile_cache()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, -1)
    with pytest.raises(UserError, match="another user owns it"):
        set_compile_cache()
