"""Requests to stop or to save: files touched in the run folder."""

import os
import time

import pytest

from electra_ds.training import stop_requests
from electra_ds.training.stop_requests import StopRequests


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """The requests of rank 0 in a run folder, which it looks at in every call."""
    monkeypatch.setattr(stop_requests, "LOOK_SECONDS", 0.0)
    return StopRequests(tmp_path, True, [], time.monotonic(), None)


def test_a_touched_file_is_one_request(requests, tmp_path):
    assert not requests.should_save() and not requests.should_stop()
    (tmp_path / "SAVE").touch()
    os.mkfifo(tmp_path / "STOP")
    assert requests.should_save() and not requests.should_save()
    assert requests.should_stop() and requests.reasons == ["OUT/STOP"]
    assert not os.listdir(tmp_path)


def test_a_link_is_removed_itself(requests, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "SAVE").symlink_to(tmp_path / "folder")
    assert requests.should_save() and os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_no_request_and_no_error(requests, tmp_path):
    for name in ("STOP", "SAVE"):
        (tmp_path / name).mkdir()
    assert not requests.should_stop() and not requests.should_save()
    assert sorted(os.listdir(tmp_path)) == ["SAVE", "STOP"]


def test_a_file_that_cannot_be_removed_is_one_request(requests, tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "SAVE").touch()
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert [requests.should_save() for _ in range(3)] == [True, False, False]
