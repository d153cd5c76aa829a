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
    """Mark a function that waits for other ranks. `is_collective` is then True for its frames."""
    _COLLECTIVE_CODE.add(function.__code__)
    return function


def is_collective(frame: FrameType) -> bool:
    """Return whether a frame belongs to a function marked `collective`. Used by the watchdog."""
    return frame.f_code in _COLLECTIVE_CODE


@collective
def on_rank0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and return its result on every rank. Collective.

    Only rank 0 reads and writes the run folder, so that all ranks make the same decisions.
    A UserError of the function is raised on every rank. An OSError is raised as RunFailure on every
    rank. Any other exception is raised on rank 0 only.
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

    totals: Any  # counts of the next global batch, a NamedTuple of the type that was sent
    stop: int  # ranks that ask to save and stop
    save: int  # ranks that ask to save
    written: int  # ranks that have written their part of the pending checkpoint


class ControlGroup:
    """Small messages between CPUs (gloo), beside the engine's NCCL or gloo group.

    All methods are collective. In a world of one rank they return at once.
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
        """Return the sum over the ranks, fp64 on the CPU, the same on every rank.

        The sum is in the order of the ranks, so that a repeated run gives the same bits.
        """
        on_cpu = tensor.detach().double().cpu()
        return torch.stack(self.all_gather(on_cpu)).sum(0)

    @collective
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the CPU tensors of all ranks in order. They have the same shape and dtype."""
        if self._group is None:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks.world_size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    @collective
    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks in order. The values are pickled and should be small."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @collective
    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self._group is not None:
            dist.barrier(group=self._group)


@functools.cache
@collective
def _gloo_group() -> dist.ProcessGroup:
    """One group for all engines of a process."""
    return dist.new_group(backend="gloo")


@collective
def leave() -> None:
    """Destroy the process groups. Call it after every engine is closed. Collective."""
    _gloo_group.cache_clear()
    dist.destroy_process_group()


@contextlib.contextmanager
def fail_on_all_ranks(
    all_gather_object: Callable[[Any], list[Any]], action: str
) -> Iterator[dict[str, Any]]:
    """Run a block on every rank. If it fails on one rank, raise the error on all ranks. Collective.

    action: what the block does, for the message.
    Yields a dict for values of this rank. After the block its key `all_ranks` is the list of the
    dicts of all ranks.
    Raises UserError when a rank raised one, and RunFailure when a rank raised OSError. Other
    exceptions are raised only on the rank where they occur.
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
