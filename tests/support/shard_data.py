"""Small data folders of packed rows of random tokens, in the format that `prepare` writes."""

import itertools
import shutil
from pathlib import Path

import numpy as np

from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.shard_format import (
    Manifest,
    SourcePlan,
    SplitInfo,
    TokenizerInfo,
    index_file,
    read_manifest,
    shard_file,
    write_index,
    write_manifest,
    write_shard,
)
from electra_ds.data.tokenizer import load_tokenizer

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


def best_fit_rows(n: int, sequence_length: int, seed: int = 0, vocab_size: int = 600) -> np.ndarray:
    """Random rows [n, S] uint16: documents of random lengths, then up to 3 tokens of padding.

    A document is [CLS], tokens, [SEP].
    """
    random = np.random.default_rng(seed)
    rows = random.integers(5, vocab_size, (n, sequence_length)).astype(np.uint16)
    for row in rows:
        end = sequence_length - int(random.integers(0, 4))
        row[end:] = SPECIAL.pad
        cuts = [0, *sorted(random.choice(np.arange(3, end - 2, 3), 2, replace=False)), end]
        for start, stop in itertools.pairwise(cuts):
            row[start], row[stop - 1] = SPECIAL.cls, SPECIAL.sep
    return rows


def document_fragments(rows: np.ndarray) -> np.ndarray:
    """Fragments of the rows of one shard, [F, 6] int32: fragment f is document f of unit 0."""
    row, start = np.nonzero(rows == SPECIAL.cls)
    end = np.nonzero(rows == SPECIAL.sep)[1]
    zero = np.zeros_like(row)
    return np.stack(
        [row, start + 1, end - start - 1, zero, np.arange(len(row)), zero], axis=1
    ).astype(np.int32)


def write_data(
    data_dir: Path,
    shards: list[np.ndarray],
    block_rows: int = 16,
    vocab_size: int = 600,
    valid: np.ndarray | None = None,
) -> Path:
    """Write a data folder with shards of best_fit rows as split train, and rows as split valid.

    Its tokenizer has the words w5, w6, ... Returns the folder.
    """
    (data_dir / "shards").mkdir()
    fingerprint = write_tokenizer(data_dir / "tokenizer", vocab_size)
    splits = {"train": shards} if valid is None else {"train": shards, "valid": [valid]}
    rows = np.concatenate(shards)
    np.save(data_dir / "unigrams.npy", token_counts(rows, vocab_size))
    tokenizer = TokenizerInfo(
        kind="wordpiece", sha256=fingerprint, vocab_size=vocab_size, special_ids=SPECIAL
    )
    source = SourcePlan(sha256="0" * 64, files=("text.txt",), units=(((0, 0, 1000),),))
    write_manifest(
        data_dir,
        Manifest(
            sequence_length=rows.shape[1],
            dtype=rows.dtype.name,
            block_rows=block_rows,
            packing="best_fit",
            seed=0,
            tokenizer=tokenizer,
            source=source,
            splits={
                name: write_split(data_dir, name, parts, block_rows)
                for name, parts in splits.items()
            },
        ),
    )
    return data_dir


def write_tokenizer(folder: Path, vocab_size: int = 600) -> str:
    """Write a tokenizer of words. Returns its fingerprint."""
    words = [f"w{i}" for i in range(5, vocab_size)]
    vocab = folder.with_name("vocab.txt")
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = load_tokenizer(vocab)
    tokenizer.save(folder)
    vocab.unlink()
    return tokenizer.fingerprint


def with_vocabulary(data: Path, vocabulary: Path, out: Path) -> Path:
    """Copy a data folder to `out` and give it the tokenizer of `vocabulary`; returns `out`."""
    shutil.copytree(data, out)
    shutil.rmtree(out / "tokenizer")
    tokenizer = load_tokenizer(vocabulary)
    tokenizer.save(out / "tokenizer")
    manifest = read_manifest(out)
    info = manifest.tokenizer.model_copy(update={"sha256": tokenizer.fingerprint})
    write_manifest(out, manifest.model_copy(update={"tokenizer": info}))
    return out


def token_counts(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the counts of the text tokens, [V] int64."""
    counts = np.bincount(rows.ravel(), minlength=vocab_size)
    counts[:5] = 0
    return counts.astype(np.int64)


def write_split(data_dir: Path, split: str, shards: list[np.ndarray], block_rows: int) -> SplitInfo:
    """Write the shards and the index of one split. Returns its entry in the manifest."""
    written = [
        write_shard(
            data_dir / shard_file(split, shard),
            split,
            shard,
            rows,
            document_fragments(rows),
            block_rows,
        )
        for shard, rows in enumerate(shards)
    ]
    rows = np.concatenate(shards)
    return SplitInfo(
        documents=max(1, int((rows == SPECIAL.cls).sum())),
        pieces=max(1, int((rows == SPECIAL.cls).sum())),
        tokens=int((rows > SPECIAL.mask).sum()),
        pad=int((rows == SPECIAL.pad).sum()),
        rows=len(rows),
        index_sha256=write_index(
            data_dir / index_file(split), np.concatenate([blocks for _, blocks in written])
        ),
        shards=tuple(info for info, _ in written),
    )
