"""Communication among the ranks beside the engine's own: votes, sums, objects, errors of rank 0."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import LockedOut, RunFailure, UserError

Function = TypeVar("Function", bound=Callable[..., Any])

_COLLECTIVE_CODE: set[CodeType] = set()


def collective(function: Function) -> Function:
    """Mark a function that waits for other ranks. `is_collective` is then True for its frames."""
    _COLLECTIVE_CODE.add(function.__code__)
    return function


def is_collective(frame: FrameType) -> bool:
    """Return whether a frame belongs to a function marked `collective`. Used by the watchdog."""
    return frame.f_code in _COLLECTIVE_CODE


def encode(value: Any) -> bytes:
    """Return JSON values as bytes for other ranks. NaN and infinities are kept.

    Objects travel as JSON and not as pickles, because reading a pickle runs the code in it, and
    torch's ports accept connections without a password.
    Raises TypeError for a value that JSON would not give back: a path, an exception, a set, an
    array, or a dict with keys other than strings. Tuples become lists.
    """
    _check_keys(value)
    return json.dumps(value).encode()


def decode(message: bytes) -> Any:
    """Return the value of `encode`."""
    return json.loads(message)


def _check_keys(value: Any) -> None:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a dict for other ranks has keys that are not strings: {value}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, (dict, list, tuple)):
                _check_keys(part)


@collective
def on_rank0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and return its result on every rank. Collective.

    Only rank 0 reads and writes the run folder, so that all ranks make the same decisions.

    function: its result is a JSON value; see `encode`. Tuples become lists.
    A UserError or RunFailure of the function is raised on every rank, an OSError as RunFailure. Any
    other exception is raised on rank 0 only.
    """
    message = b""
    if dist.get_rank() == 0:
        try:
            message = encode({"result": function()})
        except LockedOut as error:
            message = encode({"locked_out": str(error)})
        except UserError as error:
            message = encode({"user_error": str(error)})
        except (OSError, RunFailure) as error:
            text = str(error) if isinstance(error, RunFailure) else f"rank 0: {error}"
            message = encode({"failure": text})
    if dist.get_world_size() > 1:
        message = _broadcast_bytes(message)
    answer = decode(message)
    for kind, error_type in ERROR_TYPES.items():
        if kind in answer:
            raise error_type(answer[kind])
    return answer["result"]


# Key of a message of `on_rank0` or `fail_on_all_ranks` -> type of the error on every rank.
ERROR_TYPES: dict[str, type[Exception]] = {
    "locked_out": LockedOut,
    "user_error": UserError,
    "failure": RunFailure,
}


@collective
def _broadcast_bytes(message: bytes) -> bytes:
    """Return the bytes of rank 0 on every rank. Collective over the gloo group."""
    group = gloo_group()
    size = torch.tensor([len(message)], dtype=torch.int64)
    dist.broadcast(size, src=0, group=group)
    content = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == 0:
        content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    dist.broadcast(content, src=0, group=group)
    return content.numpy().tobytes()


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
        self._group = gloo_group() if ranks.world_size > 1 else None
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
        """Return the values of all ranks in order.

        value: a JSON value; see `encode`. Tuples become lists, in a world of one rank as well.
        """
        message = encode(value)
        if self._group is None:
            return [decode(message)]
        sizes = self.all_gather(torch.tensor([len(message)], dtype=torch.int64))
        longest = max(map(int, sizes))
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        gathered = self.all_gather(own)
        return [
            decode(content[: int(size)].numpy().tobytes())
            for content, size in zip(gathered, sizes, strict=True)
        ]

    @collective
    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self._group is not None:
            dist.barrier(group=self._group)


@functools.cache
@collective
def gloo_group() -> dist.ProcessGroup:
    """Return the group of all ranks for messages between CPUs; one for all engines of a process.

    Collective at the first call.
    """
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # no ranks were left out
    return group


@collective
def destroy_process_groups() -> None:
    """Destroy the process groups. Call it after every engine is closed. Collective."""
    gloo_group.cache_clear()
    dist.destroy_process_group()


@contextlib.contextmanager
def fail_on_all_ranks(
    all_gather_object: Callable[[Any], list[Any]], action: str
) -> Iterator[dict[str, Any]]:
    """Run a block on every rank. If it fails on one rank, raise the error on all ranks. Collective.

    action: what the block does, for the message.
    Yields a dict for JSON values of this rank. After the block its key `all_ranks` is the list of
    the dicts of all ranks.
    Raises UserError when a rank raised one, and RunFailure when a rank raised OSError. Other
    exceptions are raised only on the rank where they occur.
    """
    report: dict[str, Any] = {}
    kind, text = "", ""
    try:
        yield report
    except UserError as error:
        kind, text = "user_error", str(error)
    except OSError as error:
        kind, text = "failure", str(error)
    gathered = all_gather_object([kind, text, dict(report)])
    for rank, (failure, message, _) in enumerate(gathered):
        if failure == "user_error":
            raise UserError(f"{action} failed: rank {rank}: {message}")
        if failure:
            raise RunFailure(
                f"{action} failed: rank {rank}: {message}; earlier checkpoints are untouched"
            )
    report["all_ranks"] = [rank_report for _, _, rank_report in gathered]
