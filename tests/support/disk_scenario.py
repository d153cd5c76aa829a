"""Runs on two ranks whose disk fails in the middle: `torchrun tests/support/disk_scenario.py all DATA OUTS`.

OUTS is a small file system of its own; the tests in test_saving.py read what the runs left there.
"""

import contextlib
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator

from scenarios import OUTS, RANKS, note, train

from electra_ds.training import checkpointer
from electra_ds.training.collectives import leave
from electra_ds.training.engine import Engine

SETS = ["logging.tensorboard=true"]
FILLED = OUTS / "filled"


@contextlib.contextmanager
def in_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on every rank in the number-th step of the run inside."""
    original, seen = Engine.step, []

    def step(self, lr):
        seen.append(1)
        if len(seen) == number:
            act()
        return original(self, lr)

    Engine.step = step
    yield
    Engine.step = original


def fill() -> None:
    if RANKS.rank == 0:
        with contextlib.suppress(OSError), open(FILLED, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


def limit_files() -> None:
    """From now on rank 1 cannot write more than a few bytes into any file, as under a quota."""
    if RANKS.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def mount(*options: str) -> None:
    if RANKS.rank == 0:
        subprocess.run(["mount", *options], check=True)


def full_disk() -> None:
    with in_step(8, fill):
        failed = train("full", "zero1-fp32", *SETS)
    fill()  # the failed save gave its room back
    again = train("full", "zero1-fp32", *SETS)
    if RANKS.rank == 0:
        FILLED.unlink()
    note("full", [failed, again, train("full", "zero1-fp32", *SETS)])


def quota_of_one_rank() -> None:
    with in_step(8, limit_files):
        failed = train("quota", "zero1-fp32", *SETS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    note("quota", [failed, train("quota", "zero1-fp32", *SETS)])


def read_only() -> None:
    """OUT/ckpt alone: a file system with a file that is open for writing refuses to be made read-only."""
    folder = str(OUTS / "read-only" / "ckpt")

    def seal() -> None:
        mount("--bind", folder, folder)
        mount("-o", "remount,ro,bind", folder)

    with in_step(8, seal):
        failed = train("read-only", "zero1-fp32", *SETS)
    if RANKS.rank == 0:
        subprocess.run(["umount", folder], check=True)
    note("read-only", [failed, train("read-only", "zero1-fp32", *SETS)])


def whole() -> None:
    """The run that no fault interrupts: its first checkpoint is written when the eighth step has come."""
    original, eighth, found = checkpointer._write, threading.Event(), []

    def late(*arguments):
        found.append(eighth.wait(60))
        return original(*arguments)

    checkpointer._write = late
    with in_step(8, eighth.set):
        assert train("whole", "zero1-fp32", *SETS) == 0
    checkpointer._write = original
    assert train("stopped", "zero1-fp32", *SETS, stop_at_step=5) in (0, 85)
    assert train("waited", "zero1-fp32", *SETS, "checkpoint.asynchronous=false") == 0
    note("whole", found)


if __name__ == "__main__":
    for scenario in (whole, full_disk, quota_of_one_rank, read_only):
        scenario()
    leave()
