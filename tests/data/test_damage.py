"""Each damage to a data folder is an error with shard and block; nothing is executed.

It is detected when the folder is opened (sizes and paths), when the block is first read (headers
and crc32), or by `verify` (bytes outside the rows).
"""

import io
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from running import CPU
from shard_data import best_fit_rows, write_data

from data_tools.verify import verify
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import TAR_BLOCK, shard_file
from electra_ds.data.shard_reader import ShardReader

ROWS = [
    best_fit_rows(50, 32),
    best_fit_rows(50, 32),
    best_fit_rows(1, 32, 2),
]  # blocks of 16: 4 + 4 + 1
ROW_BYTES = 16 * 32 * 2  # of the rows of a block
# from a block's payload to the header of its fragments
PAYLOAD_BYTES = -(-(128 + ROW_BYTES) // TAR_BLOCK) * TAR_BLOCK


def edit(change):
    """Damage shard 0: change(content, offset) returns the new content.

    content: bytearray of the shard; offset: start of the payload of block 1
    """

    def damage(data):
        offset = int(ShardReader(data, "train").blocks["offset"][1])
        path = data / shard_file("train", 0)
        path.write_bytes(change(bytearray(path.read_bytes()), offset))

    return damage


def flip(distance):
    """Flip a bit at this distance from the payload of block 1."""

    def change(content, offset):
        content[offset + distance] ^= 1
        return content

    return edit(change)


def overwrite(distance, replacement):
    """Write other bytes at this distance from the payload of block 1."""

    def change(content, offset):
        start = offset + distance
        content[start : start + len(replacement)] = replacement
        return content

    return edit(change)


def member(name="train-000000-000001.ids.npy", kind=tarfile.REGTYPE, target="", size=None):
    """The tar header of a member, by default that of block 1 of shard 0."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.size = 128 + ROW_BYTES if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT)


class Trap:
    """Unpickling an instance fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle inside a shard was executed",))


def object_array():
    """An npy file with a pickled object."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([Trap()], object), allow_pickle=True)
    return out.getvalue()


def shard(change):
    """Damage the file of shard 0: change(path)."""
    return lambda data: change(data / shard_file("train", 0))


def link(path):
    path.symlink_to(path.rename(path.with_suffix(".elsewhere")))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def swap(other):
    """Exchange the files of shard 0 and another one."""

    def damage(data):
        one, two = data / shard_file("train", 0), data / shard_file("train", other)
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)

    return damage


CUT, AFTER, PLACE = (
    "block 1 is the first incomplete one",
    "the change is after block 3",
    "shard 0 of train is missing or no regular file",
)
TAR, NPY, CRC = (
    "block 1: its tar header",
    "block 1: the npy header",
    "block 1: the crc32 of its rows differs",
)
# Detected when the folder is opened.
OPEN = {
    "truncated at a member": (edit(lambda content, offset: content[: offset - TAR_BLOCK]), CUT),
    "truncated in a header": (edit(lambda content, offset: content[: offset - 100]), CUT),
    "truncated in data": (edit(lambda content, offset: content[: offset + 700]), CUT),
    "truncated in the fragments": (
        edit(lambda content, offset: content[: offset + PAYLOAD_BYTES]),
        "block 2 is the first incomplete one",
    ),
    "a member appended": (
        edit(lambda content, offset: content + member("foreign.npy", size=0)),
        AFTER,
    ),
    "a deleted shard": (shard(os.unlink), PLACE),
    "a shard that is a link": (shard(link), PLACE),
    "a shard that is a pipe": (shard(pipe), PLACE),
    "swapped with a shorter one": (swap(2), CUT),
}
# Detected when the block is first read.
TOUCH = {
    "a zeroed KiB": (overwrite(200, bytes(1024)), CRC),
    "a flipped data byte": (flip(300), CRC),
    "a flipped npy header byte": (flip(20), NPY),
    "a flipped tar header byte": (flip(12 - TAR_BLOCK), TAR),
    "a flipped tar checksum byte": (flip(150 - TAR_BLOCK), TAR),
    "a zeroed tar header": (overwrite(-TAR_BLOCK, bytes(TAR_BLOCK)), TAR),
    "a foreign member": (overwrite(-TAR_BLOCK, member("readme.txt")), TAR),
    "a link": (overwrite(-TAR_BLOCK, member(kind=tarfile.SYMTYPE, target="/etc/passwd")), TAR),
    "a hard link": (overwrite(-TAR_BLOCK, member(kind=tarfile.LNKTYPE, target="/etc/passwd")), TAR),
    "a device node": (overwrite(-TAR_BLOCK, member(kind=tarfile.CHRTYPE)), TAR),
    "a pipe": (overwrite(-TAR_BLOCK, member(kind=tarfile.FIFOTYPE)), TAR),
    "a path to the parent folder": (
        overwrite(-TAR_BLOCK, member("../train-000000-000001.ids.npy")),
        TAR,
    ),
    "an absolute path": (overwrite(-TAR_BLOCK, member("/train-000000-000001.ids.npy")), TAR),
    "an object array": (overwrite(0, object_array()), NPY),
    "swapped with one of its size": (
        swap(1),
        "block 1: its tar header differs from the expected one for train-000000-000001.ids.npy",
    ),
}
# Detected by `verify` only.
VERIFY = {
    "a flipped byte of the fragments": (
        flip(PAYLOAD_BYTES + TAR_BLOCK + 300),
        "block 1: the document fragments do not cover each text token",
    ),
    "a flipped byte in the header of the fragments": (flip(PAYLOAD_BYTES + 3), TAR),
    "a zeroed header of the fragments": (
        overwrite(PAYLOAD_BYTES, bytes(TAR_BLOCK)),
        "block 1: no tar header where its fragments",
    ),
    "a flipped byte of padding": (flip(PAYLOAD_BYTES - 1), "its sha256 differs from that"),
}


@pytest.mark.parametrize("name", [*OPEN, *TOUCH, *VERIFY])
def test_damage_is_an_error_with_shard_and_block(name, tmp_path):
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", ROWS)
    assert verify(data) == []
    damage, message = (OPEN | TOUCH | VERIFY)[name]
    damage(data)
    expected = rf"train-000000\.tar: .*{message}"
    if name in OPEN:
        with pytest.raises(UserError, match=expected):
            ShardReader(data, "train")
    else:
        reader = ShardReader(data, "train")
        if "swapped" not in name:
            # the block before it can be read
            assert np.array_equal(reader.read(np.arange(16)), ROWS[0][:16])
        if name in VERIFY:
            assert np.array_equal(reader.read(np.arange(50)), ROWS[0])
        for _ in range(2 if name in TOUCH else 0):
            with pytest.raises(UserError, match=expected):
                reader.read(np.array([20]))
        if "header of the fragments" in name:
            with pytest.raises(UserError, match=expected):
                reader.fragments(1)
    problems = verify(data)
    assert any(re.search(expected, problem) for problem in problems), problems


READ_CUT = """
import os, sys
import numpy as np
from electra_ds.common.errors import UserError
from electra_ds.data.shard_reader import ShardReader

data, use = sys.argv[1:]
reader = ShardReader(data, "train")
reader.read(np.arange(reader.rows))  # every block is checked
reader._blocks.clear()
path = reader.data_dir / "shards" / "train-000000.tar"
uses = {
    "one row": lambda: reader.read(np.array([100])),
    "a block": lambda: reader.read(np.arange(96, 112)),
    "block()": lambda: reader.block(6),
    "fragments": lambda: reader.fragments(6),
}
# The file is cut when its size has been compared, at the last moment before it is read.
for name in ("pread", "preadv"):
    def cut(*arguments, original=getattr(os, name)):
        os.truncate(path, 4096)
        return original(*arguments)
    setattr(os, name, cut)
try:
    print(uses[use]().sum())
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("use", ["one row", "a block", "block()", "fragments"])
def test_a_shard_that_is_truncated_while_it_is_read_is_named(tmp_path, use):
    """Reading a memory map beyond the end of the file would end the process with SIGBUS."""
    write_data(tmp_path, [best_fit_rows(200, 32)])
    done = subprocess.run(
        [sys.executable, "-c", READ_CUT, tmp_path, use],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"train-000000\.tar: 4096 bytes now, expected \d+ .*truncated after it was opened",
        done.stdout,
    )


def test_a_shard_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    reader = ShardReader(write_data(tmp_path, [best_fit_rows(200, 32)]), "train")
    first = reader.read(np.arange(32))  # blocks 0 and 1 are in memory
    os.truncate(tmp_path / shard_file("train", 0), 4096)
    assert np.array_equal(reader.read(np.arange(32)), first)
    for rows in (np.arange(100, 116), np.array([199])):
        with pytest.raises(
            UserError,
            match=r"train-000000\.tar: 4096 bytes now, expected \d+ .*truncated after it was opened",
        ):
            reader.read(rows)
