"""Speed of reading rows in random order, and the time to the first batch of a billion rows.

    pip install --no-deps litdata lightning-utilities obstore tifffile boto3 botocore s3transfer \\
        jmespath requests urllib3 certifi charset-normalizer python-dateutil six
    python bench/reader.py --out B

Without --no-deps, litdata would install a torchvision with another torch.

Writes the same rows in every format and reads each file once, so that all are in the page cache.
Then the readers take turns. A rate is tokens per second of this process's CPU time, with all
threads; the table shows medians over the rounds. Ours is ShardReader with ShuffledOrder, as the
loader uses them. The others shuffle by themselves. webdataset and litdata return single rows;
ours and the memmap return an array of many rows.
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
from report import make_parser, run_main
from shards import BLOCK_ROWS, VOCAB_SIZE, write_description

from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data import shard_format
from electra_ds.data.loader import READ_TOKENS, Loader
from electra_ds.data.masking import masking_recipe
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.shuffle import ShuffledOrder

SHARD_TOKENS = 1 << 23
SECONDS = 1.0  # of CPU time, for each reader in each round
BILLION = 10**9


def random_rows(count: int, sequence_length: int) -> np.ndarray:
    """[count, S] uint16 of text tokens."""
    ids = np.random.default_rng(0).integers(104, VOCAB_SIZE, (count, sequence_length))
    return ids.astype(np.uint16)


# --------------------------------------------------------------------- the same rows in all formats


def write_formats(folder: Path, rows: np.ndarray) -> None:
    """Write rows as our shards, as one array, as tars of one .npy per row, and for litdata."""
    shard_rows = SHARD_TOKENS // rows.shape[1]
    parts = [rows[first : first + shard_rows] for first in range(0, len(rows), shard_rows)]
    write_shards(folder, parts)
    np.save(folder / "flat.npy", rows)
    (folder / "samples").mkdir()
    for shard, part in enumerate(parts):
        write_samples(folder / "samples" / f"{shard:06d}.tar", shard, part)
    if importlib.util.find_spec("litdata"):
        write_litdata(folder, rows.shape[1], len(parts))


def write_shards(folder: Path, parts: list[np.ndarray]) -> None:
    """Write a data folder of electra_ds."""
    (folder / "shards").mkdir(parents=True)
    no_fragments = np.zeros((0, 6), np.int32)
    infos = []
    blocks = []
    for shard, part in enumerate(parts):
        path = folder / shard_format.shard_file("train", shard)
        info, shard_blocks = shard_format.write_shard(
            path, "train", shard, part, no_fragments, BLOCK_ROWS
        )
        infos.append(info)
        blocks.append(shard_blocks)
    write_description(folder, parts[0].shape[1], infos, np.concatenate(blocks))


def write_samples(path: Path, shard: int, rows: np.ndarray) -> None:
    """Write a tar for webdataset, with one .npy for each row."""
    header = shard_format.npy_header(rows.dtype, (1, rows.shape[1]))
    with open(path, "wb") as tar:
        for i, row in enumerate(rows):
            payload = header + row.tobytes()
            tar.write(shard_format.tar_header(f"{shard:06d}-{i:06d}.ids.npy", len(payload)))
            tar.write(payload)
            tar.write(bytes(-len(payload) % shard_format.TAR_BLOCK))
        tar.write(bytes(2 * shard_format.TAR_BLOCK))


def write_litdata(folder: Path, sequence_length: int, shards: int) -> None:
    """Write the rows of flat.npy for litdata."""
    from litdata import TokensLoader, optimize

    optimize(
        functools.partial(shard_tokens, folder),
        list(range(shards)),
        str(folder / "litdata"),
        chunk_size=SHARD_TOKENS,
        item_loader=TokensLoader(sequence_length),
        num_workers=1,
        verbose=False,
    )


def shard_tokens(folder: Path, shard: int) -> Iterator[torch.Tensor]:
    """The tokens of one shard; litdata cuts them into rows."""
    rows = np.load(folder / "flat.npy", mmap_mode="r")
    shard_rows = SHARD_TOKENS // rows.shape[1]
    yield torch.from_numpy(rows[shard * shard_rows : (shard + 1) * shard_rows].flatten())


# --------------------------------------------------- readers: endless iterators over token counts


def read_ours(folder: Path) -> Iterator[int]:
    reader = ShardReader(folder, "train")
    order = ShuffledOrder(reader.blocks["rows"], 0)
    count = READ_TOKENS // reader.sequence_length
    consumed_rows = 0
    while True:
        rows, _ = order.rows(consumed_rows + np.arange(count))
        yield reader.read(rows).size
        consumed_rows += count


def read_flat(folder: Path, take: bool) -> Iterator[int]:
    """take: use numpy.take instead of indexing."""
    rows = np.load(folder / "flat.npy", mmap_mode="r")
    count = READ_TOKENS // rows.shape[1]
    epoch = 0
    while True:
        order = np.random.default_rng(epoch).permutation(len(rows))
        epoch += 1
        for first in range(0, len(rows), count):
            numbers = order[first : first + count]
            yield (rows.take(numbers, axis=0) if take else rows[numbers]).size


def read_webdataset(folder: Path) -> Iterator[int]:
    urls = sorted(map(str, (folder / "samples").glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode()
    while True:
        yield from (sample["ids.npy"].size for sample in samples)


def read_litdata(folder: Path, sequence_length: int) -> Iterator[int]:
    from litdata import StreamingDataset, TokensLoader

    samples = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(sequence_length), shuffle=True
    )
    while True:
        yield from (row.numel() for row in samples)


def make_readers(folder: Path, sequence_length: int) -> dict[str, Iterator[int]]:
    """The readers of the formats that are written."""
    readers = {
        "ours": read_ours(folder),
        "webdataset, one .npy per sample": read_webdataset(folder),
    }
    if (folder / "litdata").exists():
        readers["litdata TokensLoader"] = read_litdata(folder, sequence_length)
    readers["flat memmap, rows[n]"] = read_flat(folder, take=False)
    readers["flat memmap, numpy.take"] = read_flat(folder, take=True)
    return readers


def measure_rate(reader: Iterator[int]) -> float:
    """Tokens per second of CPU time."""
    began = time.process_time()
    tokens = 0
    seconds = 0.0
    while seconds < SECONDS:
        tokens += next(reader)
        seconds = time.process_time() - began
    return tokens / seconds


def compare(folder: Path, sequence_length: int, tokens: int, rounds: int) -> None:
    """Measure the readers in turn and print the table."""
    if not (folder / "flat.npy").exists():
        write_formats(folder, random_rows(tokens // sequence_length, sequence_length))
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    readers = make_readers(folder, sequence_length)
    for reader in readers.values():
        next(reader)  # opens the files
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            rates[name].append(measure_rate(reader))
    our_median = statistics.median(rates["ours"])
    print(f"\n{sequence_length} tokens per row      million tokens per CPU-second    ours is")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"({min(values) / 1e6:.1f}-{max(values) / 1e6:.1f})"
        print(f"{name:32s} {median / 1e6:9.1f} {spread:18s} {our_median / median:9.2f} x")


# ---------------------------------------------------------------------------------- a billion rows

SHARD_BLOCKS = 1000
FIRST_BATCH_ROWS = 128


def write_sparse_shards(folder: Path, sequence_length: int) -> None:
    """Write an index of 10^9 rows and its shards as sparse files.

    Only the blocks that `first_batch` reads have content.
    """
    (folder / "shards").mkdir(parents=True)
    rows = random_rows(BLOCK_ROWS, sequence_length)
    payload = shard_format.npy_header(rows.dtype, rows.shape) + rows.tobytes()
    padding = -len(payload) % shard_format.TAR_BLOCK
    # A block has two members; the one of the document fragments is empty.
    stride = 3 * shard_format.TAR_BLOCK + len(payload) + padding
    blocks = np.zeros(BILLION // BLOCK_ROWS, shard_format.INDEX_DTYPE)
    shard_of_block, index_in_shard = np.divmod(np.arange(len(blocks)), SHARD_BLOCKS)
    blocks["shard"] = shard_of_block
    blocks["rows"] = BLOCK_ROWS
    blocks["bytes"] = len(payload)
    blocks["crc32"] = zlib.crc32(payload)
    blocks["offset"] = index_in_shard * stride + shard_format.TAR_BLOCK
    infos = []
    for shard, count in enumerate(np.bincount(shard_of_block).tolist()):
        name = shard_format.shard_file("train", shard)
        size = count * stride + 2 * shard_format.TAR_BLOCK
        with open(folder / name, "wb") as file:
            file.truncate(size)
        infos.append(
            shard_format.ShardInfo(file=name, rows=count * BLOCK_ROWS, bytes=size, sha256="0" * 64)
        )
    write_description(folder, sequence_length, infos, blocks)
    positions = first_position(len(blocks)) + np.arange(READ_TOKENS // sequence_length)
    read_rows, _ = ShuffledOrder(blocks["rows"], 0).rows(positions)
    for block in np.unique(read_rows // BLOCK_ROWS):
        shard, _, offset, *_ = blocks[block].item()
        name = shard_format.block_name("train", shard, index_in_shard[block])
        with open(folder / shard_format.shard_file("train", shard), "r+b") as file:
            file.seek(offset - shard_format.TAR_BLOCK)
            file.write(shard_format.tar_header(f"{name}.ids.npy", len(payload)) + payload)


def first_position(blocks: int) -> int:
    """Position of the last global batch of the third epoch."""
    return 3 * blocks * BLOCK_ROWS - FIRST_BATCH_ROWS


def first_batch(folder: Path, sequence_length: int = 128) -> None:
    """Time the opening of 10^9 rows and the last global batch of their third epoch."""
    if not (folder / "manifest.json").exists():
        write_sparse_shards(folder, sequence_length)
    began = time.perf_counter()
    reader = ShardReader(folder, "train")
    opened = time.perf_counter()
    loader = Loader(
        reader,
        ShuffledOrder(reader.blocks["rows"], 0),
        masking_recipe(reader.manifest, ObjectiveConfig(), 0),
        global_batch_size=FIRST_BATCH_ROWS,
        micro_batch_size=FIRST_BATCH_ROWS,
        consumed_rows=first_position(len(reader.blocks)),
    )
    next(loader)
    ended = time.perf_counter()
    loader.close()
    print(
        f"\n{reader.rows:,} rows in {len(reader.info.shards):,} shards: opened in "
        f"{opened - began:.2f} s; first batch, at the last position of epoch 3, after "
        f"another {ended - opened:.2f} s"
    )


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for about 2 GB of rows, which are kept"
    )
    parser.add_argument("--tokens", type=int, default=1 << 26, help="of each row length")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all readers")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    first_batch(options.out / "billion")
    for sequence_length in (128, 512):
        compare(options.out / f"{sequence_length}", sequence_length, options.tokens, options.rounds)


if __name__ == "__main__":
    run_main(main)
