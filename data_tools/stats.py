"""Statistics of a data folder: counts, lengths, vocabulary coverage, unknown words, removed text.

A spectrum is {value: number of occurrences}. The spectrum of document lengths has at most
sqrt(2 x tokens) values, since different lengths add up to no more than the tokens: 1.5 million
values for 10^12 tokens. Dimensions: V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_ds.common.printable import word_shown
from electra_ds.data.data_tokenizer import load_data_tokenizer
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import Tokenizer

COVERAGE = (1_000, 5_000, 10_000)  # numbers of most frequent entries; their coverage is reported
PERCENTILES = {"percentile_5": 5, "median": 50, "percentile_95": 95}
NEVER_SEEN = 20  # most entries that are listed by name
CURVE_POINTS = 100  # most points of the curve, evenly spaced by the logarithm of the rank
BAR = 24  # characters of the longest bar

Rows = list[tuple[str, ...]]


class Table(NamedTuple):
    """A table of text cells. A cell with only # is a bar."""

    title: str
    head: tuple[str, ...]
    rows: Rows


class SplitScan(NamedTuple):
    """Counts of the rows of a split."""

    id_counts: np.ndarray  # [V] int64
    document_tokens: Counter[int]  # spectrum of tokens per document
    row_fragments: Counter[int]  # spectrum of document fragments per row


def stats(
    data_dir: str | Path, on_progress: Callable[[int], None] = lambda amount: None
) -> dict[str, Any]:
    """Return statistics of a data folder as JSON values.

    on_progress: receives the bytes of each shard
    Every row is read once; memory holds the fragments of one shard. Shares are fractions of 1.
    [UNK] counts as a token; [CLS], [SEP] and padding do not. `vocabulary` covers the training rows,
    `unknowns` the whole input; `unknowns` is None for data prepared by an older version. "pieces"
    are document fragments. Raises UserError when there is no manifest, and for a damaged block.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    tokenizer = load_data_tokenizer(data_dir, manifest.tokenizer)
    splits = {}
    vocabulary: dict[str, Any] = {}
    for split, info in manifest.splits.items():
        scan = _scan(ShardReader(data_dir, split), on_progress)
        unknown = int(scan.id_counts[tokenizer.special_ids.unk])
        splits[split] = {
            "documents": info.documents,
            "tokens": info.tokens,
            "rows": info.rows,
            "pieces": info.pieces,
            "padding": info.pad / (info.rows * manifest.sequence_length),
            "unknown": unknown / info.tokens,
            "tokens_per_document": _describe(scan.document_tokens),
            "pieces_per_row": _describe(scan.row_fragments),
        }
        if not vocabulary:  # the first split is train
            vocabulary = _vocabulary(scan.id_counts, info.tokens, tokenizer)
    return {
        "dataset_id": manifest.dataset_id,
        "sequence_length": manifest.sequence_length,
        "packing": manifest.packing,
        "splits": splits,
        "vocabulary": vocabulary,
        "removed": manifest.removed,
        "bad_lines": manifest.bad_lines,
        "unknowns": manifest.unknowns and manifest.unknowns.model_dump(),
    }


def _scan(reader: ShardReader, on_progress: Callable[[int], None]) -> SplitScan:
    """Read all rows of a split."""
    id_counts = np.zeros(reader.manifest.tokenizer.vocab_size, np.int64)
    document_tokens: Counter[int] = Counter()
    row_fragments: Counter[int] = Counter()
    for shard, info in enumerate(reader.info.shards):
        sources = []  # (length, unit, document) of the shard's fragments
        for block in range(*reader.shard_starts[shard : shard + 2]):
            rows = reader.block(block)
            fragments = reader.fragments(block)
            id_counts += np.bincount(rows.ravel(), minlength=len(id_counts))
            row_fragments.update(np.bincount(fragments[:, 0], minlength=len(rows)).tolist())
            sources.append(fragments[:, 2:5])
        # All fragments of a document are in one shard.
        length, unit, document = np.concatenate(sources).astype(np.int64).T
        _, number = np.unique(unit << 32 | document, return_inverse=True)
        document_tokens.update(np.bincount(number, length).astype(np.int64).tolist())
        on_progress(info.bytes)
    return SplitScan(id_counts, document_tokens, row_fragments)


def _describe(spectrum: Counter[int]) -> dict[str, Any]:
    """Return mean, extremes, percentiles and a histogram of a spectrum, all exact.

    The bins of the histogram are powers of two: [[from, to, how many values, their sum], ...].
    """
    values, counts = np.array(sorted(spectrum.items())).T
    sums = counts * values
    at_most = np.cumsum(counts)  # number of values up to each value
    power = np.frexp(values)[1] - 1
    histogram = []
    for exponent in range(power[0], power[-1] + 1):
        in_bin = power == exponent
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        histogram.append([low, high, int(counts[in_bin].sum()), int(sums[in_bin].sum())])
    ranks = np.array([*PERCENTILES.values()]) * at_most[-1] / 100
    percentiles = values[np.searchsorted(at_most, ranks)].tolist()
    return {
        "mean": float(sums.sum() / at_most[-1]),
        "least": int(values[0]),
        "most": int(values[-1]),
        **dict(zip(PERCENTILES, percentiles, strict=True)),
        "histogram": histogram,
    }


def _vocabulary(id_counts: np.ndarray, tokens: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how often entries of the vocabulary occur in the text, without special entries.

    `curve` is [[rank, count of the entry, share of the tokens covered up to this rank], ...].
    """
    special = list(tokenizer.special_ids.model_dump().values())
    entries = np.delete(np.arange(len(id_counts)), special)
    counts = id_counts[entries]
    by_rank = np.sort(counts)[::-1]
    seen = int(np.count_nonzero(counts))
    covered = np.cumsum(by_rank) / tokens
    ranks = np.unique(np.geomspace(1, max(1, seen), CURVE_POINTS).round().astype(int)).tolist()
    return {
        "kind": tokenizer.kind,
        "entries": len(entries),
        "seen": seen,
        "never_seen": tokenizer.tokens(entries[counts == 0][:NEVER_SEEN]),
        "covered": {str(n): float(covered[n - 1]) for n in COVERAGE if n < len(entries)},
        "curve": [[rank, int(by_rank[rank - 1]), float(covered[rank - 1])] for rank in ranks],
    }


def tables(facts: dict[str, Any]) -> list[Table]:
    """Return the result of `stats` as tables of text."""
    removed = [
        (reason, f"{count:,}")
        for kind in ("removed", "bad_lines")
        for reason, count in facts[kind].items()
    ]
    title = (
        f"rows of {facts['sequence_length']} tokens, {facts['packing']}, "
        f"dataset {facts['dataset_id']}"
    )
    lengths_head = ("tokens", "documents", "their tokens", "")
    return [
        Table(title, ("", *facts["splits"]), _count_rows(facts)),
        Table("tokens per document (train)", lengths_head, _length_rows(facts)),
        Table(f"{facts['vocabulary']['kind']} vocabulary (train)", (), _vocabulary_rows(facts)),
        Table("removed from the input", (), list(removed)),
    ]


def _count_rows(facts: dict[str, Any]) -> Rows:
    """Counts, shares and mean values, with a column for each split."""
    splits = facts["splits"].values()
    rows: Rows = []
    for key in ("documents", "tokens", "rows"):
        rows.append((key, *(f"{split[key]:,}" for split in splits)))
    for key in ("padding", "unknown"):
        rows.append((key, *(f"{split[key]:.2%}" for split in splits)))
    spreads = [
        ("tokens_per_document", "tokens per document", ("mean", "least", *PERCENTILES, "most")),
        ("pieces_per_row", "document fragments per row", ("mean", "most")),
    ]
    for key, label, names in spreads:
        for name in names:
            values = (f"{round(split[key][name], 1):,}" for split in splits)
            rows.append((f"{label}, {name.replace('_', ' ')}", *values))
    return rows


def _length_rows(facts: dict[str, Any]) -> Rows:
    """The histogram of document lengths, with bars."""
    bins = facts["splits"]["train"]["tokens_per_document"]["histogram"]
    highest = max(count for _, _, count, _ in bins)
    return [
        (f"{low:,} to {high:,}", f"{count:,}", f"{total:,}", "#" * math.ceil(BAR * count / highest))
        for low, high, count, total in bins
    ]


def _vocabulary_rows(facts: dict[str, Any]) -> Rows:
    """Use of the vocabulary, and unknown words."""
    vocabulary = facts["vocabulary"]
    unseen = vocabulary["entries"] - vocabulary["seen"]
    named = " ".join(map(word_shown, vocabulary["never_seen"])) + " ..." * (unseen > NEVER_SEEN)
    rows: Rows = [
        ("entries, special ones left out", f"{vocabulary['entries']:,}"),
        ("never seen", f"{unseen:,}: {named}"),
    ]
    for n, share in vocabulary["covered"].items():
        rows.append((f"the {int(n):,} most frequent", f"{share:.2%} of tokens"))
    if unknowns := facts["unknowns"]:
        words = ", ".join(
            f"{word_shown(word)} {count:,}" for word, count in unknowns["words"].items()
        )
        examined = f"{unknowns['looked_at']:,} of {unknowns['found']:,} examined"
        rows.append(("unknown words", f"{examined}: {words}"))
    return rows
