"""How fast are rows read in random order, and how soon comes the first batch of a billion rows?

    pip install --no-deps litdata lightning-utilities obstore tifffile boto3 botocore s3transfer jmespath requests \\
        urllib3 certifi charset-normalizer python-dateutil six     # its torchvision would bring another torch
    python bench/reader.py --out B

Makes the same rows in every form, reads each whole once, so that all lie in the page cache alike, then lets the
readers take turns. A rate is tokens per second of this process's CPU time, its threads included; the table shows
medians over the rounds. Ours: ShardReader and ShuffledOrder as Batches uses them. The others shuffle with their own means;
webdataset and litdata give single rows, ours and the memmap an array of many.
"""

import argparse
import functools
import importlib.util
import statistics
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data import shard_format, shard_reader
from electra_ds.data.loader import READ_TOKENS, Loader
from electra_ds.data.masking import masking_recipe
from electra_ds.data.shuffle import ShuffledOrder

BLOCK_ROWS = 256
SHARD_TOKENS = 1 << 23
SECONDS = 1.0  # of CPU time, each reader in each round
BILLION = 10**9


def random_rows(n: int, sequence_length: int) -> np.ndarray:
    """[n, S] uint16 of text tokens."""
    return np.random.default_rng(0).integers(104, 30522, (n, sequence_length)).astype(np.uint16)


def describe(
    folder: Path, sequence_length: int, infos: list[shard_format.ShardInfo], blocks: np.ndarray
) -> None:
    """Write index and manifest around shards that are there."""
    special = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
    split = shard_format.SplitInfo(
        documents=0,
        pieces=0,
        tokens=0,
        pad=0,
        rows=int(blocks["rows"].sum()),
        shards=tuple(infos),
        index_sha256=shard_format.write_index(folder / shard_format.index_file("train"), blocks),
    )
    tokenizer = shard_format.TokenizerInfo(
        kind="wordpiece", sha256="0" * 64, vocab_size=30522, special_ids=special
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


# ------------------------------------------------------------------------------------------------- the same rows


def make(folder: Path, rows: np.ndarray) -> None:
    """The rows as our shards, as one flat array, as tars of one .npy each, and for litdata."""
    each = SHARD_TOKENS // rows.shape[1]
    (folder / "shards").mkdir(parents=True)
    (folder / "samples").mkdir()
    written, pieces = [], np.zeros((0, 6), np.int32)
    header = shard_format.npy_header(rows.dtype, (1, rows.shape[1]))
    for shard, first in enumerate(range(0, len(rows), each)):
        own = rows[first : first + each]
        written.append(
            shard_format.write_shard(
                folder / shard_format.shard_file("train", shard),
                "train",
                shard,
                own,
                pieces,
                BLOCK_ROWS,
            )
        )
        with open(folder / "samples" / f"{shard:06d}.tar", "wb") as tar:
            for i, row in enumerate(own):
                payload = header + row.tobytes()
                tar.write(
                    shard_format.tar_header(f"{shard:06d}-{i:06d}.ids.npy", len(payload)) + payload
                )
                tar.write(bytes(-len(payload) % shard_format.TAR_BLOCK))
            tar.write(bytes(2 * shard_format.TAR_BLOCK))
    describe(
        folder,
        rows.shape[1],
        [info for info, _ in written],
        np.concatenate([blocks for _, blocks in written]),
    )
    np.save(folder / "flat.npy", rows)
    if importlib.util.find_spec("litdata"):
        from litdata import TokensLoader, optimize

        optimize(
            functools.partial(long_items, folder),
            list(range(len(written))),
            str(folder / "litdata"),
            chunk_size=SHARD_TOKENS,
            item_loader=TokensLoader(rows.shape[1]),
            num_workers=1,
            verbose=False,
        )


def long_items(folder: Path, shard: int) -> Iterator[torch.Tensor]:
    """One shard's tokens for litdata, which cuts them into rows itself."""
    rows = np.load(folder / "flat.npy", mmap_mode="r")
    each = SHARD_TOKENS // rows.shape[1]
    yield torch.from_numpy(rows[shard * each : (shard + 1) * each].flatten())


# -------------------------------------------------------------------------------------------------- the readers


def ours(folder: Path) -> Iterator[int]:
    reader = shard_reader.ShardReader(folder, "train")
    order, n, position = (
        ShuffledOrder(reader.blocks["rows"], 0),
        READ_TOKENS // reader.sequence_length,
        0,
    )
    while True:
        yield reader.read(order.rows(position + np.arange(n))[0]).size
        position += n


def flat(folder: Path, take: bool) -> Iterator[int]:
    rows, epoch = np.load(folder / "flat.npy", mmap_mode="r"), 0
    n = READ_TOKENS // rows.shape[1]
    while True:
        order, epoch = np.random.default_rng(epoch).permutation(len(rows)), epoch + 1
        for first in range(0, len(rows), n):
            wanted = order[first : first + n]
            yield (rows.take(wanted, axis=0) if take else rows[wanted]).size


def one_per_sample(folder: Path) -> Iterator[int]:
    urls = sorted(map(str, (folder / "samples").glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode()
    while True:
        yield from (sample["ids.npy"].size for sample in samples)


def tokens_loader(folder: Path, sequence_length: int) -> Iterator[int]:
    from litdata import StreamingDataset, TokensLoader

    samples = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(sequence_length), shuffle=True
    )
    while True:
        yield from (row.numel() for row in samples)


def compare(folder: Path, sequence_length: int, tokens: int, rounds: int) -> None:
    """Measure the readers in turn and print the table."""
    if not (folder / "flat.npy").exists():
        make(folder, random_rows(tokens // sequence_length, sequence_length))
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    readers = {
        "ours": ours(folder),
        "webdataset, one .npy per sample": one_per_sample(folder),
        "litdata TokensLoader": tokens_loader(folder, sequence_length)
        if (folder / "litdata").exists()
        else None,
        "flat memmap, rows[n]": flat(folder, take=False),
        "flat memmap, numpy.take": flat(folder, take=True),
    }
    rates = {name: [] for name, reader in readers.items() if reader}
    for name in rates:
        next(readers[name])  # opens
    for name in list(rates) * rounds:
        rates[name].append(rate(readers[name]))
    own = statistics.median(rates["ours"])
    print(f"\n{sequence_length} tokens a row        million tokens per CPU-second    ours is")
    for name, found in rates.items():
        middle = statistics.median(found)
        spread = f"({min(found) / 1e6:.1f}-{max(found) / 1e6:.1f})"
        print(f"{name:32s} {middle / 1e6:9.1f} {spread:18s} {own / middle:9.2f} x")


def rate(reader: Iterator[int]) -> float:
    """Tokens per second of CPU time."""
    began, tokens = time.process_time(), 0
    while (seconds := time.process_time() - began) < SECONDS:
        tokens += next(reader)
    return tokens / seconds


# --------------------------------------------------------------------------------------------- a billion rows


def make_index(folder: Path, sequence_length: int) -> None:
    """An index of 10^9 rows and its shards as sparse files, which hold the blocks that `first_batch` will touch."""
    (folder / "shards").mkdir(parents=True)
    rows, per_shard = random_rows(BLOCK_ROWS, sequence_length), 1000
    payload = shard_format.npy_header(rows.dtype, rows.shape) + rows.tobytes()
    step = (
        3 * shard_format.TAR_BLOCK + len(payload) + -len(payload) % shard_format.TAR_BLOCK
    )  # both members; no pieces
    blocks = np.zeros(BILLION // BLOCK_ROWS, shard_format.INDEX_DTYPE)
    blocks["shard"], inside = np.divmod(np.arange(len(blocks)), per_shard)
    blocks["rows"], blocks["bytes"], blocks["crc32"] = BLOCK_ROWS, len(payload), zlib.crc32(payload)
    blocks["offset"] = inside * step + shard_format.TAR_BLOCK
    infos = []
    for shard, count in enumerate(np.bincount(blocks["shard"]).tolist()):
        size = count * step + 2 * shard_format.TAR_BLOCK
        with open(folder / shard_format.shard_file("train", shard), "wb") as file:
            file.truncate(size)
        name, sha256 = shard_format.shard_file("train", shard), "0" * 64
        infos.append(
            shard_format.ShardInfo(file=name, rows=count * BLOCK_ROWS, bytes=size, sha256=sha256)
        )
    describe(folder, sequence_length, infos, blocks)
    touched, _ = ShuffledOrder(blocks["rows"], 0).rows(
        3 * BILLION - 128 + np.arange(READ_TOKENS // sequence_length)
    )
    for block in np.unique(touched // BLOCK_ROWS):
        shard, _, offset, *_ = blocks[block].item()
        with open(folder / shard_format.shard_file("train", shard), "r+b") as file:
            file.seek(offset - shard_format.TAR_BLOCK)
            file.write(
                shard_format.tar_header(
                    f"{shard_format.block_name('train', shard, inside[block])}.ids.npy",
                    len(payload),
                )
                + payload
            )


def first_batch(folder: Path, sequence_length: int = 128) -> None:
    """Time the last global batch of the third epoch of 10^9 rows, from nothing open."""
    if not (folder / "manifest.json").exists():
        make_index(folder, sequence_length)
    began = time.perf_counter()
    reader = shard_reader.ShardReader(folder, "train")
    opened = time.perf_counter()
    order, recipe = (
        ShuffledOrder(reader.blocks["rows"], 0),
        masking_recipe(reader.manifest, ObjectiveConfig(), 0),
    )
    sizes = {"global_batch_size": 128, "micro_batch_size": 128, "position": 3 * reader.rows - 128}
    batches = Loader(reader, order, recipe, **sizes)
    next(batches)
    found = time.perf_counter()
    batches.close()
    print(
        f"\n{reader.rows:,} rows in {len(reader.info.shards):,} shards: opened in {opened - began:.2f} s, the first "
        f"batch at the last position of epoch 3 came {found - opened:.2f} s later"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", type=Path, required=True, help="about 2 GB are written here, and kept"
    )
    parser.add_argument("--tokens", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first_batch(options.out / "billion")
    for sequence_length in (128, 512):
        compare(options.out / f"{sequence_length}", sequence_length, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
