"""Ranks that die, hang or raise under real launchers: the first is named, all end, the run resumes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import MEET_SILENCE, STEP
from running import CPU, ROOT, read_json, run_ranks
from small_run import SMALL_MODEL

from electra_ds.cluster.failures import count_failures
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
    """Run one attempt in OUT with a fault; its output. It fails, and all its processes end within 30 s."""
    note = out.with_name("fault")
    port = ["--master_port", free_port()] if launcher == "deepspeed" else []
    arguments = ["pretrain", "tiny", "--data", data, "--out", out, "--engine", "zero1-fp32"]
    script = [
        ROOT / "tests/support/faults.py",
        kind,
        rank,
        note,
        *arguments,
        *(f"--set={line}" for line in (*SETS, *sets)),
    ]
    command = [sys.executable, *map(str, [*LAUNCHERS[launcher], *port, *script])]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )
    assert time.time() - float(note.read_text()) < 30, done.stderr[-4000:]
    assert not list(ranks_of(out)), "a rank is left"
    assert done.returncode != 0 or kind == "early", done.stderr[-4000:]
    return done.stdout + done.stderr


def ranks_of(out: Path) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(out) in words:
            yield path.parent.name


def log(out: Path, rank: int) -> str:
    """The part of a rank's log that its last attempt wrote."""
    return (out / f"log/rank-{rank}.log").read_text().rpartition(f" rank {rank} of 2 on ")[2]


def saved(out: Path) -> int:
    """The step of the latest checkpoint; fails if it cannot be loaded."""
    found = checkpoint.latest(out / "ckpt")
    meta = checkpoint.read_meta(found)
    assert dict(checkpoint.tensors(found, meta)) and int(found.name) == meta.state.step
    return meta.state.step


def cause(out: Path) -> str:
    """Rank and message of the one error that an attempt recorded."""
    (path,) = out.glob("error-rank-*.json")
    found = read_json(path)
    assert path.name == f"error-rank-{found['rank']}.json" and found["failure"]
    return f"{found['rank']}: {found['error']}"


def test_a_rank_that_stops_dies_or_raises_is_named_and_the_run_resumes(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    attempt("torchrun", "early", 1, data, out)  # asked to stop before the first step
    assert read_json(out / "stopped.0")["step"] == 0 and checkpoint.latest(out / "ckpt").name == "0"
    assert "SIGUSR1: stop requested" not in log(out, 0) and not list(out.glob("error-rank-*"))

    output = attempt("deepspeed", "kill", 0, data, out)  # rank 0 holds the store
    assert re.search(
        r"\(rank 1\): error: rank 0 on \S+ failed first: process \d+ is gone: killed", output
    )
    assert cause(out).startswith("0: process ") and "Traceback" in log(out, 1)
    before = saved(out)
    assert before in (5, 10)  # of step 12; a checkpoint that was being written may be lost

    output = attempt("torchrun", "stop", 1, data, out)
    assert f"resuming {out}/ckpt/{before}" in output
    assert re.search(
        r"\(rank 0\): error: rank 1 on \S+ failed first: silent for 4 s, last seen at \w+\.py:\d+ \w+",
        output,
    )
    assert f"the stacks of this rank are in {out}/log/rank-0.log" in output
    # Rank 0 waited in a collective, rank 1 hung in the fault.
    assert re.search("engine.py|collectives.py", log(out, 0)) and "faults.py" in log(out, 1)
    assert [error["rank"] for error in read_json(out / "restarts.json")["errors"]] == [0]

    before = saved(out)  # the rank that was continued to print its stacks may have trained on
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
            r"1: no rank moved for \d+ s: it stands at .*, of the others 1 at (engine|collectives).py:\d+",
        ),
    ],
)
def test_the_cause_of_a_rank_that_ends_is_named(
    launcher: str, kind: str, rank: int, named: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    output = attempt(
        launcher, kind, rank, data, out, *(["train.timeout_minutes=0.2"] if kind == "hang" else [])
    )
    assert re.match(named, cause(out)), (cause(out), output[-4000:])
    assert f"rank {rank} on " in output and saved(out) >= 5


def test_a_rank_that_hangs_is_ended_when_its_console_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "tests/support/faults.py"), "closed-console"]
    done = subprocess.run(command, env=os.environ | CPU, stderr=writer)
    os.close(writer)
    assert done.returncode == 1


def test_ranks_that_sleep_together_or_leave_one_by_one_are_no_failure() -> None:
    environ = (
        os.environ
        | CPU
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    )
    environ["PYTHONUNBUFFERED"] = "1"
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/faults.py"), "meet"],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
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
        rank.stdin.write("leave\n")
        rank.stdin.flush()
    for rank in ranks:
        output, errors = rank.communicate(timeout=60)
        assert (rank.returncode, output) == (0, "left\n"), errors


def test_ranks_that_end_with_a_user_error_print_no_stacks() -> None:
    run_ranks(2, "faults.py", "refuse")  # SIGUSR2, which prints stacks, would end them


def test_a_wait_in_any_group_of_the_engine_ends_after_the_timeout(tmp_path: Path) -> None:
    run_ranks(2, "faults.py", "groups", tmp_path / "waited")
    waited = read_json(tmp_path / "waited")
    # The world, DeepSpeed's group, the control group.
    assert len(waited) >= 3 and max(waited) < 30, waited
