"""Shard format: rows and fragments are read back, equal bytes for equal rows, refused folders."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_data import best_fit_rows, document_fragments, write_data

from electra_ds.common.errors import UserError
from electra_ds.data import shard_files, shard_reader
from electra_ds.data.shard_format import (
    ids_dtype,
    npy_header,
    read_manifest,
    read_unigrams,
    shard_file,
    write_shard,
)
from electra_ds.data.shard_reader import ShardReader

ROWS = [
    best_fit_rows(50, 32),
    best_fit_rows(40, 32, 1),
    best_fit_rows(1, 32, 2),
]  # blocks of 16: 4 + 3 + 1


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, ROWS)


def read_all(data):
    reader = ShardReader(data, "train")
    return reader.read(np.arange(reader.rows))


def test_rows_are_read_in_any_order(data, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)  # of three
    monkeypatch.setattr(shard_reader, "CACHED_BYTES", 3 * 16 * 32 * 2)  # of three blocks of eight
    reader = ShardReader(data, "train")
    numbers = np.random.default_rng(0).integers(0, 91, 300)
    rows = reader.read(numbers)
    assert rows.dtype == np.uint16
    assert np.array_equal(rows, np.concatenate(ROWS)[numbers])
    assert len(reader._files.open) == 2 and 1 <= len(reader._blocks) < 8
    held = sum(array.nbytes for array in reader._blocks.values())
    assert held == reader._cached_bytes <= shard_reader.CACHED_BYTES
    for row in numbers[:40]:  # few rows of a block, which are read alone
        assert np.array_equal(reader.read(np.array([row]))[0], np.concatenate(ROWS)[row])
    assert reader.read(np.array([], int)).shape == (0, 32)
    for row in (-1, 91):
        with pytest.raises(IndexError, match=r"expected 0\.\.90"):
            reader.read(np.array([5, row]))


def test_fragments_are_read_by_block(data):
    reader = ShardReader(data, "train")
    starts = np.array([0, 16, 32, 48, 50, 66, 82, 90])
    assert np.array_equal(reader.block_starts[:-1], starts)
    found = [
        reader.fragments(block) + np.array([start, 0, 0, 0, 0, 0])
        for block, start in enumerate(starts)
    ]
    expected = [
        document_fragments(rows) + np.array([first, 0, 0, 0, 0, 0])
        for rows, first in zip(ROWS, (0, 50, 90), strict=True)
    ]
    assert np.array_equal(np.concatenate(found), np.concatenate(expected))


def test_ids_of_large_vocabularies_are_stored_as_uint32(tmp_path):
    assert ids_dtype(65_536) == np.uint16 and ids_dtype(65_537) == np.uint32
    rows = best_fit_rows(20, 32).astype(np.uint32) * 1000
    write_data(tmp_path, [rows], vocab_size=600_000)
    assert np.array_equal(read_all(tmp_path), rows) and read_all(tmp_path).dtype == np.uint32


def test_the_bytes_of_format_version_1_do_not_change(tmp_path):
    """Golden digests; other bytes for the same rows need a new format version."""
    rows = (np.arange(40 * 32) % 600).astype(np.uint16).reshape(40, 32)
    info, _ = write_shard(
        tmp_path / "x.tar", "train", 3, rows, np.arange(60, dtype=np.int32).reshape(10, 6), 16
    )
    data = (tmp_path / "x.tar").read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest() and info.bytes == len(data)
    assert (
        hashlib.sha256(npy_header(np.dtype("<u2"), (256, 512))).hexdigest()[:16]
        == "9eaff0e61ad3412d"
    )
    assert info.sha256[:16] == "f3476acf0d13b58d"


def test_members_are_plain_npy_files_on_64_byte_boundaries(data):
    for shard, rows in enumerate(ROWS):
        with tarfile.open(data / shard_file("train", shard)) as tar:
            members = tar.getmembers()
            for member in members:
                assert member.isreg() and (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.offset_data + 128) % 64 == 0
            arrays = [
                np.load(io.BytesIO(tar.extractfile(m).read()), allow_pickle=False) for m in members
            ]
        assert np.array_equal(np.concatenate(arrays[0::2]), rows)
        assert sum(len(array) for array in arrays[1::2]) == len(document_fragments(rows))


PLAIN = """
import sys, numpy
assert "electra_ds" not in sys.modules
found = {row["__key__"]: row["input_ids"] for row in dataset}
numpy.save("found.npy", [found[key] for key in sorted(found)])
for hostile in ("hostile.tar", "pipe:touch executed"):
    try:
        print(list(webdataset.WebDataset(hostile, shardshuffle=False).decode()))
    except Exception as error:
        print(repr(error), repr(error.__cause__))
"""


def test_the_snippet_of_the_docs_reads_shards_by_plain_webdataset(data):
    """docs/webdataset.md, in a separate process."""
    pytest.importorskip("webdataset")
    page = (Path(__file__).parents[2] / "docs" / "webdataset.md").read_text()
    snippet = page.split("```python\n")[1].split("```")[0].replace('"D/', f'"{data}/')
    with tarfile.open(data / "hostile.tar", "w") as tar:
        tar.add(__file__, "block.pkl")
    done = subprocess.run(
        [sys.executable, "-c", snippet + PLAIN],
        cwd=data,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(data / "found.npy"), np.concatenate(ROWS))
    unpickled, executed = done.stdout.splitlines()
    assert "Unpickling is not allowed" in unpickled, unpickled
    assert "cannot open pipe URLs" in executed and not (data / "executed").exists(), executed


def test_the_dataset_id_depends_on_the_rows_only(tmp_path):
    ids = []
    for name, rows in [("a", ROWS[0]), ("b", ROWS[0]), ("c", ROWS[1])]:
        (tmp_path / name).mkdir()
        ids.append(read_manifest(write_data(tmp_path / name, [rows])).dataset_id)
    assert ids[0] == ids[1] != ids[2]


# ---------------------------------------------------------------------------------- index, manifest


@pytest.mark.parametrize("byte", [0, 9, 13, 40])
def test_a_changed_index_is_refused(data, byte):
    content = bytearray((data / "index-train.bin").read_bytes())
    content[byte] ^= 1
    (data / "index-train.bin").write_bytes(content)
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
def test_a_manifest_of_another_format_is_refused(data, change, message):
    path = data / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_manifest(data)


def test_a_missing_part_is_an_error_with_its_name(data, tmp_path):
    with pytest.raises(UserError, match="no split 'valid', only train"):
        ShardReader(data, "valid")
    with pytest.raises(UserError, match=r"unigrams\.npy"):
        read_unigrams(data, 601)
    with pytest.raises(UserError, match=r"manifest\.json: not found"):
        ShardReader(tmp_path / "nothing", "train")
