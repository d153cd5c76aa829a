"""The watchdog under real launchers: dead, hung and failing ranks are named, and all ranks end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from faults import MEET_SILENCE, STEP
from running import CPU, ROOT, read_json, run_ranks
from small_run import SMALL_MODEL

from electra_ds.cluster import watchdog as watchdog_module
from electra_ds.cluster.failures import count_failures
from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.watchdog import Heartbeat, Watchdog
from electra_ds.common.processes import free_port
from electra_ds.training import checkpoint

SETS = [
    *SMALL_MODEL,
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.total_steps=1000",
    "train.eval_every=0",
    "checkpoint.every=5",
    "logging.tensorboard=false",
    "train.silence_seconds=4",
]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "deepspeed": [f"{Path(sys.executable).parent}/deepspeed", "--num_gpus=2", "--no_local_rank"],
}


def attempt(launcher: str, kind: str, rank: int, data: Path, out: Path, *sets: str) -> str:
    """Run one attempt in OUT with a fault; returns its output.

    The attempt fails, and all its processes end within 30 s.
    """
    note = out.with_name("fault")
    port = ["--master_port", free_port()] if launcher == "deepspeed" else []
    run = ["pretrain", "tiny", "--data", data, "--out", out, "--engine", "zero1-fp32"]
    settings = [f"--set={setting}" for setting in (*SETS, *sets)]
    script = [ROOT / "tests/support/faults.py", kind, rank, note, *run, *settings]
    command = [sys.executable, *map(str, [*LAUNCHERS[launcher], *port, *script])]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )
    assert time.time() - float(note.read_text()) < 30, done.stderr[-4000:]
    assert not list(ranks_of(out)), "a process of a rank still runs"
    assert done.returncode != 0 or kind == "early", done.stderr[-4000:]
    return done.stdout + done.stderr


def ranks_of(out: Path) -> Iterator[str]:
    """Numbers of the processes that have OUT among their arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(out) in arguments:
            yield path.parent.name


def log(out: Path, rank: int) -> str:
    """The part of a rank's log that its last attempt wrote."""
    return (out / f"log/rank-{rank}.log").read_text().rpartition(f" rank {rank} of 2 on ")[2]


def saved(out: Path) -> int:
    """The step of the latest checkpoint, which is complete."""
    found = checkpoint.latest(out / "ckpt")
    meta = checkpoint.read_meta(found)
    assert dict(checkpoint.tensors(found, meta)) and int(found.name) == meta.state.step
    return meta.state.step


def cause(out: Path) -> str:
    """The only error file of an attempt, as "rank: error"."""
    (path,) = out.glob("error-rank-*.json")
    found = read_json(path)
    assert path.name == f"error-rank-{found['rank']}.json" and found["failure"]
    return f"{found['rank']}: {found['error']}"


def test_a_stopped_killed_or_failed_rank_is_named_and_the_run_resumes(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    attempt("torchrun", "early", 1, data, out)  # a stop is requested before the first step
    assert read_json(out / "stopped.0")["step"] == 0 and checkpoint.latest(out / "ckpt").name == "0"
    assert "SIGUSR1: stop requested" not in log(out, 0) and not list(out.glob("error-rank-*"))

    output = attempt("deepspeed", "kill", 0, data, out)  # the store is in the process of rank 0
    killed = r"\(rank 1\): error: rank 0 on \S+ failed first: process \d+ is gone: killed"
    assert re.search(killed, output)
    assert cause(out).startswith("0: process ") and "Traceback" in log(out, 1)
    before = saved(out)
    assert before in (5, 10)  # of step 12: an asynchronous checkpoint may be lost

    output = attempt("torchrun", "stop", 1, data, out)
    assert f"resuming {out}/ckpt/{before}" in output
    silent = r"rank 1 on \S+ failed first: silent for 4 s, last seen at \w+\.py:\d+ \w+"
    assert re.search(rf"\(rank 0\): error: {silent}", output)
    assert f"the stacks of this rank are in {out}/log/rank-0.log" in output
    # The stacks show where rank 0 waited, and where rank 1 was stopped.
    assert re.search("engine.py|collectives.py", log(out, 0)) and "faults.py" in log(out, 1)
    assert [error["rank"] for error in read_json(out / "restarts.json")["errors"]] == [0]

    before = saved(out)  # SIGCONT, sent before the kill, may have let the rank run for a moment
    output = attempt("torchrun", "raise", 1, data, out)
    assert f"resuming {out}/ckpt/{before}" in output and "(rank 0): error: rank 1 on" in output
    assert cause(out) == "1: KeyError: 'a key that is missing'" and "KeyError" in log(out, 1)
    assert before + STEP - 10 < saved(out) <= before + STEP
    count_failures(out, saved(out), 10, "")
    assert [error["rank"] for error in read_json(out / "restarts.json")["errors"]] == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kind", "rank", "named"),
    [
        (
            "deepspeed",
            "stop",
            0,
            r"0: the store at \S+, which it holds, does not answer: silent for 4 s",
        ),
        ("torchrun", "stop", 0, "0: silent for 4 s, last seen at"),
        (
            "deepspeed",
            "vanish",
            1,
            r"1: process \d+ is gone: killed .*, or it left without a message",
        ),
        ("torchrun", "exit", 0, "0: SystemExit: 3"),
        (
            "torchrun",
            "hang",
            1,
            r"1: no rank moved for \d+ s: it is at .*, "
            r"the other ranks: 1 at (engine|collectives).py:\d+",
        ),
    ],
)
def test_the_cause_of_a_lost_rank_is_named(
    launcher: str, kind: str, rank: int, named: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sets = ["train.timeout_minutes=0.2"] if kind == "hang" else []
    output = attempt(launcher, kind, rank, data, out, *sets)
    assert re.match(named, cause(out)), (cause(out), output[-4000:])
    assert f"rank {rank} on " in output and saved(out) >= 5


def locate(is_collective: Callable[[FrameType], bool]) -> tuple[str, bool]:
    """Location and in_collective of this thread, if this file were part of the package."""
    watchdog = Watchdog(
        Ranks(0, 2, 0, 2, "none"), 4.0, 10.0, lambda f: f(), is_collective=is_collective
    )
    return watchdog._current_location()


def test_a_location_knows_whether_its_function_waits_for_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_collective(frame: FrameType) -> bool:
        return frame.f_code.co_name == "locate"

    monkeypatch.setattr(watchdog_module, "PACKAGE", str(Path(__file__).parent))
    location, in_collective = locate(is_collective)
    assert re.fullmatch(r"test_watchdog\.py:\d+ locate", location) and in_collective
    assert locate(lambda frame: False)[1] is False


@pytest.mark.parametrize("hung", [0, 1, 2])
def test_a_hanging_rank_is_the_one_outside_collectives(hung: int) -> None:
    """The location is not sufficient: two ranks may wait for the third at different places."""
    watchdog = Watchdog(Ranks(0, 3, 0, 3, "none"), 4.0, 1.0, lambda function: function())
    locations = ["trainer.py:1 train", "collectives.py:2 on_rank0", "engine.py:3 step"]
    for rank in range(3):
        index = (rank - hung) % 3  # the hung rank is in the trainer
        watchdog._heartbeats[rank] = Heartbeat(
            f"node{rank}", "", 1, "1", location=locations[index], in_collective=index > 0
        )
    failures = [watchdog._hang() for _ in range(watchdog._patience + 1)]
    assert failures[:-1] == [None] * watchdog._patience
    assert failures[-1].rank == hung and failures[-1].host == f"node{hung}"
    assert "it is at trainer.py:1 train, the other ranks:" in failures[-1].error


def test_a_hung_rank_ends_although_standard_error_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "tests/support/faults.py"), "unheard"]
    done = subprocess.run(command, env=os.environ | CPU, stderr=writer)
    os.close(writer)
    assert done.returncode == 1


def test_ranks_that_sleep_together_or_leave_in_order_are_no_failure() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    environ = os.environ | CPU | address | {"PYTHONUNBUFFERED": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/faults.py"), "meet"],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            **pipes,
        )
        for rank in (1, 0, 2)  # the process of rank 0 holds the store
    ]
    assert [rank.stdout.readline() for rank in ranks] == ["met\n"] * 3
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(1.5 * MEET_SILENCE if number == signal.SIGSTOP else 1.5)
    for rank in ranks:
        rank.stdin.write("go on\n")
        rank.stdin.flush()
    for rank in ranks:
        output, errors = rank.communicate(timeout=60)
        assert (rank.returncode, output) == (0, "left\n"), errors


def test_a_rank_that_ends_with_its_own_message_prints_no_stacks() -> None:
    run_ranks(2, "faults.py", "refuse")  # without a handler SIGUSR2 ends the process


def test_a_wait_in_any_process_group_ends_after_the_timeout(tmp_path: Path) -> None:
    run_ranks(2, "faults.py", "groups", tmp_path / "waited")
    waited = read_json(tmp_path / "waited")
    # The world, DeepSpeed's groups, the control group.
    assert len(waited) >= 3 and max(waited) < 30, waited
