"""Byte ranges of the shards of one split on disk, read by pread.

A memory map of a shard that is truncated, for example by a copy over it, ends the process with
SIGBUS, also when its size is compared just before. A short pread is an error of this module.
"""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

OPEN_SHARDS = 256  # shards open at a time; each has a file descriptor


class _Descriptor:
    """A file descriptor, closed with this object."""

    def __init__(self, path: Path) -> None:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """The files of the shards of one split, opened when they are first read."""

    def __init__(self, paths: list[Path], sizes: list[int]) -> None:
        """paths, sizes: file and bytes of each shard, as in the manifest."""
        self.paths = paths
        self.sizes = sizes
        self.open: OrderedDict[int, _Descriptor] = OrderedDict()  # by last use

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Return `size` bytes of a shard.

        They are fewer only where the shard ends. Raises UserError when the file cannot be read, or
        is shorter than in the manifest.
        """
        descriptor = self._descriptor(shard)
        try:
            content = os.pread(descriptor.number, size, start)
            # A signal, and the limit of one call (2 GiB), can make a read of a whole file short.
            while len(content) < size and (
                more := os.pread(descriptor.number, size - len(content), start + len(content))
            ):
                content += more
        except OSError as error:
            raise self._unreadable(shard, error) from None
        if len(content) < size:
            self._check_size(shard, descriptor)
        return content

    def read_into(self, shard: int, start: int, target: np.ndarray) -> None:
        """Fill a contiguous array with bytes of a shard. Errors as in `read`."""
        descriptor = self._descriptor(shard)
        try:
            count = os.preadv(descriptor.number, [target.data], start)
        except OSError as error:
            raise self._unreadable(shard, error) from None
        if count < target.nbytes:
            content = self.read(shard, start, target.nbytes)
            target[...] = np.frombuffer(content, target.dtype).reshape(target.shape)

    def _descriptor(self, shard: int) -> _Descriptor:
        if shard in self.open:
            self.open.move_to_end(shard)
            return self.open[shard]
        while len(self.open) >= OPEN_SHARDS:
            self.open.popitem(last=False)
        try:
            self.open[shard] = _Descriptor(self.paths[shard])
        except OSError as error:
            raise self._unreadable(shard, error) from None
        return self.open[shard]

    def _unreadable(self, shard: int, error: OSError) -> UserError:
        advice = "copy this shard again"
        if isinstance(error, PermissionError):
            advice = "give this user the right to read it"
        return UserError(
            f"{printable(self.paths[shard])}: cannot be read ({error.strerror}); {advice}"
        )

    def _check_size(self, shard: int, descriptor: _Descriptor) -> None:
        """Raise UserError when a shard is shorter than in the manifest."""
        size = os.fstat(descriptor.number).st_size
        if size < self.sizes[shard]:
            raise UserError(
                f"{printable(self.paths[shard])}: {size} bytes now, expected {self.sizes[shard]} "
                "as in the manifest; it was truncated after it was opened; copy this shard again"
            )
