"""Is every rank alive, and if not, who went first? Beats in the store where the ranks met; one verdict ends them all.

Each rank writes a beat a few times per `silence_seconds` and reads those of rank 0 and of its own machine (rank 0: of
all). kill -9 is seen in the process table, an exception is told by its rank, everything else is silence. What the
store accepts first is the cause, on every rank; a rank whose main thread waits for the lost one is ended with it.
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
from typing import Any, NamedTuple

import torch.distributed as dist

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import RunFailure
from electra_ds.common.processes import is_gone, machine, started

LOG = logging.getLogger("electra_ds")
MISSES = 8  # beats that a silent rank, or the store, may miss
GRACE_SECONDS = 6.0  # from the verdict to the end of a rank whose main thread hangs
ANSWER_SECONDS = 3.0  # for the store to answer before a rank judges, or leaves, without it


class Failure(NamedTuple):
    """The rank that went first, and how. is_silent: it may hang, and has to be ended by others."""

    rank: int
    host: str
    error: str
    is_silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} went first: {self.error}"


class Watchdog:
    """Watches over the ranks while a block runs, a context entered on every rank.

    When the block raises what a lost peer causes, RunFailure names that peer instead; when it hangs in a collective,
    the process ends within silence_seconds + 15 s. Silence is counted in rounds of the watcher's own: a machine that
    slept, or is slow, blames nobody. A rank without peers is not watched, its errors are recorded all the same.

    silence_seconds: without a word of a rank. timeout_minutes: in which no rank moves. on_rank0: what rank 0 finds,
    on every rank. record: is told what went first (rank, error, host), on one rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        silence_seconds: float,
        timeout_minutes: float,
        on_rank0: Callable[[Callable], Any],
        record: Callable[[int, BaseException | str, str], None] = lambda *_: None,
    ):
        self._rank, self._world_size, self._from_first, self._record = (
            ranks.rank,
            ranks.world_size,
            on_rank0,
            record,
        )
        self._silence, self._seconds = silence_seconds, silence_seconds / MISSES
        # Before the collectives' own timeout, which blames the ranks that waited.
        self._patience = max(MISSES, int(60 * timeout_minutes / self._seconds) - 4)
        self._me = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "beat": 0,
            "place": "",
            "left": False,
        }
        self._beats: dict[int, dict] = {}  # as last read
        self._exchanges, self._lost = 0, ""  # with the store; why there can be no more
        self._claim, self._first = "", None  # what this rank would say, what all say: a Failure
        self._places, self._still, self._ends = [], 0, False
        self._wake, self._found, self._leaving = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            attempt = self._from_first(
                lambda: secrets.token_hex(8)
            )  # torchrun's store outlives an attempt
            for work in (lambda: self._exchange_on(attempt), self._judge_on):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        is_of_peers = isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and "gloo" in str(error)
        )
        if error is not None:
            self._ends = not is_of_peers
            LOG.error("rank %d ends", self._rank, exc_info=error)
            if not (is_of_peers and self._found.wait(self._silence + 4 * self._seconds)):
                self._settle(
                    Failure(self._rank, self._me["host"], f"{type(error).__name__}: {error}"), error
                )
        self._leave()
        if is_of_peers and self._first.rank != self._rank:
            raise RunFailure(self._sentence()) from error

    # ------------------------------------------------------------------------------------------------------ the store

    def _exchange_on(self, attempt: str) -> None:
        """Beat and read beats, in a thread of its own: with a host that is cut off the store's calls do not return."""
        try:
            where, wait = (
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
                datetime.timedelta(minutes=1),
            )
            store = dist.PrefixStore(
                attempt, dist.TCPStore(*where, wait_for_workers=False, timeout=wait)
            )
            watched = range(self._world_size)
            while True:
                self._me |= {"beat": self._me["beat"] + 1, "place": _place()}
                store.set(str(self._rank), json.dumps(self._me))
                if first := store.compare_set("first", "", self._claim):
                    self._first = Failure(*json.loads(first))
                beats = store.multi_get([str(rank) for rank in watched])
                self._beats = {
                    rank: json.loads(beat) for rank, beat in zip(watched, beats, strict=True)
                }
                self._exchanges += 1
                watched = [
                    rank for rank in watched if self._rank == 0 or rank == 0 or self._is_here(rank)
                ]
                self._wake.wait(self._seconds)
                self._wake.clear()
        except RuntimeError as error:
            self._lost = str(error).splitlines()[0]

    def _refresh(self) -> bool:
        """Whether the store answered an exchange that began after this call."""
        goal, deadline = (
            self._exchanges + 2,
            time.monotonic() + ANSWER_SECONDS,
        )  # one may be under way
        while (
            self._exchanges < goal
            and time.monotonic() < deadline
            and self._world_size > 1
            and not self._lost
        ):
            self._wake.set()
            time.sleep(0.02)
        return self._exchanges >= goal

    def _leave(self) -> None:
        """Be missed by nobody; rank 0, whose process may hold the store, goes last."""
        self._leaving.set()
        self._me["left"] = True
        deadline, gone = (
            time.monotonic() + ANSWER_SECONDS,
            self._first.rank if self._first else None,
        )
        while self._refresh() and self._rank == 0 and time.monotonic() < deadline:
            if all(beat["left"] for rank, beat in self._beats.items() if rank != gone):
                break

    # ---------------------------------------------------------------------------------------------------- the verdict

    def _judge_on(self) -> None:
        heard, missed = {}, Counter()
        while not self._leaving.wait(self._seconds):
            now = {"store": self._exchanges} | {
                rank: beat["beat"] for rank, beat in self._beats.items()
            }
            for who in (
                now if heard.get("store") != now["store"] else ["store"]
            ):  # through it all others are heard
                missed[who] = missed[who] + 1 if heard.get(who) == now[who] else 0
            heard = now
            if verdict := self._first or self._look(missed):
                threading.Timer(
                    GRACE_SECONDS, self._end
                ).start()  # first of all: files may hang like the rest
                self._settle(verdict, verdict.error)
                LOG.error("%s", self._first)
                self._found.set()
                if not self._ends:  # with a message of its own
                    signal.raise_signal(signal.SIGUSR2)  # the stacks of this rank, by faulthandler
                self._kill_hung_rank(self._first)
                return

    def _look(self, missed: Counter) -> Failure | None:
        """Who is gone, or hangs?"""
        others = {
            rank: beat
            for rank, beat in self._beats.items()
            if rank != self._rank and not beat["left"]
        }
        for rank, beat in others.items():
            if is_gone(beat):
                if self._refresh() and (
                    self._first or self._beats[rank]["left"]
                ):  # it said why, or went in order
                    return self._first
                gone = f"process {beat['pid']} is gone: killed (kill -9, out of memory), or it left without a word"
                return Failure(rank, beat["host"], f"{gone}; last seen at {beat['place']}")
        if missed["store"] >= (2 if self._lost else MISSES):
            has_left = (
                0 in self._beats and self._beats[0]["left"]
            )  # in order, and the store with it
            return None if has_left else self._without_store()
        for rank, beat in others.items():
            if missed[rank] >= MISSES:
                return Failure(
                    rank,
                    beat["host"],
                    self._silent(f"last seen at {beat['place']}"),
                    is_silent=True,
                )
        return self._standstill() if self._rank == 0 else None

    def _without_store(self) -> Failure:
        where = f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        cause = self._lost or self._silent(f"it hangs, or {self._me['host']} is cut off from it")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return Failure(
                self._rank, self._me["host"], f"{where} (torchrun's) does not answer: {cause}"
            )
        host = self._beats[0]["host"] if self._beats else os.environ["MASTER_ADDR"]
        return Failure(
            0, host, f"{where}, which it holds, does not answer: {cause}", is_silent=not self._lost
        )

    def _silent(self, detail: str) -> str:
        return f"silent for {self._silence:g} s, {detail}"

    def _standstill(self) -> Failure | None:
        """Nobody moves, and somebody stands elsewhere than the others: they wait for it (rank 0 sees all)."""
        places = [(self._beats[rank]["place"], rank) for rank in sorted(self._beats)]
        self._still = self._still + 1 if places == self._places else 0
        self._places, common = places, Counter(place for place, _ in places)
        if self._still < self._patience or len(common) < 2:
            return None
        # Whoever waits stands in engine.py, which makes all collectives.
        place, rank = min(
            places, key=lambda found: (found[0].startswith("engine.py"), common[found[0]])
        )
        others = ", ".join(
            f"{count} at {other}" for other, count in common.items() if other != place
        )
        waited = f"no rank moved for {self._still * self._seconds:.0f} s: it stands at {place}, of the others {others}"
        return Failure(rank, self._beats[rank]["host"], waited)

    def _settle(self, verdict: Failure, error: BaseException | str) -> None:
        """Agree on what went first: this, unless the store holds another. Whoever brought it records it."""
        if self._first is None:
            self._claim = json.dumps(verdict)
            self._refresh()
            self._first = self._first or verdict  # the store does not answer
            if self._first == verdict:
                self._record(verdict.rank, error, verdict.host)

    def _kill_hung_rank(self, verdict: Failure) -> None:
        """A silent rank of this machine may be stopped, or hold Python's lock: it shows its stacks, and is killed."""
        if verdict.is_silent and verdict.rank != self._rank and self._is_here(verdict.rank):
            beat = self._beats[verdict.rank]
            for number, pause in (
                (signal.SIGUSR2, 0.0),
                (signal.SIGCONT, 0.5),
                (signal.SIGKILL, 0.0),
            ):
                with contextlib.suppress(OSError):
                    if not is_gone(beat):
                        os.kill(beat["pid"], number)
                time.sleep(pause)

    def _end(self) -> None:
        try:
            print(
                f"electra-ds (rank {self._rank}): error: {self._sentence()}",
                file=sys.stderr,
                flush=True,
            )
        finally:  # the launcher that read it may be gone
            os._exit(1)

    def _sentence(self) -> str:
        path = next(
            (to.baseFilename for to in LOG.handlers if isinstance(to, logging.FileHandler)),
            "standard error",
        )
        return f"{self._first}; the stacks of this rank are in {path}"

    def _is_here(self, rank: int) -> bool:
        return rank in self._beats and self._beats[rank]["machine"] == self._me["machine"] != ""


def _place() -> str:
    """Where the main thread is, in code of this package, such as `engine.py:300 agreed`."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    home = str(Path(__file__).parents[1])
    while frame and frame.f_back and not frame.f_code.co_filename.startswith(home):
        frame = frame.f_back
    return (
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        if frame
        else "its end"
    )
