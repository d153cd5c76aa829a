"""One attempt at a time in OUT: who is refused, who takes over and when; failures counted and capped."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lock_owner import hold
from running import CPU, read_json, run_cli

from electra_ds.cluster.failures import count_failures, record_error
from electra_ds.common import folder_lock
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.common.processes import machine, started
from electra_ds.training import checkpoint

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

DEAD = {"job": "", "restart": 0, "host": "here", "pid": 1, "started": "1", "machine": machine()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "LOOK_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def alone(out: Path, stale_seconds: float = 60.0) -> Lock:
    return Lock(out, stale_seconds=stale_seconds)


def wait_for(what, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def beaten(out: Path) -> dict:
    return (
        read_json(out / "heartbeat.json")
        if (out / "heartbeat.json").exists()
        else {"beats": 0, "step": 0}
    )


def as_if_elsewhere(out: Path) -> None:
    """Rewrite OUT/lock as another machine would have written it, whose processes are not seen here."""
    other = {"host": "node7", "machine": "another", "started": "0"}
    (out / "lock").write_text(json.dumps(read_json(out / "lock") | other))


def test_an_owner_at_work_refuses_others_by_name_and_gives_the_lock_back(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(RunFailure), alone(out) as held:
        held.step = 7
        wait_for(lambda: beaten(out)["step"] == 7)
        with pytest.raises(
            LockedOut, match=rf"process {os.getpid()} on .*running there: wait for it, stop it"
        ):
            alone(out).__enter__()
        assert not held.lost and read_json(out / "lock")["pid"] == os.getpid()
        raise RunFailure("released on a failure too")
    assert not (out / "lock").exists()
    with alone(out) as again:
        assert not again.took_over


def test_a_killed_owner_of_this_machine_loses_the_lock_at_once(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    owner.send_signal(signal.SIGKILL)  # and not yet waited for: a zombie is dead too
    wait_for(lambda: not started(owner.pid))
    with alone(tmp_path) as taken:
        assert (
            f"process {owner.pid} on" in taken.took_over
            and "its process is gone" in taken.took_over
        )
    owner.wait()
    (tmp_path / "lock").write_text(json.dumps(DEAD | {"pid": os.getpid()}))
    with alone(tmp_path) as taken:
        assert "its process is gone" in taken.took_over  # its number lives on, as another process


def test_an_owner_elsewhere_is_dead_when_its_heartbeat_stands_still_on_our_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = hold(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    as_if_elsewhere(tmp_path)
    last = beaten(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a jump of the wall clock proves nothing
    os.utime(tmp_path / "heartbeat.json", (0, 0))
    before = time.monotonic()
    with alone(tmp_path, stale_seconds=1.0) as taken:
        assert time.monotonic() - before >= 1.0
        assert "on node7: its heartbeat stood still for 1 s" in taken.took_over
        wait_for(lambda: beaten(tmp_path) != last)
    owner.kill()
    owner.wait()


def test_an_attempt_that_slept_too_long_sees_that_out_is_another_s(tmp_path: Path) -> None:
    with alone(tmp_path) as slept:
        other = read_json(tmp_path / "lock") | {"host": "node7", "nonce": "its own"}
        (tmp_path / "lock").write_text(json.dumps(other))
        wait_for(lambda: slept.lost)
        with pytest.raises(LockedOut, match=r"now names process .* on node7"):
            slept.beat()
    assert read_json(tmp_path / "lock") == other  # never released by a stranger


def test_a_heart_that_fails_in_an_unforeseen_way_ends_the_run(tmp_path: Path) -> None:
    with alone(tmp_path) as held:
        (tmp_path / "lock").write_bytes(b"\xff")
        wait_for(lambda: held.lost, 10.0)
        (tmp_path / "lock").unlink()


def test_a_later_start_of_the_same_job_takes_over_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        owner = hold(tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
        owner.send_signal(signal.SIGSTOP)  # alive, so that only the restart count decides
        as_if_elsewhere(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "13" if count == 2 else "12")
        assert not alone(tmp_path)._take()  # another job, or the same start of it
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        if count == 2:
            with alone(tmp_path) as taken:
                assert taken.took_over.startswith("job 12 (restart 1), process")
        owner.kill()
        owner.wait()
        (tmp_path / "lock").unlink(missing_ok=True)


def test_of_two_that_judged_the_same_owner_the_last_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").write_text(json.dumps(DEAD))
    monkeypatch.setattr(
        time, "sleep", lambda _: (tmp_path / "lock").write_text("{}")
    )  # the other renames after us
    second = alone(tmp_path)
    assert not second._take() and not second.took_over and (tmp_path / "lock").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_of_many_that_come_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    """Four processes race for a free OUT and for that of a dead owner, by turns."""
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


# ------------------------------------------------------------------------------------------------------------ restarts


def test_failures_are_counted_until_a_checkpoint_is_gained(tmp_path: Path) -> None:
    def attempt(step: int, *errors: BaseException, limit: int = 3, silent: str = "") -> dict:
        for rank, error in enumerate(errors):
            record_error(tmp_path, rank, error)
        count_failures(tmp_path, step, limit, silent)
        assert not list(tmp_path.glob("error-rank-*"))
        return (
            read_json(tmp_path / "restarts.json") if (tmp_path / "restarts.json").exists() else {}
        )

    assert (
        attempt(0) == attempt(0, UserError("a wrong --data"), KeyboardInterrupt()) == {}
    )  # no failures of the run
    found = attempt(0, RunFailure("a"), RuntimeError("connection closed"))
    assert (found["failures"], found["in_a_row"]) == (
        1,
        1,
    )  # one attempt, whatever the number of ranks
    assert [error["error"] for error in found["errors"]] == [
        "RunFailure: a",
        "RuntimeError: connection closed",
    ]
    assert attempt(0) == found  # stopped and saved: nothing counted, nothing lost
    assert attempt(0, silent="process 5 on node7: its process is gone")["in_a_row"] == 2
    assert attempt(0, OSError("b"))["in_a_row"] == 3
    assert attempt(10, OSError("c"))["in_a_row"] == 1  # a checkpoint was gained
    for _ in range(2):
        found = attempt(10, OSError("d"))
    (tmp_path / "error-rank-4.json").write_text('{"rank": 4, "err')  # the disk was full
    for _ in range(2):  # refused until it is mended, and refusals are not counted
        with pytest.raises(
            UserError, match=r"failed 4 times in a row at step 10 .*= 3.*rank 4.*cut short"
        ):
            attempt(10)
    assert read_json(tmp_path / "restarts.json")["failures"] == found["failures"] + 1 == 7
    attempt(10, limit=4)
    attempt(10, OSError("e"), limit=0)
    attempt(11)


def test_of_two_jobs_on_one_out_the_second_is_refused_and_a_dead_one_is_succeeded(
    data: Path, tmp_path: Path
) -> None:
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
    arguments = [
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        *(f"--set={line}" for line in sets),
    ]
    command = [sys.executable, "-m", "electra_ds", *map(str, arguments), "--engine", "zero0-fp32"]
    with subprocess.Popen(command, env=os.environ | CPU, stdout=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: first.poll() is None and beaten(out)["step"] > 0)
            ranks = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                *command[1:],
            ]
            second = subprocess.run(
                ranks, env=os.environ | CPU, capture_output=True, text=True, timeout=300
            )
            assert (
                second.returncode != 0 and second.stderr.count(f"names process {first.pid} on") == 2
            ), second.stderr
            assert (
                not list(out.glob("error-rank-*")) and read_json(out / "lock")["pid"] == first.pid
            )
            later = beaten(out)["step"] + 20
            wait_for(
                lambda: (
                    first.poll() is None
                    and beaten(out)["step"] > later
                    and checkpoint.latest(out / "ckpt")
                )
            )
        finally:
            first.kill()
    assert (
        read_json(out / "restarts.json")["errors"][0]["error"] == "RunFailure: of an attempt before"
    )
    third = run_cli(*arguments, "--engine", "zero0-fp32", "--max-minutes", 0, check=False)
    assert third.returncode == 85, third.stderr
    assert f"taken over from process {first.pid} on" in third.stdout and "resuming" in third.stdout
    found = read_json(out / "restarts.json")
    assert (found["failures"], found["in_a_row"]) == (2, 1) and "without a message" in found[
        "errors"
    ][1]["error"]
    assert not (out / "lock").exists() and found["step"] == int(
        checkpoint.latest(out / "ckpt").name
    )


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


def test_the_lock_is_held_until_the_error_is_recorded(data: Path, tmp_path: Path) -> None:
    """Else a launcher that ends the others meanwhile leaves a folder that looks as if nothing had failed."""
    out = tmp_path / "run"
    words = [
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--engine",
        "zero0-fp32",
        "--init-from",
        tmp_path,
    ]
    command = [sys.executable, "-c", NOTE_LOCK, *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout.split() == ["locked"], done.stdout + done.stderr
    assert list(out.glob("error-rank-0.json")) and not (out / "lock").exists()


def test_a_lock_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    """An empty one would have the next start wait for its heartbeat."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"not writable .*File too large"), alone(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "lock").exists()


def test_a_start_that_fails_leaves_no_error_in_the_folder_of_a_run_at_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        place |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        command = ["pretrain", "tiny", "--data", tmp_path, "--out", tmp_path]
        with alone(tmp_path):
            assert "EADDRINUSE" in run_cli(*command, check=False, **place).stderr
            assert not list(tmp_path.glob("error-rank-*"))
        run_cli(*command, check=False, **place)
        assert "EADDRINUSE" in read_json(tmp_path / "error-rank-0.json")["error"]


def test_a_log_on_a_full_disk_is_no_traceback(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom electra_ds.cluster.launchers import Ranks\n"
    )
    script += "from electra_ds.cluster.rank_log import open_log\nopen_log(Path(sys.argv[1]), Ranks(0, 1, 0, 1, 'none'))"
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank-0.log").symlink_to("/dev/full")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
