"""Comparison of a data folder with its manifest. Every file is read again.

Dimensions: n rows, S sequence, F fragments, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.data.data_tokenizer import load_data_tokenizer
from electra_ds.data.shard_format import Manifest, read_manifest, read_unigrams
from electra_ds.data.shard_reader import ShardReader


def verify(data_dir: str | Path, on_progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every byte and count of a data folder with its manifest; return the problems.

    on_progress: receives the bytes of each shard; they add up to the bytes of all shards of the
                 manifest
    An empty list means that everything agrees. Raises UserError only if the manifest is missing or
    cannot be read.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    problems = []
    if manifest.dataset_id != manifest.content_id():
        problems.append(
            f"manifest.json: dataset_id is {manifest.dataset_id}; expected "
            f"{manifest.content_id()}, the hash of its content"
        )
    try:
        load_data_tokenizer(data_dir, manifest.tokenizer)
    except UserError as error:
        problems.append(str(error))
    in_manifest = {shard.file for split in manifest.splits.values() for shard in split.shards}
    present = {f"shards/{path.name}" for path in (data_dir / "shards").glob("*")}
    problems += [f"{name}: not in the manifest" for name in sorted(present - in_manifest)]
    for split in manifest.splits:
        problems += _verify_split(data_dir, split, manifest, on_progress or (lambda size: None))
    return problems


def _verify_split(
    data_dir: Path, split: str, manifest: Manifest, on_progress: Callable[[int], None]
) -> list[str]:
    """Return the problems of one split."""
    try:
        reader = ShardReader(data_dir, split, check_files=False)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    totals: Counter[str] = Counter()
    unigrams = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for shard, info in enumerate(reader.info.shards):
        shard_problems = _verify_shard(reader, shard, totals, unigrams)
        if not shard_problems and sha256_file(data_dir / info.file) != info.sha256:
            shard_problems = [
                f"{data_dir / info.file}: its sha256 differs from that in the manifest, but all "
                "blocks are intact: bytes outside the rows have changed; copy this shard again"
            ]
        problems += shard_problems
        on_progress(info.bytes)
    if problems:  # counts of damaged rows would differ because of the damage
        return problems
    for key in ("documents", "pieces", "tokens", "pad", "rows"):
        expected = getattr(reader.info, key)
        if totals[key] != expected:
            problems.append(f"{split}: {totals[key]} {key}, the manifest says {expected}")
    if split == "train":
        problems += _verify_unigrams(data_dir, manifest, unigrams)
    return problems


def _verify_shard(
    reader: ShardReader, shard: int, totals: Counter[str], unigrams: np.ndarray
) -> list[str]:
    """Return the problems of a shard; add the counts of its blocks to `totals` and `unigrams`."""
    try:
        reader.check_shard(shard)
    except UserError as error:
        return [str(error)]
    problems = []
    pad = reader.manifest.tokenizer.special_ids.pad
    for block in range(*reader.shard_starts[shard : shard + 2]):
        try:
            rows = reader.block(block)
            fragments = reader.fragments(block)
            if problem := _block_problem(rows, fragments, reader.manifest):
                raise reader.block_error(block, problem)
        except UserError as error:
            problems.append(str(error))
            continue
        unigrams += np.bincount(rows.ravel(), minlength=len(unigrams))
        _, _, length, _, _, token = fragments.T
        totals.update(
            documents=int((token == 0).sum()),
            pieces=len(fragments),
            tokens=int(length.sum()),
            pad=int((rows == pad).sum()),
            rows=len(rows),
        )
    return problems


def _block_problem(rows: np.ndarray, fragments: np.ndarray, manifest: Manifest) -> str | None:
    """Describe the first problem of a block's rows [n, S] and fragments [F, 6]; None if none."""
    special = manifest.tokenizer.special_ids
    if rows.max() >= manifest.tokenizer.vocab_size:
        return f"token id {rows.max()}, expected less than {manifest.tokenizer.vocab_size}"
    starts_wrong = rows[:, 0] != special.cls
    if starts_wrong.any():
        return f"row {int(np.argmax(starts_wrong))} does not begin with [CLS]"
    is_real = rows != special.pad
    if (is_real[:, 1:] > is_real[:, :-1]).any():
        return "padding before the end of a row; expected padding only at the end"
    row, start, length, *_ = fragments.astype(np.int64).T
    # Number of fragments that cover each position, from their starts and ends.
    change = np.zeros(rows.size + 1, np.int64)
    np.add.at(change, row * rows.shape[1] + start, 1)
    np.add.at(change, row * rows.shape[1] + start + length, -1)
    covered = np.cumsum(change)[:-1].reshape(rows.shape)
    is_text = ~np.isin(rows, (special.pad, special.cls, special.sep, special.mask))
    if not np.array_equal(covered, is_text):
        return "the document fragments do not cover each text token exactly once"
    return None


def _verify_unigrams(data_dir: Path, manifest: Manifest, counts: np.ndarray) -> list[str]:
    """Compare unigrams.npy with the counts of all ids of the training rows, [V]."""
    try:
        stored = read_unigrams(data_dir, len(counts), manifest.unigrams_sha256)
    except UserError as error:
        return [str(error)]
    counts[list(manifest.tokenizer.special_ids.model_dump().values())] = 0
    if np.array_equal(stored, counts):
        return []
    token = int(np.argmax(stored != counts))
    return [
        f"unigrams.npy: count of token {token} is {stored[token]}; expected {counts[token]}, as in "
        "the training rows"
    ]
