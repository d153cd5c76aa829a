"""Rows of the authors' TFRecords, taken as they are, and what is no such row named by file and record."""

import gzip
import shutil
import struct
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from running import ROOT
from small_corpus import contents

from data_tools.convert import convert
from data_tools.inspect_rows import describe_rows
from data_tools.prepare import prepare
from data_tools.verify import verify
from electra_ds.common.errors import UserError
from electra_ds.data.shard_reader import ShardReader

RECORDS = ROOT / "tests/files/tfrecord"
FILES = [str(RECORDS / f"pretrain_data.tfrecord-{i}-of-2") for i in range(2)]
ROWS = np.loadtxt(RECORDS / "rows.txt", dtype=np.int64)  # as TensorFlow reads them


def rows_of(data: Path, split: str = "train") -> np.ndarray:
    reader = ShardReader(data, split)
    return reader.read(np.arange(reader.rows))


def framed(content: bytes) -> bytes:
    """One record of a TFRecord file."""

    def checked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return data + struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    return checked(struct.pack("<Q", len(content))) + checked(content)


def record(
    ids: list[int], mask: list[int], segments: list[int], last: bytes = b"segment_ids"
) -> bytes:
    """A tf.train.Example, put together by hand: fields 1 and 2 of every message, ids below 128."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    named = zip((b"input_ids", b"input_mask", last), (ids, mask, segments), strict=True)
    entries = b"".join(
        field(1, field(1, key) + field(2, field(3, field(1, bytes(value))))) for key, value in named
    )
    return framed(bytes([1 << 3 | 2, len(entries) & 127 | 128, len(entries) >> 7]) + entries)


def test_the_rows_of_the_authors_program_are_ours(tmp_path: Path) -> None:
    manifest = convert(FILES, RECORDS, tmp_path / "data", valid_fraction=0)
    found = rows_of(tmp_path / "data")
    assert manifest.packing == "google" and manifest.sequence_length == 24
    assert not any(manifest.removed.values())
    assert sorted(found.tolist()) == sorted(ROWS.tolist()) and found.tolist() != ROWS.tolist()
    assert verify(tmp_path / "data") == []
    reader = ShardReader(tmp_path / "data", "train")
    for row, start, length, unit, number, token in reader.fragments(0).tolist():
        origin = ROWS[unit * 3 + number]  # file and record, then place in A and B put together
        text = origin[(origin > 4) | (origin == 1)]
        assert text[token : token + length].tolist() == found[row, start : start + length].tolist()
    lines = "\n".join(describe_rows(tmp_path / "data", "train", range(6), source=True))
    assert (
        "the ferry leaves the harbour at seven ." in lines
        and "from unit 1 (pretrain_data.tfrecord-1-of-2" in lines
    )
    with pytest.raises(UserError, match=r"^pretrain_data.tfrecord-\d-of-2: holds rows, not text"):
        list(describe_rows(tmp_path / "data", "train", [0], inputs=FILES))
    (tmp_path / "none.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match=r"none.gz: no record in 1 input file"):
        convert([str(tmp_path / "none.gz")], RECORDS, tmp_path / "none")


def test_the_bytes_are_the_same_for_any_workers_and_equal_rows_stay(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(8):
        shutil.copy(FILES[i % 2], tmp_path / f"in/{i}")
    (
        tmp_path / "in/0.0"
    ).touch()  # the authors' program leaves empty files where there is little text
    (tmp_path / "in/8.gz").write_bytes(gzip.compress(Path(FILES[0]).read_bytes()))
    for workers in (1, 2):
        manifest = convert(
            [str(tmp_path / "in")],
            RECORDS,
            tmp_path / f"{workers}",
            valid_fraction=0.5,
            workers=workers,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    train, valid = (rows_of(tmp_path / "1", split) for split in ("train", "valid"))
    assert len(train) + len(valid) == 27 and manifest.splits["valid"].rows == len(valid)
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in valid.tolist()}


def test_what_is_no_row_is_named_by_file_and_record(tmp_path: Path) -> None:
    ids, mask, segments = (
        [2, 9, 1, 3, 8, 3, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
    )
    good = record(ids, mask, segments)
    path = tmp_path / "rows"
    path.write_bytes(good * 3)
    assert convert([str(path)], RECORDS, tmp_path / "data", valid_fraction=0).unknowns.found == 3
    assert rows_of(tmp_path / "data").tolist() == [ids] * 3
    with pytest.raises(
        UserError, match=r"^rows: holds rows, not text; .electra-ds convert. takes it"
    ):
        prepare([str(path)], RECORDS, tmp_path / "text", format="tfrecord")
    flipped = bytearray(good)
    flipped[40] ^= 1
    for i, (bad, message) in enumerate(
        (
            (
                record(ids[:7], mask[:7], segments[:7]),
                r"record 1: \[7, 7, 7\] numbers in .*; expected 8",
            ),
            (record(ids, mask, segments[:7]), r"record 1: \[8, 8, 7\] numbers in"),
            (
                record([2, 99, *ids[2:]], mask, segments),
                "record 1: ids from 0 to 99, .* of 85 entries",
            ),
            (record([3, *ids[1:]], mask, segments), "record 1: .* in order stusts; expected"),
            (record([2, 4, *ids[2:]], mask, segments), "record 1: .* in order cmusts;"),
            (
                record([2, 9, 1, 3, 3, 0, 0, 0], [1] * 5 + [0] * 3, [0] * 4 + [1] + [0] * 3),
                "record 1: .* in order ctuss;",
            ),
            (record(ids, mask, mask), "record 1: .*segment_ids are not 1 on B"),
            (record(ids, [1, 0, 1, 1, 1, 1, 1, 0], segments), "record 1: .* in order custsp;"),
            (record(ids, [1, 1, 0, 1, 1, 1, 0, 0], segments), "record 1: input_mask is not 1"),
            (
                record(ids, mask, segments, b"label_ids"),
                r"record 1: no segment_ids among \['input_ids', 'input_mask', 'label_ids'\]",
            ),
            (framed(b"text"), "cannot be read .DecodeError: Error parsing message"),
            (bytes(flipped), "record 1: damaged or cut short"),
            (good[:-1], "record 1: damaged or cut short"),
            (good[:7], "record 1: damaged or cut short"),
        )
    ):
        path.write_bytes(good + bad)
        with pytest.raises(UserError, match=f"^rows: {message}"):
            convert([str(path)], RECORDS, tmp_path / f"bad{i}", valid_fraction=0)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(UserError, match=r"pip install 'electra_ds\[tfrecord\]'"):
        convert([str(RECORDS)], RECORDS / "vocab.txt", tmp_path / "out")
