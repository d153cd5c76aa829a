"""Failures of runs: counts and limits over restarts, takeover of a run folder, error files."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import CPU, read_json, run_cli

from electra_ds.cluster.failures import MAX_FAILURES, count_failures, record_error
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.training import checkpoint


def wait_for(what, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def heartbeat_step(out: Path) -> int:
    path = out / "heartbeat.json"
    return read_json(path)["step"] if path.exists() else 0


def test_failures_are_counted_until_a_checkpoint_is_gained(tmp_path: Path) -> None:
    def attempt(step: int, *errors: BaseException, limit: int = 3, silent: str = "") -> dict:
        for rank, error in enumerate(errors):
            record_error(tmp_path, rank, error)
        count_failures(tmp_path, step, limit, silent)
        assert not list(tmp_path.glob("error-rank-*.json"))
        path = tmp_path / "restarts.json"
        return read_json(path) if path.exists() else {}

    assert attempt(0) == attempt(0, UserError("a wrong --data"), KeyboardInterrupt()) == {}
    found = attempt(0, RunFailure("a"), RuntimeError("connection closed"))
    # One per attempt, for any number of ranks.
    assert (found["failures"], found["in_a_row"]) == (1, 1)
    assert [error["error"] for error in found["errors"]] == [
        "RunFailure: a",
        "RuntimeError: connection closed",
    ]
    assert attempt(0) == found  # stopped and saved: no change
    assert attempt(0, silent="process 5 on node7: its process has ended")["in_a_row"] == 2
    assert attempt(0, OSError("b"))["in_a_row"] == 3
    assert attempt(10, OSError("c"))["in_a_row"] == 1  # a checkpoint was gained
    for _ in range(2):
        found = attempt(10, OSError("d"))
    (tmp_path / "error-rank-4.json").write_text('{"rank": 4, "err')  # the disk was full
    for _ in range(2):  # refused until the cause is corrected; refusals are not counted
        with pytest.raises(
            UserError, match=r"failed 4 times in a row at step 10 .*= 3.*rank 4.*cut short"
        ):
            attempt(10)
    assert read_json(tmp_path / "restarts.json")["failures"] == found["failures"] + 1 == 7
    attempt(10, limit=4)
    attempt(10, OSError("e"), limit=0)
    attempt(11)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "null", '{"failures": -1}', '{"failures": 1e400}', '{"errors": 3}'),
        *('{"errors": [{"rank": "x"}]}', '{"step": "9"}', "[" * 100_000, "\x00\xff"),
    ],
)
def test_damaged_records_of_failures_are_set_aside_and_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "restarts.json").write_text(content)
    (tmp_path / "error-rank-3.json").write_text(content)
    notes = count_failures(tmp_path, 5, 3, "")
    assert len(notes) == 2 and all(".json.damaged" in note for note in notes)
    assert (tmp_path / "restarts.json.damaged").read_text() == content
    found = read_json(tmp_path / "restarts.json")  # the damaged error file is counted
    assert (
        found["failures"] == 1 and "error-rank-3.json is cut short" in found["errors"][0]["error"]
    )
    assert count_failures(tmp_path, 5, 3, "") == []


def test_a_folder_in_place_of_a_record_is_set_aside(tmp_path: Path) -> None:
    for name in ("restarts.json", "error-rank-0.json"):
        (tmp_path / name).mkdir()
    assert len(count_failures(tmp_path, 5, 3, "")) == 2


def test_the_largest_accepted_counts_are_counted_on(tmp_path: Path) -> None:
    text = f'{{"failures": {MAX_FAILURES}, "in_a_row": {MAX_FAILURES}, "step": {MAX_FAILURES}}}'
    (tmp_path / "restarts.json").write_text(text)
    record_error(tmp_path, 0, RunFailure("a"))
    assert count_failures(tmp_path, 5, 0, "") == []
    found = read_json(tmp_path / "restarts.json")
    assert (found["failures"], found["in_a_row"]) == (MAX_FAILURES, MAX_FAILURES)
    assert count_failures(tmp_path, 5, 0, "") == []  # the written file is read again


def test_an_error_file_is_ascii(tmp_path: Path) -> None:
    """launch/common.sh prints no other bytes."""
    record_error(tmp_path, 0, RunFailure("caf\u00e9 \u202e \x9b31m"), host="h\u00f6st")
    assert (tmp_path / "error-rank-0.json").read_bytes().isascii()


def test_an_error_file_holds_no_secret_and_no_control_character(tmp_path: Path) -> None:
    text = "https://user:hunter2@host/D?token=hunter2 \x1b[31m" + "x" * 10**6
    record_error(tmp_path, 0, RunFailure(text))
    content = (tmp_path / "error-rank-0.json").read_text()
    assert "hunter2" not in content and "***@host" in content and len(content) < 200_000
    assert "u001b" not in content and count_failures(tmp_path, 0, 3, "") == []


def test_a_second_job_is_refused_until_the_first_is_dead(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    record_error(out, 0, RunFailure("of an attempt before"))
    sets = [
        "train.total_steps=4000",
        "checkpoint.every=20",
        "logging.every=20",
        "logging.tensorboard=false",
        "train.eval_every=0",
        "optimizer.warmup_steps=5",
    ]
    run = ["pretrain", "tiny", "--data", data, "--out", out]
    arguments = [*run, *(f"--set={setting}" for setting in sets)]
    command = [sys.executable, "-m", "electra_ds", *map(str, arguments), "--engine", "zero0-fp32"]
    with subprocess.Popen(command, env=os.environ | CPU, stdout=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: first.poll() is None and heartbeat_step(out) > 0)
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            second = subprocess.run(
                [sys.executable, *torchrun, *command[1:]],
                env=os.environ | CPU,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert second.returncode != 0
            refusals = second.stderr.count(f"names process {first.pid} on")
            assert refusals == 2, second.stderr  # one of each rank
            assert not list(out.glob("error-rank-*"))
            assert read_json(out / "lock")["pid"] == first.pid
            later = heartbeat_step(out) + 20
            wait_for(
                lambda: (
                    first.poll() is None
                    and heartbeat_step(out) > later
                    and checkpoint.latest(out / "ckpt")
                )
            )
        finally:
            first.kill()
    (error,) = read_json(out / "restarts.json")["errors"]
    assert error["error"] == "RunFailure: of an attempt before"
    third = run_cli(*arguments, "--engine", "zero0-fp32", "--max-minutes", 0, check=False)
    assert third.returncode == 85, third.stderr
    assert f"taken over from process {first.pid} on" in third.stdout and "resuming" in third.stdout
    found = read_json(out / "restarts.json")
    assert (found["failures"], found["in_a_row"]) == (2, 1)
    assert "without a message" in found["errors"][1]["error"]
    assert found["step"] == int(checkpoint.latest(out / "ckpt").name)
    assert not (out / "lock").exists()


# The command line, which prints whether the lock exists when an error is recorded.
NOTE_LOCK = """
from electra_ds import cli
from electra_ds.cluster import failures
record = failures.record_error
def noting(out, *arguments):
    record(out, *arguments)
    print("locked" if (out / "lock").exists() else "open")
failures.record_error = noting
cli.main()
"""


def test_the_error_is_recorded_before_the_lock_is_released(data: Path, tmp_path: Path) -> None:
    """A launcher that ends the process in between would leave a folder without a failure."""
    out = tmp_path / "run"
    (out / "ckpt").mkdir(parents=True)
    (out / "ckpt" / "latest").write_text("no checkpoint")
    run = ["pretrain", "tiny", "--data", data, "--out", out, "--engine", "zero0-fp32"]
    command = [sys.executable, "-c", NOTE_LOCK, *map(str, run)]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout.split() == ["locked"], done.stdout + done.stderr
    assert list(out.glob("error-rank-0.json")) and not (out / "lock").exists()


def test_a_failed_start_leaves_no_error_in_the_folder_of_a_running_job(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        place |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        command = ["pretrain", "tiny", "--data", tmp_path, "--out", tmp_path]
        with Lock(tmp_path):
            assert "is in use by another process" in run_cli(*command, check=False, **place).stderr
            assert not list(tmp_path.glob("error-rank-*.json"))
        run_cli(*command, check=False, **place)
        assert "is in use" in read_json(tmp_path / "error-rank-0.json")["error"]
