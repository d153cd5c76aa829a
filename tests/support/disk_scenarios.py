"""Scenarios: the disk fails while two ranks train. OUTS is a small file system of its own (OUTS/disk for the tests)."""

import contextlib
import resource
import subprocess
import threading
from pathlib import Path

from scenario_tools import SAVED, finish, here, in_step, note, stop, train

from electra_ds.training import checkpointer

SETS = (SAVED, "logging.tensorboard=true")
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def filled() -> Path:
    """The file that takes all space of the file system."""
    return here.outs / "filled"


def fill() -> None:
    """Rank 0 writes until the file system is full."""
    if here.rank == 0:
        with contextlib.suppress(OSError), open(filled(), "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


def limit_files() -> None:
    """Rank 1 can write no more than 1000 bytes into any file from here on, as under a quota."""
    if here.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def mount(*options: str) -> None:
    """Rank 0 calls mount."""
    if here.rank == 0:
        subprocess.run(["mount", *options], check=True)


def uninterrupted_on_disk() -> None:
    """Three runs without a fault.

    `whole` delays the writing of its first checkpoint until its eighth step, `stopped` stops at the
    step of a save, and `waited` saves synchronously.
    """
    original, eighth, waited = checkpointer._write, threading.Event(), []

    def late(*arguments):
        waited.append(eighth.wait(60))
        return original(*arguments)

    checkpointer._write = late
    with in_step(8, eighth.set):
        finish("whole", "zero1-fp32", *SETS)
    checkpointer._write = original
    note("whole", waited)
    stop("stopped", "zero1-fp32", *SETS, at=5)
    finish("waited", "zero1-fp32", *SETS, "checkpoint.asynchronous=false")


def full_disk() -> None:
    """The disk is full in the eighth step, at the next start too, and then has room again."""
    with in_step(8, fill):
        failed = train("full", "zero1-fp32", *SETS)
    fill()  # the failed save has removed what it wrote
    again = train("full", "zero1-fp32", *SETS)
    if here.rank == 0:
        filled().unlink()
    note("full", [failed, again, train("full", "zero1-fp32", *SETS)])


def quota_of_one_rank() -> None:
    """Rank 1 cannot write its part of a checkpoint, then can."""
    with in_step(8, limit_files):
        failed = train("quota", "zero1-fp32", *SETS)
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    note("quota", [failed, train("quota", "zero1-fp32", *SETS)])


def read_only_disk() -> None:
    """OUT/ckpt is read-only from the eighth step on, then writable again.

    Only OUT/ckpt: a file system with a file that is open for writing cannot be made read-only.
    """
    folder = str(here.outs / "read-only" / "ckpt")

    def seal() -> None:
        mount("--bind", folder, folder)
        mount("-o", "remount,ro,bind", folder)

    with in_step(8, seal):
        failed = train("read-only", "zero1-fp32", *SETS)
    if here.rank == 0:
        subprocess.run(["umount", folder], check=True)
    note("read-only", [failed, train("read-only", "zero1-fp32", *SETS)])
