"""The lock of a folder: refusal of a second job, takeover from a dead owner, heartbeats, races."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lock_owner import hold
from running import CPU, read_json

from electra_ds.common import folder_lock
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.common.processes import machine_id, start_time

RACE = """
import sys
from pathlib import Path
from electra_ds.common import folder_lock as lock
lock.BEAT_SECONDS = 0.1
for line in sys.stdin:
    try:
        with lock.Lock(Path(line.strip())):
            print("held", flush=True)
            sys.stdin.readline()
    except lock.LockedOut:
        print("refused", flush=True)
        sys.stdin.readline()
"""

DEAD = {"job": "", "restart": 0, "host": "here", "pid": 1, "started": "1", "machine": machine_id()}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "LOOK_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def wait_for(what, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def heartbeat(out: Path) -> dict:
    path = out / "heartbeat.json"
    return read_json(path) if path.exists() else {"beats": 0, "step": 0}


def move_owner_to_another_machine(out: Path) -> None:
    """Rewrite OUT/lock as if another machine had written it; its processes are not visible here."""
    other = {"host": "node7", "machine": "another", "started": "0"}
    (out / "lock").write_text(json.dumps(read_json(out / "lock") | other))


def test_a_second_job_is_refused_with_the_name_of_the_owner(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(RunFailure), Lock(out) as held:
        held.step = 7
        wait_for(lambda: heartbeat(out)["step"] == 7)
        with pytest.raises(
            LockedOut, match=rf"process {os.getpid()} on .*running there: wait for it, stop it"
        ):
            Lock(out).__enter__()
        assert not held.lost and read_json(out / "lock")["pid"] == os.getpid()
        raise RunFailure("released on a failure too")
    assert not (out / "lock").exists()
    with Lock(out) as again:
        assert not again.took_over


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_at_once(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    owner.send_signal(signal.SIGKILL)  # not waited for yet: a zombie is dead as well
    wait_for(lambda: not start_time(owner.pid))
    with Lock(tmp_path) as taken:
        assert f"process {owner.pid} on" in taken.took_over
        assert "its process has ended" in taken.took_over
    owner.wait()
    (tmp_path / "lock").write_text(json.dumps(DEAD | {"pid": os.getpid()}))
    with Lock(tmp_path) as taken:
        assert "its process has ended" in taken.took_over  # another process has the same number


def test_an_owner_on_another_machine_is_dead_when_its_heartbeat_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = hold(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    move_owner_to_another_machine(tmp_path)
    last = heartbeat(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a jump of the wall clock has no effect
    os.utime(tmp_path / "heartbeat.json", (0, 0))
    before = time.monotonic()
    with Lock(tmp_path, stale_seconds=1.0) as taken:
        assert time.monotonic() - before >= 1.0
        assert "on node7: its heartbeat did not change for 1 s" in taken.took_over
        wait_for(lambda: heartbeat(tmp_path) != last)
    owner.kill()
    owner.wait()


def test_a_job_that_slept_too_long_detects_the_loss_of_the_lock(tmp_path: Path) -> None:
    with Lock(tmp_path) as slept:
        other = read_json(tmp_path / "lock") | {"host": "node7", "nonce": "its own"}
        (tmp_path / "lock").write_text(json.dumps(other))
        wait_for(lambda: slept.lost)
        with pytest.raises(LockedOut, match=r"now names process .* on node7"):
            slept.beat()
    assert read_json(tmp_path / "lock") == other  # the lock of another job is not removed


def test_an_unexpected_error_of_the_heartbeat_sets_lost(tmp_path: Path) -> None:
    with Lock(tmp_path) as held:
        (tmp_path / "lock").write_bytes(b"\xff")
        wait_for(lambda: held.lost, 10.0)
        (tmp_path / "lock").unlink()


def test_only_a_later_start_of_the_same_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        owner = hold(tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
        owner.send_signal(signal.SIGSTOP)  # alive: only the restart count decides
        move_owner_to_another_machine(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "13" if count == 2 else "12")
        assert not Lock(tmp_path)._take()  # another job, or the same start of this job
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        if count == 2:
            with Lock(tmp_path) as taken:
                assert taken.took_over.startswith("job 12 (restart 1), process")
        owner.kill()
        owner.wait()
        (tmp_path / "lock").unlink(missing_ok=True)


def test_when_two_jobs_take_over_the_last_one_to_rename_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").write_text(json.dumps(DEAD))
    # The other job renames its lock while this one waits.
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "lock").write_text("{}"))
    second = Lock(tmp_path)
    assert not second._take() and not second.took_over and (tmp_path / "lock").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_of_many_concurrent_jobs_gets_the_lock(tmp_path: Path) -> None:
    """Four processes race for a free folder, and for the folder of a dead owner."""
    command = [sys.executable, "-c", RACE]
    racers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | CPU
        )
        for _ in range(4)
    ]
    try:
        for race in range(4):
            out = tmp_path / str(race)
            out.mkdir()
            if race % 2:
                (out / "lock").write_text(json.dumps(DEAD))
            for turn in (f"{out}\n", "done\n"):
                for racer in racers:
                    racer.stdin.write(turn)
                    racer.stdin.flush()
                if turn != "done\n":
                    found = sorted(racer.stdout.readline() for racer in racers)
                    assert found == ["held\n", *["refused\n"] * 3], race
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()


def test_a_lock_that_does_not_fit_on_the_disk_is_removed(tmp_path: Path) -> None:
    """The next start would wait for the heartbeat of an empty lock."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"not writable .*File too large"), Lock(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"pid": "x"}', '{"pid": -1}', '{"job": 3}', '{"host": []}', "\udcff\x00"],
)
def test_a_damaged_lock_is_taken_over_after_the_wait_which_is_said(tmp_path, content):
    (tmp_path / "lock").write_text(content, errors="surrogateescape")
    said = []
    with Lock(tmp_path, stale_seconds=0.2, say=said.append) as taken:
        assert taken.took_over.startswith("an unknown owner")
    assert said == [
        f"{tmp_path}/lock: held by an unknown owner; waiting up to 0 s for its heartbeat"
    ]


def test_a_folder_in_place_of_lock_or_heartbeat_is_set_aside(tmp_path):
    for name in ("lock", "heartbeat.json"):
        (tmp_path / name).mkdir()
    said = []
    with Lock(tmp_path, say=said.append):
        assert (tmp_path / "heartbeat.json").is_file()
    assert [line.rpartition("/")[2] for line in said] == ["lock.damaged", "heartbeat.json.damaged"]


def test_the_name_of_an_owner_has_no_control_characters(tmp_path):
    other = DEAD | {"host": "\x1b[31mnode7", "machine": "another"}
    (tmp_path / "lock").write_text(json.dumps(other))
    with Lock(tmp_path, stale_seconds=0.1, say=lambda _: None) as taken:
        assert "\x1b" not in taken.took_over and "node7" in taken.took_over
