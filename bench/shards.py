"""Data folders of random rows, without a text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from electra_ds.common.special_ids import SpecialIds
from electra_ds.data import shard_format

VOCAB_SIZE = 30522  # as BERT's
BLOCK_ROWS = 256
SPECIAL_IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)  # as BERT's


def write_description(
    folder: Path,
    sequence_length: int,
    shards: Sequence[shard_format.ShardInfo],
    blocks: np.ndarray,
    fingerprint: str = "0" * 64,
) -> None:
    """Write index and manifest of a data folder with finished shards.

    blocks: as `shard_format.write_shard` returns them, of all shards.
    fingerprint: of the tokenizer in the folder; a folder without one is read by ShardReader only.
    """
    index_sha256 = shard_format.write_index(folder / shard_format.index_file("train"), blocks)
    rows = int(blocks["rows"].sum())
    split = shard_format.SplitInfo(
        documents=rows,
        pieces=rows,
        tokens=rows * (sequence_length - 2),
        pad=0,
        rows=rows,
        shards=tuple(shards),
        index_sha256=index_sha256,
    )
    tokenizer = shard_format.TokenizerInfo(
        kind="wordpiece", sha256=fingerprint, vocab_size=VOCAB_SIZE, special_ids=SPECIAL_IDS
    )
    manifest = shard_format.Manifest(
        sequence_length=sequence_length,
        dtype="uint16",
        block_rows=BLOCK_ROWS,
        packing="concat",
        seed=0,
        tokenizer=tokenizer,
        source=shard_format.SourcePlan(sha256="0" * 64, files=(), units=()),
        splits={"train": split},
    )
    shard_format.write_manifest(folder, manifest)
