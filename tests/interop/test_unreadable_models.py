"""A model that cannot be read is one message, also in Python."""

import contextlib
import os

import pytest

import electra_ds
from electra_ds.common.errors import UserError
from electra_ds.interop.load_model import load_pretrained
from electra_ds.training.checkpoint import find_checkpoint

LOADERS = [electra_ds.load, electra_ds.Detector.load, load_pretrained, find_checkpoint]


@contextlib.contextmanager
def as_another_user():
    """Permissions do not stop the user root."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if own == 0:
            os.seteuid(own)


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_without_permission_is_named(tmp_path, load):
    folder = tmp_path / "run"
    (folder / "ckpt" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint here"):  # imports what it needs
        load(tmp_path / "missing")
    folder.chmod(0)
    for path in (folder, folder / "ckpt", folder / "ckpt" / "5"):
        with as_another_user(), pytest.raises(UserError, match=r"cannot be read .*Permission"):
            load(path)
    folder.chmod(0o700)


@pytest.mark.parametrize("load", LOADERS)
def test_a_path_that_no_system_call_accepts_is_named(tmp_path, load):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "file" / "x": "it does not exist",
        tmp_path / "loop": "no checkpoint here",
        tmp_path / "a\0": "no checkpoint here",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(path)
        assert "\0" not in str(caught.value)
