"""Is a data folder what its manifest says? Reads everything again and names what is wrong, by shard and block.

Letters: n rows, S sequence, P pieces, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.data.shard_format import Manifest, read_manifest, read_unigrams
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer


def verify(data_dir: str | Path, on_progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every byte and count of a data folder with its manifest; [] means that all is well.

    `moved` hears of shard bytes done (their total is the sum over the manifest's shards). UserError only when there
    is no manifest to compare with.
    """
    data_dir, manifest = Path(data_dir), read_manifest(data_dir)
    problems = []
    if manifest.dataset_id != manifest.content_id():
        problems.append(
            f"manifest.json: dataset_id {manifest.dataset_id}, its content gives {manifest.content_id()}"
        )
    try:
        fingerprint = load_tokenizer(data_dir / "tokenizer").fingerprint
        if fingerprint != manifest.tokenizer.sha256:
            problems.append(
                f"tokenizer: its fingerprint is {fingerprint}, the rows' is {manifest.tokenizer.sha256}"
            )
    except UserError as error:
        problems.append(str(error))
    known = {shard.file for info in manifest.splits.values() for shard in info.shards}
    strangers = {f"shards/{path.name}" for path in (data_dir / "shards").glob("*")} - known
    problems += [f"{name}: not in the manifest" for name in sorted(strangers)]
    for split in manifest.splits:
        problems += _verify_split(data_dir, split, manifest, on_progress or (lambda size: None))
    return problems


def _verify_split(
    data_dir: Path, split: str, manifest: Manifest, on_progress: Callable[[int], None]
) -> list[str]:
    try:
        reader = ShardReader(data_dir, split, check_files=False)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    totals, unigrams = Counter(), np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for shard, info in enumerate(reader.info.shards):
        found = _verify_shard(reader, shard, totals, unigrams)
        if not found and sha256_file(data_dir / info.file) != info.sha256:
            found = [
                f"{data_dir / info.file}: its sha256 is not the manifest's though every block is whole: "
                "bytes beside the rows differ; copy this shard again"
            ]
        problems += found
        on_progress(info.bytes)
    if not problems:  # counts over damaged rows would say nothing new
        problems = [
            f"{split}: {totals[key]} {key}, the manifest says {getattr(reader.info, key)}"
            for key in ("documents", "pieces", "tokens", "pad", "rows")
            if totals[key] != getattr(reader.info, key)
        ]
        if split == "train":
            problems += _verify_unigrams(data_dir, manifest, unigrams)
    return problems


def _verify_shard(
    reader: ShardReader, shard: int, totals: Counter, unigrams: np.ndarray
) -> list[str]:
    """Check the shard's blocks; adds what they hold to `totals` and `unigrams`."""
    try:
        reader.check_shard(shard)
    except UserError as error:
        return [str(error)]
    problems, special = [], reader.manifest.tokenizer.special_ids
    for block in range(*reader.shard_starts[shard : shard + 2]):
        try:
            rows, pieces = reader.block(block), reader.fragments(block)
            if what := _disagreement(rows, pieces, reader.manifest):
                raise reader.damage(block, what)
        except UserError as error:
            problems.append(str(error))
            continue
        unigrams += np.bincount(rows.ravel(), minlength=len(unigrams))
        totals.update(
            documents=int((pieces[:, 5] == 0).sum()),
            pieces=len(pieces),
            tokens=int(pieces[:, 2].sum()),
        )
        totals.update(pad=int((rows == special.pad).sum()), rows=len(rows))
    return problems


def _disagreement(rows: np.ndarray, pieces: np.ndarray, manifest: Manifest) -> str | None:
    """What is wrong inside one block's rows [n, S] and pieces [P, 6], or None."""
    special = manifest.tokenizer.special_ids
    if rows.max() >= manifest.tokenizer.vocab_size:
        return f"token id {rows.max()}, the vocabulary has {manifest.tokenizer.vocab_size}"
    real = rows != special.pad
    if (rows[:, 0] != special.cls).any():
        return f"row {int(np.argmax(rows[:, 0] != special.cls))} does not begin with [CLS]"
    if (real[:, 1:] > real[:, :-1]).any():
        return "padding before the end of a row"
    row, start, length, *source = pieces.astype(np.int64).T
    inside = (
        (row >= 0)
        & (row < len(rows))
        & (start > 0)
        & (length > 0)
        & (start + length <= rows.shape[1])
    )
    inside &= (np.array(source) >= 0).all(axis=0)
    if not inside.all():
        return f"piece {int(np.argmin(inside))} lies outside its row or has no source"
    change = np.zeros(rows.size + 1, np.int64)
    np.add.at(change, row * rows.shape[1] + start, 1)
    np.add.at(change, row * rows.shape[1] + start + length, -1)
    text = ~np.isin(rows, (special.pad, special.cls, special.sep, special.mask))
    if not np.array_equal(np.cumsum(change)[:-1].reshape(rows.shape), text):
        return "its pieces do not cover the text of its rows exactly once"
    return None


def _verify_unigrams(data_dir: Path, manifest: Manifest, counted: np.ndarray) -> list[str]:
    try:
        stored = read_unigrams(data_dir, len(counted))
    except UserError as error:
        return [str(error)]
    counted[list(manifest.tokenizer.special_ids.model_dump().values())] = 0
    if np.array_equal(stored, counted):
        return []
    token = int(np.argmax(stored != counted))
    return [
        f"unigrams.npy: token {token} counted {stored[token]} times, the training rows hold {counted[token]}"
    ]
