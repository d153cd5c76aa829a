"""How do independent tasks run, here, in local processes or on MPI ranks, with their progress told in one place?"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from electra_ds.common.errors import UserError

OnProgress = Callable[[int], None]  # a task says how much more of it is done
Task = Callable[[Any, OnProgress], dict]  # what a task does with its input
Run = Callable[
    [Task, list, OnProgress], list[dict]
]  # (function, inputs, told) -> results in the order of the inputs
Progress = Callable[[str, int, int], None]  # (stage, done, total)

GRACE = 5  # seconds in which a worker may clean up
PAUSE = 0.005  # seconds between two looks at the pipes; a call of MPI that waits keeps a core busy


def summed(told: OnProgress) -> OnProgress:
    """A `moved` that tells the sum of what it hears."""
    done = 0

    def on_progress(count: int) -> None:
        nonlocal done
        done += count
        told(done)

    return on_progress


class Rank:
    """Another MPI rank, as the end of a pipe to it."""

    def __init__(self, world: Any, rank: int):
        self._world, self._rank = world, rank

    def poll(self) -> bool:
        return self._world.iprobe(source=self._rank)

    def send(self, value: object) -> None:
        self._world.send(value, self._rank)

    def recv(self) -> Any:
        _wait([self])
        if (found := self._world.recv(source=self._rank)) is None:
            raise EOFError
        return found

    def close(self) -> None:
        self.send(None)


Pipe = Connection | Rank


@contextmanager
def mpi_ranks(world: Any) -> Iterator[list[Rank] | None]:
    """On rank 0 of an MPI communicator: the other ranks, for `pool`. On the others None.

    world: mpi4py's communicator, or None for a process without peers ([] is yielded). The other ranks work for rank 0
    from entering on, until it leaves. When rank 0 fails, its process must end them (MPI_Abort).
    """
    if world is None:
        yield []
        return
    if world.Get_rank():
        _work(Rank(world, 0))
        yield None
        return
    others = [Rank(world, rank) for rank in range(1, world.Get_size())]
    yield others
    for other in others:
        other.close()


@contextmanager
def pool(workers: int, ranks: Sequence[Rank] = ()) -> Iterator[Run]:
    """A `run`: calls the function on each input and tells the sum of what the tasks moved.

    The tasks run on the `ranks` when there are some, else in so many processes, or for one worker here. The first task
    that fails ends the run with its error; finished tasks keep what they wrote. Each worker has a pipe of its own, so
    it notices at its next `moved` that this process is gone, and this process that a worker is.
    """
    if ranks:
        yield partial(_share_out, ranks)
    elif workers == 1:
        yield _run_here
    else:
        with _processes(workers) as pipes:
            yield partial(_share_out, pipes)


@contextmanager
def _processes(workers: int) -> Iterator[list[Connection]]:
    """Local processes at work, as the pipes to them."""
    context = multiprocessing.get_context("spawn")  # the tokenizers' threads do not survive a fork
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs,), daemon=True)
            processes[ours].start()
            theirs.close()
        yield list(processes)
    finally:
        for pipe in processes:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process in processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


def _wait(pipes: list[Pipe]) -> list[Pipe]:
    """Those that have something to say, one at least."""
    while not (ready := [pipe for pipe in pipes if pipe.poll()]):
        time.sleep(PAUSE)
    return ready


def _run_here(function: Task, inputs: list, told: OnProgress) -> list[dict]:
    on_progress = summed(told)
    return [function(one, on_progress) for one in inputs]


def _share_out(pipes: Sequence[Pipe], function: Task, inputs: list, told: OnProgress) -> list[dict]:
    """Hand the inputs to idle workers, in order, until all have come back."""
    idle, on_progress, results = list(pipes), summed(told), [{}] * len(inputs)
    number_at: dict[Pipe, int] = {}  # of the busy ones
    given = 0
    while given < len(inputs) or number_at:
        try:
            while idle and given < len(inputs):
                idle[-1].send((function, inputs[given]))
                number_at[idle.pop()] = given
                given += 1
            heard = [(pipe, pipe.recv()) for pipe in _wait(list(number_at))]
        except (EOFError, OSError):
            raise UserError(
                "a worker process was killed (out of memory?); the same command goes on from what is "
                "finished, fewer --workers take less memory"
            ) from None
        for pipe, found in heard:
            if isinstance(found, Exception):
                raise found
            if isinstance(found, int):
                on_progress(found)
            else:
                results[number_at.pop(pipe)] = found
                idle.append(pipe)
    return results


def _work(pipe: Pipe) -> None:
    """In a worker: tasks in; counts, then a result or an error out; until the other end is gone."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        while True:
            function, one = pipe.recv()
            try:
                found: object = function(one, pipe.send)
            except Exception as error:
                if not isinstance(error, (UserError, OSError)):
                    traceback.print_exc()  # the way there is lost between processes
                found = error
            pipe.send(found)
    except (EOFError, OSError, KeyboardInterrupt):
        return  # nobody listens any more


@contextmanager
def console_progress() -> Iterator[Progress]:
    """A `progress` that draws a bar per stage on the terminal."""
    from rich import progress as rich

    with rich.Progress(
        rich.TextColumn("{task.description:12}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
