"""Lock file that gives one job at a time the right to write a folder.

FOLDER/lock holds the identity of the owner. The owner rewrites FOLDER/heartbeat.json every 5 s.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from electra_ds.common.errors import LockedOut, UserError
from electra_ds.common.files import open_regular
from electra_ds.common.json_files import (
    Record,
    parse_record,
    parse_strictly,
    read_small,
    set_aside,
    write_json,
)
from electra_ds.common.printable import printable
from electra_ds.common.processes import is_gone, machine_id, restart_count, start_time

BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0  # between two reads of the owner's heartbeat
MAX_BYTES = 1 << 16  # of a lock or heartbeat
STALE_SECONDS = 60.0  # an owner without a new heartbeat for this time counts as dead


class Owner(Record):
    """Content of a lock file: the process that holds the lock."""

    model_config = Record.model_config | {"extra": "ignore"}

    job: str = Field(default="", max_length=200)
    restart: int = Field(default=0, ge=0, le=2**53)
    host: str = Field(default="", max_length=1000)
    pid: int = Field(default=0, ge=0, le=2**53)
    started: str = Field(default="", max_length=200)
    machine: str = Field(default="", max_length=1000)
    nonce: str = Field(default="", max_length=200)


def _print_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Lock:
    """The lock of a folder. Use it as a context manager on every rank. Rank 0 holds the lock.

    The lock of another owner is taken over in three cases:

    - the owner is an earlier start of the same SLURM job
    - the owner is a process of this machine that has ended
    - the owner's heartbeat does not change for `stale_seconds` (monotonic clock of this process)

    If the heartbeat changes during this wait, every rank raises LockedOut with the owner's name.

    out: the folder.
    on_rank0: calls a function on rank 0 and returns its result on every rank. The default calls it
        in this process.
    stale_seconds: seconds without a new heartbeat after which an owner counts as dead.
    say: prints a line on rank 0, before a wait for a heartbeat and when a folder is renamed.
    took_over: on rank 0 the former owner and the cause of the takeover; empty if the lock was free.
    step: set by the caller; written to the heartbeat.
    lost: the error that ended the heartbeats, usually LockedOut; None while they continue. An
        OSError while a heartbeat is written does not end them.
    """

    def __init__(
        self,
        out: Path,
        on_rank0: Callable[[Callable[[], Any]], Any] = lambda function: function(),
        stale_seconds: float = STALE_SECONDS,
        say: Callable[[str], None] = _print_to_stderr,
    ):
        self.took_over = ""
        self.step = 0
        self.lost: Exception | None = None
        self._out = out
        self._path = out / "lock"
        self._heartbeat = out / "heartbeat.json"
        self._on_rank0 = on_rank0
        self._stale_seconds = stale_seconds
        self._say = say
        self._own = {
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": restart_count(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "machine": machine_id(),
            "nonce": secrets.token_hex(8),
        }
        self._text = json.dumps(self._own, indent=2) + "\n"
        # Content of lock and heartbeat when this owner was first seen. A lock may be empty while
        # another process writes it.
        self._seen: tuple[str, str] | None = None
        self._seen_at = 0.0
        self._beats = 0
        self._thread = threading.Thread(target=self._beat_until_released, daemon=True)
        self._leaving = threading.Event()

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock. Waits while the owner may be alive. Collective.

        Raises LockedOut when another job has the lock, UserError when the folder is not writable.
        """
        # Each attempt is short, so that no rank exceeds the timeout of a collective.
        while not self._on_rank0(self._take):
            pass

    def release(self) -> None:
        """Release the lock. Has no effect on ranks other than 0, and in a second call."""
        if self._thread.ident is None:  # not the rank that holds the lock
            return
        self._leaving.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if _text(self._path) == self._text:  # else another job has the lock
                self._path.unlink()

    def beat(self) -> None:
        """Write a heartbeat. Only rank 0 calls this.

        Raises LockedOut when another job has taken the lock. An OSError is ignored.
        """
        with contextlib.suppress(OSError):  # the next checkpoint reports a full disk
            with open_regular(self._path) as file:
                text = file.read(MAX_BYTES).decode(errors="replace")
            if text != self._text:
                raise LockedOut(
                    f"{printable(self._path)} now names {_name(_facts(text))}: this attempt wrote no "
                    "heartbeat for too long, and the other job took the lock; this attempt ends "
                    "and writes nothing else"
                )
            self._beats += 1
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(self._heartbeat, {"beats": self._beats, "step": self.step, "time": now})

    def _beat_until_released(self) -> None:
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                self.beat()
        except Exception as error:
            # The caller must end the run: without heartbeats another job takes over the lock.
            self.lost = error

    def _take(self) -> bool:
        """Try once to take the lock, on rank 0. Returns False if it must be tried again.

        Raises LockedOut when the owner is alive, UserError when the folder is not writable.
        """
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            for path in (self._path, self._heartbeat):
                if path.is_dir():
                    self._say(f"{printable(path)} is a folder: {set_aside(path)}")
            taken = self._create() or self._take_over()
        except OSError as error:
            raise UserError(
                f"{printable(self._out)}: not writable ({error}); choose a folder with free space and write "
                "permission"
            ) from None
        if taken:
            self.beat()
            self._thread.start()
        return taken

    def _create(self) -> bool:
        """Create the lock file. Returns False if it exists."""
        try:
            file = open(self._path, "x")  # noqa: SIM115 (O_EXCL: only one process succeeds)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except OSError:  # a full disk; an empty lock would delay the next start by stale_seconds
            self._path.unlink()
            raise
        return True

    def _take_over(self) -> bool:
        """Take over the lock of a dead owner.

        Returns False if the owner may be alive, or if another job took over the lock first. Raises
        LockedOut when the owner is alive.
        """
        seen = (_text(self._path), _text(self._heartbeat))
        owner = _facts(seen[0])
        cause = self._why_dead(owner)
        if not cause:
            if self._may_be_alive(seen, owner):
                time.sleep(LOOK_SECONDS)
                return False
            cause = f"its heartbeat did not change for {self._stale_seconds:.0f} s"
        replacement = self._path.with_name(f".lock.{self._own['nonce']}")
        replacement.write_text(self._text)
        # The replacement is written before the comparison: a write between comparison and rename
        # would give other jobs time to take over the lock.
        if _text(self._path) == seen[0]:
            os.replace(replacement, self._path)
            # Several jobs may pass the comparison. The last one to rename holds the lock.
            time.sleep(LOOK_SECONDS)
        replacement.unlink(missing_ok=True)
        won = _text(self._path) == self._text
        self.took_over = f"{_name(owner)}: {cause}" if won else ""
        return won

    def _may_be_alive(self, seen: tuple[str, str], owner: dict[str, Any]) -> bool:
        """Return whether the owner may be alive. Raises LockedOut if its heartbeat has changed."""
        if self._seen is None or seen[0] != self._seen[0]:  # the first read of this owner
            self._seen = seen
            self._seen_at = time.monotonic()
            self._say(
                f"{printable(self._path)}: held by {_name(owner)}; waiting up to "
                f"{self._stale_seconds:.0f} s for its heartbeat"
            )
        elif seen[1] != self._seen[1]:
            raise LockedOut(
                f"{printable(self._path)} names {_name(owner)}, which is running there: wait for it, stop it, "
                "or choose another folder"
            )
        return time.monotonic() - self._seen_at < self._stale_seconds

    def _why_dead(self, owner: dict[str, Any]) -> str:
        """Return why an owner is dead; "" if that is not known."""
        own = self._own
        is_same_job = bool(owner.get("job")) and owner["job"] == own["job"]
        if is_same_job and owner["restart"] < own["restart"]:
            return f"this is restart {own['restart']} of the same job"
        return "its process has ended" if is_gone(owner) else ""


def owner_of(out: Path) -> tuple[str, bool]:
    """Return (name of the owner, whether its process has ended) without taking the lock.

    The name is empty if there is no lock. The second value is False for a process of another
    machine.
    """
    text = _text(out / "lock")
    facts = _facts(text)
    return (_name(facts) if text else ""), is_gone(facts)


def _text(path: Path) -> str:
    """Return the content of a small file; "" if it cannot be read or is not a regular file."""
    try:
        return read_small(path, "a lock or a heartbeat", MAX_BYTES).decode(errors="replace")
    except UserError:
        return ""


def _facts(text: str) -> dict[str, Any]:
    """Return the owner in the text of a lock; {} if the text is incomplete or damaged."""
    try:
        found = parse_record(parse_strictly(text), "lock", Owner)
    except ValueError:  # UserError is one
        return {}
    return found.model_dump() if found.model_fields_set else {}


def _name(owner: dict[str, Any]) -> str:
    """Describe an owner by job, process and host, for messages."""
    if not owner:
        return "an unknown owner"
    job = f"job {owner['job']} (restart {owner['restart']}), " if owner.get("job") else ""
    return printable(f"{job}process {owner['pid']} on {owner['host']}")
