"""Shards: what is written is read back, the bytes never change, and damage is named instead of read."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from shard_data import best_fit_rows, pieces_of, write_data

from electra_ds import shards
from electra_ds.errors import UserError
from electra_ds.shards import (
    TAR_BLOCK,
    ShardReader,
    ids_dtype,
    npy_header,
    read_manifest,
    read_unigrams,
    shard_file,
    write_shard,
)

ROWS = [best_fit_rows(50, 32), best_fit_rows(40, 32, 1), best_fit_rows(1, 32, 2)]  # blocks of 16: 4 + 3 + 1


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, ROWS)


def read_all(data):
    reader = ShardReader(data, "train")
    return reader.read(np.arange(reader.rows))


def test_rows_come_back_in_any_order(data, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)  # fewer than there are
    reader = ShardReader(data, "train")
    wanted = np.random.default_rng(0).integers(0, 91, 300)
    found = reader.read(wanted)
    assert found.dtype == np.uint16 and np.array_equal(found, np.concatenate(ROWS)[wanted])
    assert len(reader._maps) <= 2 and set(reader.blocks["shard"][list(reader._views)]) <= set(reader._maps)
    assert reader.read(np.array([], int)).shape == (0, 32)
    with pytest.raises(IndexError):
        reader.read(np.array([91]))


def test_pieces_come_back_by_block(data):
    reader = ShardReader(data, "train")
    starts = np.array([0, 16, 32, 48, 50, 66, 82, 90])
    assert np.array_equal(reader.block_starts[:-1], starts)
    found = [reader.pieces(block) + np.array([start, 0, 0, 0, 0, 0]) for block, start in enumerate(starts)]
    expected = [
        pieces_of(rows) + np.array([first, 0, 0, 0, 0, 0]) for rows, first in zip(ROWS, (0, 50, 90), strict=True)
    ]
    assert np.array_equal(np.concatenate(found), np.concatenate(expected))


def test_large_vocabularies_are_stored_wider(tmp_path):
    assert ids_dtype(65_536) == np.uint16 and ids_dtype(65_537) == np.uint32
    rows = best_fit_rows(20, 32).astype(np.uint32) * 1000
    write_data(tmp_path, [rows], vocab_size=600_000)
    assert np.array_equal(read_all(tmp_path), rows) and read_all(tmp_path).dtype == np.uint32


def test_format_version_1_keeps_its_bytes(tmp_path):
    """Golden digests: other bytes for the same rows need a new format version."""
    rows = (np.arange(40 * 32) % 600).astype(np.uint16).reshape(40, 32)
    info, _ = write_shard(tmp_path / "x.tar", "train", 3, rows, np.arange(60, dtype=np.int32).reshape(10, 6), 16)
    data = (tmp_path / "x.tar").read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest() and info.bytes == len(data)
    assert hashlib.sha256(npy_header(np.dtype("<u2"), (256, 512))).hexdigest()[:16] == "9eaff0e61ad3412d"
    assert info.sha256[:16] == "f3476acf0d13b58d"


def test_members_are_plain_npy_files_on_64_byte_boundaries(data):
    for shard, rows in enumerate(ROWS):
        with tarfile.open(data / shard_file("train", shard)) as tar:
            members = tar.getmembers()
            for member in members:
                assert member.isreg() and (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.offset_data + 128) % 64 == 0
            arrays = [np.load(io.BytesIO(tar.extractfile(m).read()), allow_pickle=False) for m in members]
        assert np.array_equal(np.concatenate(arrays[0::2]), rows)
        assert sum(len(array) for array in arrays[1::2]) == len(pieces_of(rows))


def test_plain_webdataset_reads_our_shards(data):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(data / shard_file("train", shard)) for shard in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples[:2]] == ["train-000000-000000", "train-000000-000001"]
    assert np.array_equal(np.concatenate([sample["ids.npy"] for sample in samples]), np.concatenate(ROWS))
    assert samples[0]["pieces.npy"].shape[1] == 6


def test_dataset_id_follows_the_rows_alone(tmp_path):
    ids = []
    for name, rows in [("a", ROWS[0]), ("b", ROWS[0]), ("c", ROWS[1])]:
        (tmp_path / name).mkdir()
        ids.append(read_manifest(write_data(tmp_path / name, [rows])).dataset_id)
    assert ids[0] == ids[1] != ids[2]


# ------------------------------------------------------------------------------------------------------ damage


def payload_at(data, block):
    return int(ShardReader(data, "train").blocks["offset"][block])


def edit(path, change):
    """Rewrite a file through change(bytearray) -> bytes or None (changed in place)."""
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def member(name, payload=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(payload)
    return info.tobuf(tarfile.USTAR_FORMAT) + payload


class Trap:
    """Unpickling this would leave a mark."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle inside a shard was executed",))


def object_npy():
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([Trap()], object), allow_pickle=True)
    assert pickle.dumps(Trap())
    return out.getvalue()


# Each changes the first shard's bytes; `at` is where block 1's payload begins, its tar header lies 512 bytes before.
SAME_SIZE = {
    "zeroed KiB": lambda b, at: b.__setitem__(slice(at + 200, at + 1224), bytes(1024)),
    "flipped data byte": lambda b, at: b.__setitem__(at + 300, b[at + 300] ^ 1),
    "flipped npy header byte": lambda b, at: b.__setitem__(at + 20, b[at + 20] ^ 1),
    "flipped tar header byte": lambda b, at: b.__setitem__(at - 500, b[at - 500] ^ 1),
    "flipped tar checksum byte": lambda b, at: b.__setitem__(at - 512 + 150, b[at - 512 + 150] ^ 1),
    "foreign member": lambda b, at: b.__setitem__(slice(at - 512, at), member("readme.txt", b"")),
    "symlink": lambda b, at: b.__setitem__(
        slice(at - 512, at), member("train-000000-000001.ids.npy", kind=tarfile.SYMTYPE, target="/etc/passwd")
    ),
    "name that climbs": lambda b, at: b.__setitem__(slice(at - 512, at), member("../train-000000-000001.ids.npy")),
    "device node": lambda b, at: b.__setitem__(
        slice(at - 512, at), member("train-000000-000001.ids.npy", kind=tarfile.CHRTYPE)
    ),
    "object array": lambda b, at: b.__setitem__(slice(at, at + len(object_npy())), object_npy()),
}
OTHER_SIZE = {
    "truncated at a member": lambda b, at: b[: at - TAR_BLOCK],
    "truncated in a header": lambda b, at: b[: at - 100],
    "truncated in data": lambda b, at: b[: at + 700],
}


@pytest.mark.parametrize("damage", SAME_SIZE)
def test_damage_of_the_same_size_is_found_when_its_block_is_touched(data, damage):
    at = payload_at(data, 1)
    edit(data / shard_file("train", 0), lambda content: SAME_SIZE[damage](content, at))
    reader = ShardReader(data, "train")
    assert np.array_equal(reader.read(np.arange(16)), ROWS[0][:16])  # the block before it is whole
    for _ in range(2):
        with pytest.raises(UserError, match=r"train-000000\.tar: block 1: "):
            reader.read(np.array([20]))


@pytest.mark.parametrize("damage", OTHER_SIZE)
def test_truncation_is_found_at_open(data, damage):
    at = payload_at(data, 1)
    edit(data / shard_file("train", 0), lambda content: OTHER_SIZE[damage](content, at))
    with pytest.raises(UserError, match=r"train-000000\.tar: \d+ bytes, .*block 1 is the first cut"):
        ShardReader(data, "train")


def test_an_appended_member_is_found_at_open(data):
    edit(data / shard_file("train", 1), lambda content: content + member("foreign.npy", b"x"))
    with pytest.raises(UserError, match=r"train-000001\.tar: .*after block 2"):
        ShardReader(data, "train")


def test_damaged_pieces_are_found_when_asked_for(data):
    at = payload_at(data, 1) + TAR_BLOCK * 3  # 16 x 32 x 2 + 128 bytes take three tar blocks: the next header
    edit(data / shard_file("train", 0), lambda content: content.__setitem__(slice(at, at + 512), bytes(512)))
    with pytest.raises(UserError, match=r"train-000000\.tar: block 1: "):
        ShardReader(data, "train").pieces(1)


def test_a_deleted_shard_is_found_at_open(data):
    (data / shard_file("train", 1)).unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: shard 1 of train"):
        ShardReader(data, "train")


def test_a_shard_that_is_a_link_is_refused(data):
    path = data / shard_file("train", 1)
    path.rename(data / "elsewhere.tar")
    path.symlink_to(data / "elsewhere.tar")
    with pytest.raises(UserError, match=r"train-000001\.tar: shard 1 of train is no regular file"):
        ShardReader(data, "train")


def test_swapped_shards_of_one_size_are_found(tmp_path):
    write_data(tmp_path, [best_fit_rows(16, 32), best_fit_rows(16, 32)])
    one, two = (tmp_path / shard_file("train", shard) for shard in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(
        UserError, match=r"train-000001\.tar: block 0: its tar header is not that of train-000001-000000"
    ):
        ShardReader(tmp_path, "train").read(np.array([16]))


@pytest.mark.parametrize("byte", [0, 9, 13, 40])
def test_a_changed_index_is_refused(data, byte):
    edit(data / "index-train.bin", lambda content: content.__setitem__(byte, content[byte] ^ 1))
    with pytest.raises(UserError, match=r"index-train\.bin: its sha256"):
        ShardReader(data, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format and version"),
        ({"format": "other"}, "format and version"),
        ({"surprise": 1}, "surprise"),
        ({"packing": "tight"}, "packing"),
    ],
)
def test_a_strange_manifest_is_refused(data, change, message):
    path = data / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_manifest(data)


def test_missing_parts_are_named(data, tmp_path):
    with pytest.raises(UserError, match="no split 'valid', it holds train"):
        ShardReader(data, "valid")
    with pytest.raises(UserError, match=r"unigrams\.npy"):
        read_unigrams(data, 601)
    with pytest.raises(UserError, match=r"manifest\.json: not found"):
        ShardReader(tmp_path / "nothing", "train")
