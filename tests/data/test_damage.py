"""Each damage to a data folder is an error that names shard and block, as early as it can be seen; nothing is executed.

At open (sizes and places), at a block's first touch (headers and crc32), or by verify alone (bytes beside the rows).
"""

import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from shard_data import best_fit_rows, write_data, write_tokenizer

from data_tools.verify import verify
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import TAR_BLOCK, shard_file
from electra_ds.data.shard_reader import ShardReader

ROWS = [
    best_fit_rows(50, 32),
    best_fit_rows(50, 32),
    best_fit_rows(1, 32, 2),
]  # blocks of 16: 4 + 4 + 1
BYTES = 16 * 32 * 2  # of a block's rows
SIZE = -(-(128 + BYTES) // TAR_BLOCK) * TAR_BLOCK  # from its payload to the header of its pieces


def edit(change):
    """Damage shard 0 by change(its bytes, where the payload of block 1 begins) -> bytes, or None: changed in place."""

    def act(data):
        at = int(ShardReader(data, "train").blocks["offset"][1])
        path = data / shard_file("train", 0)
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content, at) or content)

    return act


def flip(place):
    """One bit, so far from where block 1's payload begins."""
    return edit(lambda content, at: content.__setitem__(at + place, content[at + place] ^ 1))


def put(place, found):
    """Other bytes, so far from where block 1's payload begins."""
    return edit(
        lambda content, at: content.__setitem__(slice(at + place, at + place + len(found)), found)
    )


def member(name="train-000000-000001.ids.npy", kind=tarfile.REGTYPE, target="", size=128 + BYTES):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info.tobuf(tarfile.USTAR_FORMAT)


class Trap:
    """Unpickling this fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle inside a shard was executed",))


def object_array():
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([Trap()], object), allow_pickle=True)
    return out.getvalue()


def shard(change):
    """Do something to the path of shard 0."""
    return lambda data: change(data / shard_file("train", 0))


def link(path):
    path.symlink_to(path.rename(path.with_suffix(".elsewhere")))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def swap(other):
    def act(data):
        one, two = data / shard_file("train", 0), data / shard_file("train", other)
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)

    return act


def climb(data):
    """The manifest names a shard outside of the folder, and it is there."""
    (data / shard_file("train", 0)).rename(data.parent / "outside.tar")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../outside.tar"
    (data / "manifest.json").write_text(json.dumps(manifest))


CUT, AFTER, PLACE = (
    "block 1 is the first incomplete one",
    "the change is after block 3",
    "shard 0 of train is no regular file",
)
TAR, NPY, CRC = "block 1: its tar header", "block 1: the npy header", "block 1: its rows differ"
OPEN = {
    "truncated at a member": (edit(lambda content, at: content[: at - TAR_BLOCK]), CUT),
    "truncated in a header": (edit(lambda content, at: content[: at - 100]), CUT),
    "truncated in data": (edit(lambda content, at: content[: at + 700]), CUT),
    "truncated in the pieces": (
        edit(lambda content, at: content[: at + SIZE]),
        "block 2 is the first incomplete one",
    ),
    "a member appended": (edit(lambda content, at: content + member("foreign.npy", size=0)), AFTER),
    "a deleted shard": (shard(os.unlink), PLACE),
    "a shard that is a link": (shard(link), PLACE),
    "a shard that is a pipe": (shard(pipe), PLACE),
    "a shard outside": (climb, PLACE),
    "swapped with a shorter one": (swap(2), CUT),
}
TOUCH = {
    "a zeroed KiB": (put(200, bytes(1024)), CRC),
    "a flipped data byte": (flip(300), CRC),
    "a flipped npy header byte": (flip(20), NPY),
    "a flipped tar header byte": (flip(12 - TAR_BLOCK), TAR),
    "a flipped tar checksum byte": (flip(150 - TAR_BLOCK), TAR),
    "a zeroed tar header": (put(-TAR_BLOCK, bytes(TAR_BLOCK)), TAR),
    "a foreign member": (put(-TAR_BLOCK, member("readme.txt")), TAR),
    "a link": (put(-TAR_BLOCK, member(kind=tarfile.SYMTYPE, target="/etc/passwd")), TAR),
    "a hard link": (put(-TAR_BLOCK, member(kind=tarfile.LNKTYPE, target="/etc/passwd")), TAR),
    "a device node": (put(-TAR_BLOCK, member(kind=tarfile.CHRTYPE)), TAR),
    "a pipe": (put(-TAR_BLOCK, member(kind=tarfile.FIFOTYPE)), TAR),
    "a name that climbs": (put(-TAR_BLOCK, member("../train-000000-000001.ids.npy")), TAR),
    "an absolute name": (put(-TAR_BLOCK, member("/train-000000-000001.ids.npy")), TAR),
    "an object array": (put(0, object_array()), NPY),
    "swapped with one of its size": (
        swap(1),
        "block 1: its tar header is not that of train-000000-000001.ids.npy",
    ),
}
VERIFY = {
    "a flipped byte of the pieces": (
        flip(SIZE + TAR_BLOCK + 300),
        "block 1: its document fragments do not cover the text",
    ),
    "a flipped byte in the header of the pieces": (flip(SIZE + 3), TAR),
    "a zeroed header of the pieces": (
        put(SIZE, bytes(TAR_BLOCK)),
        "block 1: no tar header where its pieces",
    ),
    "a flipped byte of padding": (flip(SIZE - 1), "its sha256 is not the manifest's"),
}


@pytest.mark.parametrize("name", [*OPEN, *TOUCH, *VERIFY])
def test_damage_is_named_as_early_as_it_can_be_seen(name, tmp_path):
    fingerprint = write_tokenizer(tmp_path / "data" / "tokenizer")
    data = write_data(tmp_path / "data", ROWS, fingerprint=fingerprint)
    assert verify(data) == []
    damage, message = (OPEN | TOUCH | VERIFY)[name]
    damage(data)
    expected = rf"(train-000000|outside)\.tar: .*{message}"
    if name in OPEN:
        with pytest.raises(UserError, match=expected):
            ShardReader(data, "train")
    else:
        reader = ShardReader(data, "train")
        if "swapped" not in name:
            assert np.array_equal(
                reader.read(np.arange(16)), ROWS[0][:16]
            )  # the block before is whole
        if name in VERIFY:
            assert np.array_equal(reader.read(np.arange(50)), ROWS[0])
        for _ in range(2 if name in TOUCH else 0):
            with pytest.raises(UserError, match=expected):
                reader.read(np.array([20]))
        if "header of the pieces" in name:
            with pytest.raises(UserError, match=expected):
                reader.fragments(1)
    problems = verify(data)
    assert any(re.search(expected, problem) for problem in problems), problems
