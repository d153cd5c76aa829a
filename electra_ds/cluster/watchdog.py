"""Watchdog: detects dead or hung ranks through heartbeats and stops all ranks with one error.

Each rank writes a heartbeat a few times per `silence_seconds` into the TCP store of the process
group. It reads those of rank 0 and of the ranks on its own machine; rank 0 reads all.

A killed process is found in the process table. An exception is reported by its rank. All other
failures are found by missing heartbeats. All ranks report the first failure that was written into
the store. A rank with a main thread that still waits for a lost rank is ended.
"""

import contextlib
import datetime
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.rank_log import LOG
from electra_ds.common.errors import RunFailure
from electra_ds.common.processes import is_gone, machine_id, start_time

PACKAGE = str(Path(__file__).parents[1])
MISSES = 8  # missed heartbeats of a rank, or missed answers of the store, that are a failure
GRACE_SECONDS = 6.0  # from the failure to the end of a rank with a hanging main thread
ANSWER_SECONDS = 3.0  # longest wait for an answer of the store after a failure and at the end


class Failure(NamedTuple):
    """The rank that failed first, and the error.

    is_silent: the process may still exist. A rank on the same machine kills it.
    """

    rank: int
    host: str
    error: str
    is_silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed first: {self.error}"


class Heartbeat(NamedTuple):
    """State of a rank that it writes into the store, as JSON."""

    host: str
    machine: str  # boot and process namespace, see `processes.machine`
    pid: int
    started: str  # start time of the process, see `processes.started`
    number: int = 0
    location: str = ""  # of the main thread, such as `engine.py:300 step`
    in_collective: bool = False  # whether it waits there for other ranks
    left: bool = False  # whether the rank has ended its block and announced it

    def is_gone(self) -> bool:
        """Whether the process has ended; False for one on another machine."""
        return is_gone(self._asdict())


class Watchdog:
    """Watches the ranks while a block runs. Use it as a context manager on every rank.

    If the block raises the error of a lost connection, RunFailure with the first failure is raised
    instead. If the block hangs in a collective after another rank failed, the process ends within
    silence_seconds + 15 s. Missing heartbeats are counted in rounds of the watching thread and not
    by a clock, so that a suspended or slow machine does not report other ranks as lost. A single
    rank is not watched; its errors are recorded.

    silence_seconds: time without a heartbeat after which a rank counts as lost.
    timeout_minutes: timeout of the collectives. If no rank makes progress for a slightly shorter
        time, the rank that hangs is reported.
    on_rank0: calls a function on rank 0 and returns its result on every rank.
    record: called on one rank with the first failure (rank, error, host).
    is_collective: returns whether a frame belongs to a function that waits for other ranks. It is
        called with the innermost frame of this package in the main thread.
    """

    def __init__(
        self,
        ranks: Ranks,
        silence_seconds: float,
        timeout_minutes: float,
        on_rank0: Callable[[Callable[[], Any]], Any],
        record: Callable[[int, BaseException | str, str], None] = lambda *_: None,
        is_collective: Callable[[FrameType], bool] = lambda frame: False,
    ):
        self._rank = ranks.rank
        self._world_size = ranks.world_size
        self._on_rank0 = on_rank0
        self._record = record
        self._is_collective = is_collective
        self._silence_seconds = silence_seconds
        self._round_seconds = silence_seconds / MISSES
        # Shorter than the timeout of the collectives, which raises errors on the waiting ranks and
        # not on the one that hangs.
        self._patience = max(MISSES, int(60 * timeout_minutes / self._round_seconds) - 4)
        pid = os.getpid()
        self._own = Heartbeat(socket.gethostname(), machine_id(), pid, start_time(pid))
        self._heartbeats: dict[int, Heartbeat] = {}  # as last read
        self._exchanges = 0  # with the store
        self._store_error = ""  # after which there is no further exchange
        self._proposal = ""  # this rank's failure as JSON, offered to the store
        self._first: Failure | None = None  # the failure that all ranks agree on
        self._locations: list[tuple[str, int]] = []
        self._rounds_without_motion = 0
        self._has_own_message = False  # the main thread ends with an error of its own
        self._wake = threading.Event()
        self._failed = threading.Event()
        self._leaving = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            # torchrun's store is kept for the next attempt, so each attempt uses its own keys.
            attempt = self._on_rank0(lambda: secrets.token_hex(8))
            for loop in (lambda: self._exchange_heartbeats(attempt), self._watch):
                threading.Thread(target=loop, daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Stop watching. Raises RunFailure when another rank failed first."""
        is_lost_peer = _is_lost_connection(error)
        if error is not None:
            self._has_own_message = not is_lost_peer
            LOG.error("rank %d ends", self._rank, exc_info=error)
            patience = self._silence_seconds + 4 * self._round_seconds
            if not (is_lost_peer and self._failed.wait(patience)):
                text = f"{type(error).__name__}: {error}"
                self._agree_on(Failure(self._rank, self._own.host, text), error)
        self._leave()
        if is_lost_peer and self._first is not None and self._first.rank != self._rank:
            raise RunFailure(self._message()) from error

    # ----------------------------------------------------------------------------- the store

    def _exchange_heartbeats(self, attempt: str) -> None:
        """Write and read heartbeats until the store fails.

        This runs in its own thread, because calls of the store do not return when the network to
        its host is interrupted.
        """
        try:
            store = self._open_store(attempt)
            watched = list(range(self._world_size))
            while True:
                location, in_collective = self._current_location()
                self._own = self._own._replace(
                    number=self._own.number + 1, location=location, in_collective=in_collective
                )
                store.set(str(self._rank), json.dumps(self._own))
                first = store.compare_set("first", "", self._proposal)
                if first:
                    self._first = Failure(*json.loads(first))
                texts = store.multi_get([str(rank) for rank in watched])
                self._heartbeats = {
                    rank: Heartbeat(*json.loads(text))
                    for rank, text in zip(watched, texts, strict=True)
                }
                self._exchanges += 1
                watched = [rank for rank in watched if self._watches(rank)]
                self._wake.wait(self._round_seconds)
                self._wake.clear()
        except RuntimeError as error:
            self._store_error = str(error).splitlines()[0]

    def _open_store(self, attempt: str) -> Any:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            wait_for_workers=False,
            timeout=datetime.timedelta(minutes=1),
        )
        return dist.PrefixStore(attempt, store)

    def _watches(self, rank: int) -> bool:
        return self._rank == 0 or rank == 0 or self._is_on_this_machine(rank)

    def _refresh(self) -> bool:
        """Exchange heartbeats now. Returns whether the store answered within ANSWER_SECONDS."""
        goal = self._exchanges + 2  # one may be under way
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._exchanges < goal and time.monotonic() < deadline:
            if self._world_size == 1 or self._store_error:
                break
            self._wake.set()
            time.sleep(0.02)
        return self._exchanges >= goal

    def _leave(self) -> None:
        """Tell the other ranks that this one leaves.

        Rank 0 waits for the others, because its process may hold the store.
        """
        self._leaving.set()
        self._own = self._own._replace(left=True)
        lost = self._first.rank if self._first else None
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._refresh() and self._rank == 0 and time.monotonic() < deadline:
            others = (beat for rank, beat in self._heartbeats.items() if rank != lost)
            if all(beat.left for beat in others):
                break

    # ----------------------------------------------------------------------------- detection

    def _watch(self) -> None:
        """Count missed heartbeats per round until a rank fails or this one leaves."""
        previous: dict[int | str, int] = {}
        missed: Counter[int | str] = Counter()
        while not self._leaving.wait(self._round_seconds):
            current: dict[int | str, int] = {"store": self._exchanges}
            current |= {rank: beat.number for rank, beat in self._heartbeats.items()}
            # Without an answer of the store no heartbeat of a rank counts as missed.
            store_answers = previous.get("store") != current["store"]
            for key in current if store_answers else ["store"]:
                missed[key] = missed[key] + 1 if previous.get(key) == current[key] else 0
            previous = current
            failure = self._first or self._find_failure(missed)
            if failure:
                self._stop(failure)
                return

    def _find_failure(self, missed: Counter[int | str]) -> Failure | None:
        """Return the failure of a rank that has ended or sends no heartbeats, or None."""
        others = {
            rank: beat
            for rank, beat in self._heartbeats.items()
            if rank != self._rank and not beat.left
        }
        for rank, beat in others.items():
            if not beat.is_gone():
                continue
            if self._refresh() and (self._first or self._heartbeats[rank].left):
                return self._first  # it has reported its error, or ended its block
            text = (
                f"process {beat.pid} is gone: killed (kill -9, out of memory), or it left without "
                f"a message; last seen at {beat.location}"
            )
            return Failure(rank, beat.host, text)
        if missed["store"] >= (2 if self._store_error else MISSES):
            # Rank 0 may have ended its block, and its process with the store.
            has_left = 0 in self._heartbeats and self._heartbeats[0].left
            return None if has_left else self._store_failure()
        for rank, beat in others.items():
            if missed[rank] >= MISSES:
                text = self._silent(f"last seen at {beat.location}")
                return Failure(rank, beat.host, text, is_silent=True)
        return self._hang() if self._rank == 0 else None

    def _store_failure(self) -> Failure:
        store = f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        cut_off = self._silent(f"it hangs, or {self._own.host} is cut off from it")
        cause = self._store_error or cut_off
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            text = f"{store} (torchrun's) does not answer: {cause}"
            return Failure(self._rank, self._own.host, text)
        host = self._heartbeats[0].host if self._heartbeats else os.environ["MASTER_ADDR"]
        text = f"{store}, which it holds, does not answer: {cause}"
        return Failure(0, host, text, is_silent=not self._store_error)

    def _silent(self, detail: str) -> str:
        return f"silent for {self._silence_seconds:g} s, {detail}"

    def _hang(self) -> Failure | None:
        """Return the failure of the rank that hangs, or None.

        A hang is reported when no rank changes its location for `_patience` rounds and the
        locations differ. The rank is the one outside collectives, or the one at the least common
        location.
        """
        beats = self._heartbeats
        locations = [(beats[rank].location, rank) for rank in sorted(beats)]
        is_same = locations == self._locations
        self._rounds_without_motion = self._rounds_without_motion + 1 if is_same else 0
        self._locations = locations
        common = Counter(location for location, _ in locations)
        if self._rounds_without_motion < self._patience or len(common) < 2:
            return None
        # A rank outside collectives is the cause; else the one at the least common location.
        location, rank = min(
            locations, key=lambda pair: (beats[pair[1]].in_collective, common[pair[0]])
        )
        others = ", ".join(
            f"{count} at {other}" for other, count in common.items() if other != location
        )
        seconds = self._rounds_without_motion * self._round_seconds
        text = f"no rank moved for {seconds:.0f} s: it is at {location}, the other ranks: {others}"
        return Failure(rank, beats[rank].host, text)

    # ------------------------------------------------------------------------- after a failure

    def _stop(self, failure: Failure) -> None:
        # The timer starts first, because writing files may hang, too.
        threading.Timer(GRACE_SECONDS, self._end_process).start()
        self._agree_on(failure, failure.error)
        LOG.error("%s", self._first)
        self._failed.set()
        if not self._has_own_message:
            signal.raise_signal(signal.SIGUSR2)  # faulthandler prints the stacks of this rank
        if self._first:
            self._kill_hung_rank(self._first)

    def _agree_on(self, failure: Failure, error: BaseException | str) -> None:
        """Set `_first` to this failure, or to the one that the store already holds.

        The failure is recorded by the rank that wrote it into the store.
        """
        if self._first is not None:
            return
        self._proposal = json.dumps(failure)
        self._refresh()
        self._first = self._first or failure  # if the store does not answer
        if self._first == failure:
            self._record(failure.rank, error, failure.host)

    def _kill_hung_rank(self, failure: Failure) -> None:
        """Make a silent rank of this machine print its stacks, then kill it.

        The process may be stopped (SIGSTOP) or hold the GIL, so that it cannot end itself.
        """
        if not failure.is_silent or failure.rank == self._rank:
            return
        if not self._is_on_this_machine(failure.rank):
            return
        beat = self._heartbeats[failure.rank]
        steps = ((signal.SIGUSR2, 0.0), (signal.SIGCONT, 0.5), (signal.SIGKILL, 0.0))
        for number, pause in steps:
            with contextlib.suppress(OSError):
                if not beat.is_gone():
                    os.kill(beat.pid, number)
            time.sleep(pause)

    def _end_process(self) -> None:
        try:
            message = f"electra-ds (rank {self._rank}): error: {self._message()}"
            print(message, file=sys.stderr, flush=True)
        finally:  # print fails if the reader of standard error has ended
            os._exit(1)

    def _message(self) -> str:
        files = (
            handler.baseFilename
            for handler in LOG.handlers
            if isinstance(handler, logging.FileHandler)
        )
        path = next(files, "standard error")
        return f"{self._first}; the stacks of this rank are in {path}"

    def _is_on_this_machine(self, rank: int) -> bool:
        return (
            rank in self._heartbeats and self._heartbeats[rank].machine == self._own.machine != ""
        )

    def _current_location(self) -> tuple[str, bool]:
        """Return the location of the main thread in this package, and whether it is collective."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame and frame.f_back and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame is None:
            return "the end of its main thread", False
        code = frame.f_code
        location = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        return location, self._is_collective(frame)


def _is_lost_connection(error: BaseException | None) -> bool:
    """Return whether an error is of a type that torch.distributed raises for a lost peer."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and "gloo" in str(error)
    )
