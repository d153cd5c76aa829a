"""Execution of independent tasks: in this process, in local processes, or on MPI ranks.

A task is a function of one input and `on_progress`, which it calls with amounts of finished work.
"""

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

OnProgress = Callable[[int], None]  # receives the amount of work finished since the last call
Task = Callable[[Any, OnProgress], dict]  # (input, on_progress) -> result
# (task, inputs, on_total) -> results in the order of the inputs. on_total receives the sum of the
# amounts of all tasks.
Run = Callable[[Task, list, Callable[[int], None]], list[dict]]
Progress = Callable[[str, int, int], None]  # receives (stage, done, total)

GRACE = 5  # seconds until a worker that does not end is killed
# Seconds between two polls of the pipes. A blocking receive of MPI would keep a core busy.
PAUSE = 0.005


def ignore_progress(stage: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""


def running_total(on_total: Callable[[int], None]) -> OnProgress:
    """Return a callback for amounts that calls `on_total` with their sum so far."""
    total = 0

    def on_progress(amount: int) -> None:
        nonlocal total
        total += amount
        on_total(total)

    return on_progress


class Rank:
    """Another MPI rank, with the interface of a connection."""

    def __init__(self, world: Any, rank: int) -> None:
        self._world = world
        self._rank = rank

    def poll(self) -> bool:
        """Whether a message of the rank can be received without waiting."""
        return self._world.iprobe(source=self._rank)

    def send(self, value: object) -> None:
        """Send a picklable value to the rank."""
        self._world.send(value, self._rank)

    def recv(self) -> Any:
        """Wait for a value of the rank and return it. Raises EOFError after its `close`."""
        _wait_for_messages([self])
        message = self._world.recv(source=self._rank)
        if message is None:  # sent by `close`
            raise EOFError
        return message

    def close(self) -> None:
        """Tell the rank that no more values follow."""
        self.send(None)


Pipe = Connection | Rank


@contextmanager
def mpi_ranks(world: Any) -> Iterator[list[Rank] | None]:
    """Yield the other ranks, for `pool`, on rank 0 of an MPI communicator, and None on the others.

    world: communicator of mpi4py, or None for a single process (yields [])
    On the other ranks, entering the context runs the tasks of rank 0 until rank 0 leaves it. If
    rank 0 raises, its process must end the other ranks (MPI_Abort).
    """
    if world is None:
        yield []
        return
    if world.Get_rank():
        _serve_tasks(Rank(world, 0))
        yield None
        return
    others = [Rank(world, rank) for rank in range(1, world.Get_size())]
    yield others
    for other in others:
        other.close()


@contextmanager
def pool(workers: int, ranks: Sequence[Rank] = ()) -> Iterator[Run]:
    """Yield a `Run`, which executes tasks.

    workers: number of local processes; with 1, tasks run in this process
    ranks:   run the tasks instead, if there are any
    The first task that fails ends the run with its error; finished tasks keep what they wrote. Each
    worker has its own pipe: a worker detects at its next progress report that this process has
    ended, and this process detects that a worker has ended.
    """
    if ranks:
        yield partial(_distribute, ranks)
    elif workers == 1:
        yield _run_here
    else:
        with _processes(workers) as pipes:
            yield partial(_distribute, pipes)


@contextmanager
def _processes(workers: int) -> Iterator[list[Connection]]:
    """Start local processes that run tasks; yield the pipes to them."""
    context = multiprocessing.get_context("spawn")  # threads of the tokenizers do not survive fork
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            near_end, far_end = context.Pipe()
            processes[near_end] = context.Process(target=_serve_tasks, args=(far_end,), daemon=True)
            processes[near_end].start()
            far_end.close()
        yield list(processes)
    finally:
        for pipe in processes:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process in processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


def _wait_for_messages(pipes: Sequence[Pipe]) -> list[Pipe]:
    """Wait until at least one pipe has a message; return those that have one."""
    while not (ready := [pipe for pipe in pipes if pipe.poll()]):
        time.sleep(PAUSE)
    return ready


def _run_here(task: Task, inputs: list, on_total: Callable[[int], None]) -> list[dict]:
    """A `Run` in this process."""
    on_progress = running_total(on_total)
    return [task(item, on_progress) for item in inputs]


def _distribute(
    pipes: Sequence[Pipe], task: Task, inputs: list, on_total: Callable[[int], None]
) -> list[dict]:
    """A `Run` on workers: send the inputs in order to idle workers until all are done."""
    idle = list(pipes)
    running: dict[Pipe, int] = {}  # worker -> number of its input
    on_progress = running_total(on_total)
    results: list[dict] = [{} for _ in inputs]
    sent = 0
    while sent < len(inputs) or running:
        try:
            while idle and sent < len(inputs):
                idle[-1].send((task, inputs[sent]))
                running[idle.pop()] = sent
                sent += 1
            messages = [(pipe, pipe.recv()) for pipe in _wait_for_messages(list(running))]
        except (EOFError, OSError):
            raise UserError(
                "a worker process was killed, possibly for lack of memory; the same command "
                "resumes; fewer --workers need less memory"
            ) from None
        for pipe, message in messages:
            if isinstance(message, Exception):
                raise message
            if isinstance(message, int):
                on_progress(message)
            else:
                results[running.pop(pipe)] = message
                idle.append(pipe)
    return results


def _serve_tasks(pipe: Pipe) -> None:
    """Run tasks in a worker process or rank until the other end of the pipe is closed.

    Receives (task, input). Sends amounts of progress, then the result or the error of the task.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        while True:
            task, item = pipe.recv()
            result: object
            try:
                result = task(item, pipe.send)
            except Exception as error:
                if not isinstance(error, (UserError, OSError)):
                    traceback.print_exc()  # pickling loses the traceback
                result = error
            pipe.send(result)
    except (EOFError, OSError, KeyboardInterrupt):
        return  # the other end is closed


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Yield a `Progress` that draws one bar per stage on the terminal, and nothing elsewhere."""
    from rich import progress as rich
    from rich.console import Console

    console = Console()
    with rich.Progress(
        rich.TextColumn("{task.description:12}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
