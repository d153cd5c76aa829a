"""Whose is OUT? OUT/lock names the one attempt that may write there, OUT/heartbeat.json shows that it is alive."""

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
from electra_ds.common.files import write_json
from electra_ds.common.processes import is_gone, machine, restart_count, started

BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0  # between two looks at the owner's heartbeat
STALE_SECONDS = 60.0  # without a beat: dead


class Lock:
    """OUT as this attempt's own, a context entered on every rank: rank 0 holds the lock, all go on or none does.

    A lock that is there is taken over at once from an earlier start of the same SLURM job and from a process of this
    machine that is gone; else when its heartbeat stands still for `stale_seconds` of our own monotonic clock. A
    heartbeat that moves is LockedOut, on every rank, with the owner named.

    on_rank0: what rank 0 finds, on every rank (default: one process, alone). took_over: from whom and why, or empty.
    step: for the heartbeat. lost: the error to raise, once the beats ended: another attempt took OUT, or one failed.
    """

    def __init__(
        self,
        out: Path,
        on_rank0: Callable[..., Any] = lambda find: find(),
        stale_seconds: float = STALE_SECONDS,
    ):
        self.took_over, self.step, self.lost = "", 0, None
        self._out, self._path, self._heartbeat = out, out / "lock", out / "heartbeat.json"
        self._from_first, self._stale_seconds = on_rank0, stale_seconds
        self._me = {
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": restart_count(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "machine": machine(),
            "nonce": secrets.token_hex(8),
        }
        self._text = json.dumps(self._me, indent=2) + "\n"
        self._seen, self._since, self._beats = ("", ""), 0.0, 0
        self._thread, self._leaving = (
            threading.Thread(target=self._beat_on, daemon=True),
            threading.Event(),
        )

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the folder, on every rank; LockedOut when another job uses it."""
        while not self._from_first(
            self._take
        ):  # short turns: no rank waits longer for another than a collective may
            pass

    def release(self) -> None:
        """Give the folder back. A second call does nothing."""
        if self._thread.ident is None:  # another rank
            return
        self._leaving.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self._path.read_text() == self._text:  # never somebody else's
                self._path.unlink()

    def beat(self) -> None:
        """Show that this attempt is alive; LockedOut when OUT is no longer its own. For rank 0."""
        with contextlib.suppress(OSError):  # a full disk is told by whoever saves
            if (found := self._path.read_text()) != self._text:
                raise LockedOut(
                    f"{self._path} now names {_name(_facts(found))}: this attempt stood still for so long that it was "
                    "taken for dead; it ends and writes nothing more"
                )
            self._beats += 1
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(self._heartbeat, {"beats": self._beats, "step": self.step, "time": now})

    def _beat_on(self) -> None:
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                self.beat()
        except (
            Exception
        ) as error:  # without a beat the next contender would take OUT from a run at work
            self.lost = error

    def _take(self) -> bool:
        """One try, on rank 0; False: not yet, after a short wait."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            taken = self._make() or self._take_over()
        except OSError as error:
            raise UserError(
                f"{self._out}: not writable ({error}); give a folder with room and rights"
            ) from None
        if taken:
            self.beat()
            self._thread.start()
        return taken

    def _make(self) -> bool:
        try:
            file = open(self._path, "x")  # noqa: SIM115 (O_EXCL: one of many wins)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except OSError:  # a full disk: an empty lock would have the next start wait for its owner
            self._path.unlink()
            raise
        return True

    def _take_over(self) -> bool:
        seen = (_text(self._path), _text(self._heartbeat))
        owner = _facts(seen[0])
        cause = self._why_dead(owner)
        if not cause:
            if seen[0] != self._seen[0]:  # the first look at this owner
                self._seen, self._since = seen, time.monotonic()
            elif seen[1] != self._seen[1]:
                raise LockedOut(
                    f"{self._path} names {_name(owner)}, which is at work there: wait for it, stop it, or choose "
                    "another folder"
                )
            if time.monotonic() - self._since < self._stale_seconds:
                time.sleep(LOOK_SECONDS)
                return False
            cause = f"its heartbeat stood still for {self._stale_seconds:.0f} s"
        spare = self._path.with_name(f".lock.{self._me['nonce']}")
        spare.write_text(self._text)
        if (
            _text(self._path) == seen[0]
        ):  # the rename follows at once: a slow disk would let others in between
            os.replace(spare, self._path)
            time.sleep(
                LOOK_SECONDS
            )  # others may have judged the same owner: the last to rename has it
        spare.unlink(missing_ok=True)
        won = _text(self._path) == self._text
        self.took_over = f"{_name(owner)}: {cause}" if won else ""
        return won

    def _why_dead(self, owner: dict) -> str:
        if (
            owner.get("job")
            and owner["job"] == self._me["job"]
            and owner["restart"] < self._me["restart"]
        ):
            return f"this is restart {self._me['restart']} of the same job"
        return "its process is gone" if is_gone(owner) else ""


def owner_of(out: Path) -> tuple[str, bool]:
    """Who holds OUT, empty when nobody does, and whether its process is gone from this machine; takes nothing."""
    text = _text(out / "lock")
    return text and _name(_facts(text)), is_gone(_facts(text))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _facts(text: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # being written this moment, or cut short
        return {}


def _name(owner: dict) -> str:
    job = f"job {owner['job']} (restart {owner['restart']}), " if owner.get("job") else ""
    return f"{job}process {owner['pid']} on {owner['host']}" if owner else "an owner without a name"
