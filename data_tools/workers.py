"""How do independent tasks run, here or in local processes, with their progress told in one place?"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from electra_ds.errors import UserError

Moved = Callable[[int], None]  # a task says how much more of it is done
Task = Callable[[Any, Moved], dict]  # what a task does with its input
Run = Callable[[Task, list, Moved], list[dict]]  # (function, inputs, told) -> results in the order of the inputs
Progress = Callable[[str, int, int], None]  # (stage, done, total)

GRACE = 5  # seconds in which a worker may clean up


def summed(told: Moved) -> Moved:
    """A `moved` that tells the sum of what it hears."""
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        told(done)

    return moved


@contextmanager
def pool(workers: int) -> Iterator[Run]:
    """A `run`: calls the function on each input and tells the sum of what the tasks moved.

    The first task that fails ends the run with its error; finished tasks keep what they wrote. Each worker has a pipe
    of its own, so it notices at its next `moved` that this process is gone, and this process that a worker is.
    """
    if workers == 1:
        yield _run_here
        return
    context = multiprocessing.get_context("spawn")  # the tokenizers' threads do not survive a fork
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs,), daemon=True)
            processes[ours].start()
            theirs.close()
        yield lambda function, inputs, told: _share_out(list(processes), function, inputs, summed(told))
    finally:
        for pipe in processes:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process in processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


def _run_here(function: Task, inputs: list, told: Moved) -> list[dict]:
    moved = summed(told)
    return [function(one, moved) for one in inputs]


def _share_out(idle: list[Connection], function: Task, inputs: list, moved: Moved) -> list[dict]:
    """Hand the inputs to idle workers, in order, until all have come back."""
    results: list = [None] * len(inputs)
    number_at: dict[Connection, int] = {}  # of the busy ones
    given = 0
    while given < len(inputs) or number_at:
        try:
            while idle and given < len(inputs):
                idle[-1].send((function, inputs[given]))
                number_at[idle.pop()] = given
                given += 1
            heard = [(pipe, pipe.recv()) for pipe in wait(list(number_at))]
        except (EOFError, OSError):
            raise UserError("a worker process was killed (out of memory?); the same command goes on from what is "
                            "finished, fewer --workers take less memory") from None
        for pipe, found in heard:
            if isinstance(found, Exception):
                raise found
            if isinstance(found, int):
                moved(found)
            else:
                results[number_at.pop(pipe)] = found
                idle.append(pipe)
    return results


def _work(pipe: Connection) -> None:
    """In a worker process: tasks in; counts, then a result or an error out; until the other end is gone."""
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

    with rich.Progress(rich.TextColumn("{task.description:12}"), rich.BarColumn(), rich.TaskProgressColumn(),
                       rich.TimeElapsedColumn(), rich.TimeRemainingColumn()) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
