"""Lock file that gives one job at a time the right to write a folder.

FOLDER/lock names the owner, FOLDER/heartbeat.json shows that it is alive.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from electra_ds.common.errors import LockedOut, UserError
from electra_ds.common.json_files import write_json
from electra_ds.common.processes import is_gone, machine, restart_count, started

BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0  # between two looks at the owner's heartbeat
STALE_SECONDS = 60.0  # without a new heartbeat the owner counts as dead


class Lock:
    """The lock of a folder, a context manager entered on every rank. Rank 0 holds the lock.

    An existing lock is taken over at once from an earlier start of the same SLURM job, and from a
    process of this machine that has ended; else when its heartbeat does not change for
    `stale_seconds` of this process's monotonic clock. If the heartbeat changes, LockedOut is raised
    on every rank with the owner's name.

    on_rank0: calls a function on rank 0 and returns its result on every rank; default: no ranks.
    took_over: the former owner, and why the lock was taken over; empty if it was free.
    step: written with the heartbeat.
    lost: the error to raise after the heartbeats ended: the lock was lost, or a write failed.
    """

    def __init__(
        self,
        out: Path,
        on_rank0: Callable[[Callable[[], Any]], Any] = lambda function: function(),
        stale_seconds: float = STALE_SECONDS,
    ):
        self.took_over = ""
        self.step = 0
        self.lost: Exception | None = None
        self._out = out
        self._path = out / "lock"
        self._heartbeat = out / "heartbeat.json"
        self._on_rank0 = on_rank0
        self._stale_seconds = stale_seconds
        self._own = {
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": restart_count(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "machine": machine(),
            "nonce": secrets.token_hex(8),
        }
        self._text = json.dumps(self._own, indent=2) + "\n"
        self._seen = ("", "")  # lock and heartbeat at the first look at this owner
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
        """Take the folder, on every rank. LockedOut when another job uses it. Collective."""
        # Short turns: no rank waits longer for rank 0 than a collective may take.
        while not self._on_rank0(self._take):
            pass

    def release(self) -> None:
        """Give the folder back. A second call does nothing."""
        if self._thread.ident is None:  # another rank
            return
        self._leaving.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self._path.read_text() == self._text:  # never the lock of another job
                self._path.unlink()

    def beat(self) -> None:
        """Write a heartbeat. LockedOut when another job took the folder. Called on rank 0."""
        with contextlib.suppress(OSError):  # a full disk is reported by whatever saves
            text = self._path.read_text()
            if text != self._text:
                raise LockedOut(
                    f"{self._path} now names {_name(_facts(text))}: this attempt stood still for "
                    "so long that it was taken for dead; it ends and writes nothing more"
                )
            self._beats += 1
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(self._heartbeat, {"beats": self._beats, "step": self.step, "time": now})

    def _beat_until_released(self) -> None:
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                self.beat()
        except Exception as error:
            # Without heartbeats the next job would take the folder from a running one.
            self.lost = error

    def _take(self) -> bool:
        """One attempt, on rank 0. False after a short wait: not yet."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            taken = self._create() or self._take_over()
        except OSError as error:
            raise UserError(
                f"{self._out}: not writable ({error}); give a folder with room and rights"
            ) from None
        if taken:
            self.beat()
            self._thread.start()
        return taken

    def _create(self) -> bool:
        try:
            file = open(self._path, "x")  # noqa: SIM115 (O_EXCL: one of many succeeds)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except OSError:  # a full disk: the next start would wait for the owner of an empty lock
            self._path.unlink()
            raise
        return True

    def _take_over(self) -> bool:
        """Take the lock of a dead owner. False: not dead yet, or another job was faster."""
        seen = (_text(self._path), _text(self._heartbeat))
        owner = _facts(seen[0])
        cause = self._why_dead(owner)
        if not cause:
            if self._may_be_alive(seen, owner):
                time.sleep(LOOK_SECONDS)
                return False
            cause = f"its heartbeat stood still for {self._stale_seconds:.0f} s"
        replacement = self._path.with_name(f".lock.{self._own['nonce']}")
        replacement.write_text(self._text)
        # The rename follows the comparison at once: a slow disk would let others in between.
        if _text(self._path) == seen[0]:
            os.replace(replacement, self._path)
            # Other jobs may have judged the same owner: the last one to rename has the lock.
            time.sleep(LOOK_SECONDS)
        replacement.unlink(missing_ok=True)
        won = _text(self._path) == self._text
        self.took_over = f"{_name(owner)}: {cause}" if won else ""
        return won

    def _may_be_alive(self, seen: tuple[str, str], owner: dict[str, Any]) -> bool:
        """Whether to look again. LockedOut when the heartbeat has changed."""
        if seen[0] != self._seen[0]:  # the first look at this owner
            self._seen = seen
            self._seen_at = time.monotonic()
        elif seen[1] != self._seen[1]:
            raise LockedOut(
                f"{self._path} names {_name(owner)}, which is running there: wait for it, stop it, "
                "or choose another folder"
            )
        return time.monotonic() - self._seen_at < self._stale_seconds

    def _why_dead(self, owner: dict[str, Any]) -> str:
        own = self._own
        is_same_job = bool(owner.get("job")) and owner["job"] == own["job"]
        if is_same_job and owner["restart"] < own["restart"]:
            return f"this is restart {own['restart']} of the same job"
        return "its process is gone" if is_gone(owner) else ""


def owner_of(out: Path) -> tuple[str, bool]:
    """(name of the owner, whether its process has ended); the name is empty without a lock.

    Takes nothing. Only processes of this machine are known to have ended.
    """
    text = _text(out / "lock")
    facts = _facts(text)
    return (_name(facts) if text else ""), is_gone(facts)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _facts(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # it is being written, or was cut short
        return {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "an owner without a name"
    job = f"job {owner['job']} (restart {owner['restart']}), " if owner.get("job") else ""
    return f"{job}process {owner['pid']} on {owner['host']}"
