"""How do independent tasks run, here or in local processes, with their progress told in one place?"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from electra_ds.errors import UserError

Moved = Callable[[int], None]  # a task says how much more of it is done
Run = Callable[[Callable[[Any, Moved], dict], list, Moved], list[dict]]  # (function, tasks, told) -> results
Progress = Callable[[str, int, int], None]  # (stage, done, total)

_queue: Any = None  # in a worker process: to the parent


@contextmanager
def pool(workers: int) -> Iterator[Run]:
    """run(function, tasks, told) -> results in the order of the tasks; `told` hears the sum of what they moved.

    The first task that fails ends the run with its error; finished tasks keep what they wrote.
    """
    if workers == 1:
        yield _run_here
        return
    context = multiprocessing.get_context("spawn")  # the tokenizers' threads do not survive a fork
    queue = context.SimpleQueue()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue,))

    def run(function: Callable[[Any, Moved], dict], tasks: list, told: Moved) -> list[dict]:
        futures = [executor.submit(_in_worker, function, task) for task in tasks]
        pending, done = set(futures), 0
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                done += queue.get()
            told(done)
            try:
                for future in finished:
                    future.result()
            except BrokenProcessPool:
                raise UserError("a worker process was killed (out of memory?); the same command goes on from what is "
                                "finished, fewer --workers take less memory") from None
        return [future.result() for future in futures]

    try:
        yield run
    finally:
        executor.shutdown(cancel_futures=True)


def _run_here(function: Callable[[Any, Moved], dict], tasks: list, told: Moved) -> list[dict]:
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        told(done)

    return [function(task, moved) for task in tasks]


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    os.environ["RAYON_NUM_THREADS"] = "1"


def _in_worker(function: Callable[[Any, Moved], dict], task: Any) -> dict:
    return function(task, _queue.put)


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
