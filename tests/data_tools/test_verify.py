"""verify names the damage and its location; inspect shows rows as text with their source."""

import json

import numpy as np
import pytest
from shard_data import best_fit_rows, document_fragments, write_data

from data_tools.inspect_rows import describe_rows
from data_tools.verify import verify
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import (
    index_file,
    read_manifest,
    shard_file,
    write_index,
    write_manifest,
    write_shard,
)
from electra_ds.data.shard_reader import ShardReader

SHARDS = [best_fit_rows(40, 32), best_fit_rows(20, 32, 1)]  # blocks of 16: 3 + 2


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, SHARDS)


def flip(path, offset):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def rewrite(data, rows, change_fragments=lambda fragments: None):
    """Replace shard 0 by `rows`; index and manifest agree, so no checksum shows the damage."""
    manifest, reader = read_manifest(data), ShardReader(data, "train")
    fragments = document_fragments(SHARDS[0])
    change_fragments(fragments)
    shards = [(rows, fragments), (SHARDS[1], document_fragments(SHARDS[1]))]
    written = [
        write_shard(data / shard_file("train", i), "train", i, r, p, 16)
        for i, (r, p) in enumerate(shards)
    ]
    index = write_index(
        data / index_file("train"), np.concatenate([blocks for _, blocks in written])
    )
    infos = tuple(info for info, _ in written)
    info = reader.info.model_copy(update={"index_sha256": index, "shards": infos})
    write_manifest(data, manifest.model_copy(update={"splits": {"train": info}}))


def test_an_intact_folder_has_no_problems(data):
    done = []
    assert verify(data, done.append) == []
    assert sum(done) == sum(shard.bytes for shard in read_manifest(data).splits["train"].shards)


def test_every_damaged_block_is_named(data):
    blocks = ShardReader(data, "train").blocks
    flip(data / shard_file("train", 0), int(blocks["offset"][0]) + 200)
    flip(data / shard_file("train", 0), int(blocks["offset"][2]) + 300)
    flip(data / shard_file("train", 1), int(blocks["offset"][4]) - 400)
    problems = verify(data)
    assert len(problems) == 3
    locations = [
        "000.tar: block 0: the crc32 of its rows",
        "000.tar: block 2: the crc32 of its rows",
        "001.tar: block 1: its tar",
    ]
    for location, problem in zip(locations, problems, strict=True):
        assert location in problem


def test_missing_and_unknown_files_are_named(data):
    (data / shard_file("train", 0)).rename(data / shard_file("train", 7))
    (data / "unigrams.npy").unlink()
    (data / "tokenizer" / "vocab.txt").unlink()
    problems = "\n".join(verify(data))
    for location in [
        "tokenizer: no vocabulary",
        "shards/train-000007.tar: not in the manifest",
        "train-000000.tar: shard 0",
    ]:
        assert location in problems


def test_another_tokenizer_is_reported(data):
    path = data / "tokenizer" / "vocab.txt"
    path.write_text(path.read_text().replace("w77", "v77"))
    (problem,) = verify(data)
    assert "tokenizer" in problem and "fingerprint" in problem


@pytest.mark.parametrize(
    ("row", "column", "token", "message"),
    [
        (3, 10, 600, "block 0: token id 600"),
        (20, 0, 9, "block 1: row 4 does not begin with [CLS]"),
        (35, 15, 0, "block 2: padding before the end"),
        (2, 1, 4, "block 0: the document fragments do not cover each text token"),
    ],
)
def test_impossible_rows_are_reported_though_all_checksums_agree(data, row, column, token, message):
    rows = SHARDS[0].copy()
    rows[row, column] = token
    rewrite(data, rows)
    assert any(message in problem for problem in verify(data))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(1, 40, "lies outside"), (2, 2, "do not cover"), (3, -1, "lies outside")],
)
def test_impossible_fragments_are_reported(data, field, value, message):
    def change(fragments):
        fragments[0, field] = value

    rewrite(data, SHARDS[0], change)
    assert any("block 0: " in problem and message in problem for problem in verify(data))


@pytest.mark.parametrize("key", ["documents", "pieces", "tokens", "pad"])
def test_wrong_counts_are_reported(data, key):
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"][key] += 1
    path.write_text(json.dumps(manifest))
    (problem,) = verify(data)
    assert f"{key}, the manifest says {manifest['splits']['train'][key]}" in problem


def test_wrong_unigrams_and_dataset_id_are_reported(data):
    counts = np.load(data / "unigrams.npy")
    counts[50] += 1
    np.save(data / "unigrams.npy", counts)
    path = data / "manifest.json"
    path.write_text(path.read_text().replace(read_manifest(data).dataset_id, "0" * 32))
    of_manifest, of_unigrams = verify(data)
    assert of_manifest.startswith("manifest.json: dataset_id") and "token 50" in of_unigrams


def test_inspect_shows_rows_by_document_fragment_with_their_source(data):
    lines = list(describe_rows(data, "train", [41], source=True))
    row = SHARDS[1][1]
    assert lines[0].startswith("row 41 (shard 1, block 0): ") and lines[0].endswith(
        " 3 document fragments"
    )
    assert f"{(row == 0).sum()} padding" in lines[0]
    first = row[1 : np.argmax(row == 3)]
    assert lines[1] == f"  [1:{1 + len(first)}] " + " ".join(f"w{token}" for token in first)
    assert lines[2] == "    from text.txt, bytes 0-1000: document 3, token 0 (unit 0)"
    assert len(list(describe_rows(data, "train", [0, 1]))) == 2 + 3 + 3
    with pytest.raises(UserError, match="no row 60, split train has rows 0 to 59"):
        list(describe_rows(data, "train", [60]))
