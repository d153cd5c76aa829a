"""Communication among the ranks beside the engine's own: votes, sums, objects, errors of rank 0."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import RunFailure, UserError

Function = TypeVar("Function", bound=Callable[..., Any])

_COLLECTIVE_CODE: set[CodeType] = set()


def collective(function: Function) -> Function:
    """Mark a function that waits for other ranks, so that `is_collective` recognises its frames."""
    _COLLECTIVE_CODE.add(function.__code__)
    return function


def is_collective(frame: FrameType) -> bool:
    """Whether a frame belongs to a function that waits for other ranks. The watchdog uses it."""
    return frame.f_code in _COLLECTIVE_CODE


@collective
def on_rank0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and return its result on every rank. Collective.

    Rank 0 alone reads and writes the run folder, so that all ranks decide alike. A UserError of the
    function is raised on every rank; an OSError becomes a RunFailure on every rank.
    """
    result: Any = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except UserError as user_error:
            error = user_error
        except OSError as os_error:
            error = RunFailure(f"rank 0: {os_error}")
    if dist.get_world_size() > 1:
        message = [result, error]
        dist.broadcast_object_list(message, src=0)
        result, error = message
    if error is not None:
        raise error
    return result


class Votes(NamedTuple):
    """Sums over the ranks of one control message."""

    totals: Any  # counts of the next global batch, of the type that was sent
    stop: int  # ranks that ask to save and stop
    save: int  # ranks that ask to save
    written: int  # ranks that have written their part of the pending checkpoint


class ControlGroup:
    """Small messages between CPUs (gloo), beside the engine's NCCL or gloo group.

    All methods but those of a single rank are collective.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._group = _gloo_group() if ranks.world_size > 1 else None
        self._message = torch.zeros(0, dtype=torch.int64)
        self._totals_type: type = tuple
        self._pending: dist.Work | None = None

    @collective
    def send_votes(self, totals: tuple, *, stop: bool, save: bool, written: bool) -> None:
        """Send this rank's counts of the next batch and its votes. Does not wait for the others.

        totals: a NamedTuple of integers, of one type on all ranks.
        """
        self._totals_type = type(totals)
        message = [*map(int, totals), stop, save, written]
        self._message = torch.tensor(message, dtype=torch.int64)
        if self._group is not None:
            self._pending = dist.all_reduce(self._message, group=self._group, async_op=True)

    @collective
    def wait_votes(self) -> Votes:
        """Wait for the message of the last `send_votes`. Returns the same sums on every rank."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        *totals, stop, save, written = self._message.tolist()
        return Votes(self._totals_type(*totals), stop, save, written)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, fp64 on the CPU. The order is that of the ranks, so the sum repeats."""
        on_cpu = tensor.detach().double().cpu()
        return torch.stack(self.all_gather(on_cpu)).sum(0)

    @collective
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensor of each rank, on every rank. Shapes and dtypes are equal on all ranks."""
        if self._group is None:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks.world_size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    @collective
    def all_gather_object(self, value: Any) -> list[Any]:
        """A small plain value of each rank, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @collective
    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            dist.barrier(group=self._group)


@functools.cache
@collective
def _gloo_group() -> dist.ProcessGroup:
    """One group for all engines of a process."""
    return dist.new_group(backend="gloo")


@collective
def leave() -> None:
    """Destroy the process groups, after every engine is closed."""
    _gloo_group.cache_clear()
    dist.destroy_process_group()


@contextlib.contextmanager
def fail_on_all_ranks(
    all_gather_object: Callable[[Any], list[Any]], action: str
) -> Iterator[dict[str, Any]]:
    """Run a block on every rank. If it fails on one, raise on all with the rank and the cause.

    action: what the block does, for the message. The yielded dict is exchanged: after the block its
    key `all_ranks` lists the dict of each rank. Raises UserError for a user's mistake, else
    RunFailure.
    """
    report: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        yield report
    except (OSError, UserError) as error:
        problem = error
    gathered = all_gather_object((problem, dict(report)))
    for rank, (failure, _) in enumerate(gathered):
        if isinstance(failure, UserError):
            raise UserError(f"{action} failed: rank {rank}: {failure}")
        if failure:
            raise RunFailure(
                f"{action} failed: rank {rank}: {failure}; earlier checkpoints are untouched"
            )
    report["all_ranks"] = [rank_report for _, rank_report in gathered]
