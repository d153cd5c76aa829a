"""What is in a data folder? Counts, lengths, vocabulary coverage, unknown words, what was removed; facts and a report.

A spectrum is {value: how often}. That of documents' lengths holds at most sqrt(2 x tokens) values, since different
lengths sum up to no more than the tokens: 1.5 million for 10^12 of them. Letters: V vocabulary.
"""

import html
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

COVERAGE = (1_000, 5_000, 10_000)  # most frequent entries, whose share of the text is told
PERCENTILES = {"percentile_5": 5, "median": 50, "percentile_95": 95}
NEVER_SEEN = 20  # entries named
CURVE = (
    100  # ranks at most, evenly spaced by their logarithm, at which counts and coverage are told
)
BAR = 24  # characters of the longest bar
WIDTH, HEIGHT, LEFT, TOP = (
    560,
    280,
    90,
    30,
)  # of a plot's frame and of the margins before it, in pixels
HEAD = """<!doctype html><meta charset="utf-8"><title>Data folder</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 50em; margin: 2em auto; padding: 0 1em }
h1, h2 { font-size: 1.1em; margin: 2em 0 .5em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em 1em .15em 0; text-align: right; vertical-align: top }
td:first-child, .text td { text-align: left } td:first-child { white-space: nowrap }
i { display: block; height: 1em; background: #5b8fc9 }
</style>"""

Table = tuple[
    str, tuple[str, ...], list[tuple[str, ...]]
]  # title, head, rows; a cell of # alone is a bar


def stats(
    data_dir: str | Path, on_progress: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """The facts about a data folder, as JSON values; reads every row once, holds the pieces of one shard at a time.

    `moved` hears of shard bytes done. Shares are of 1; [UNK]s count as tokens; [CLS], [SEP] and padding do not.
    `vocabulary` is about the training rows, `unknowns` what `prepare` recorded of the whole input (None when
    an older version prepared). UserError: no manifest, a damaged block.
    """
    data_dir, manifest = Path(data_dir), read_manifest(data_dir)
    tokenizer, splits, vocabulary = load_tokenizer(data_dir / "tokenizer"), {}, {}
    for split, info in manifest.splits.items():
        counts, lengths, per_row = _scan(ShardReader(data_dir, split), on_progress)
        unknown = int(counts[tokenizer.special_ids.unk])
        splits[split] = {
            "documents": info.documents,
            "tokens": info.tokens,
            "rows": info.rows,
            "pieces": info.pieces,
            "padding": info.pad / (info.rows * manifest.sequence_length),
            "unknown": unknown / info.tokens,
            "tokens_per_document": _describe(lengths),
            "pieces_per_row": _describe(per_row),
        }
        vocabulary = vocabulary or _vocabulary(counts, info.tokens, tokenizer)  # train comes first
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


def _scan(
    reader: ShardReader, on_progress: Callable[[int], None]
) -> tuple[np.ndarray, Counter[int], Counter[int]]:
    """Of a split: (how often each id occurs [V], spectrum of tokens per document, spectrum of pieces per row)."""
    counts = np.zeros(reader.manifest.tokenizer.vocab_size, np.int64)
    lengths, per_row = Counter(), Counter()
    for shard, info in enumerate(reader.info.shards):
        tables = []
        for block in range(*reader.shard_starts[shard : shard + 2]):
            rows, pieces = reader.block(block), reader.fragments(block)
            counts += np.bincount(rows.ravel(), minlength=len(counts))
            per_row.update(np.bincount(pieces[:, 0], minlength=len(rows)).tolist())
            tables.append(pieces[:, 2:5])
        length, unit, document = (
            np.concatenate(tables).astype(np.int64).T
        )  # all pieces of a document are in one shard
        _, number = np.unique(unit << 32 | document, return_inverse=True)
        lengths.update(np.bincount(number, length).astype(np.int64).tolist())
        on_progress(info.bytes)
    return counts, lengths, per_row


def _describe(spectrum: Counter[int]) -> dict[str, Any]:
    """Mean, extremes and percentiles, exact; a histogram by powers of two: [[from, to, how many, their sum]]."""
    values, counts = np.array(sorted(spectrum.items())).T
    sums, at_most = counts * values, np.cumsum(counts)
    power = np.frexp(values)[1] - 1
    bins = [(p, power == p) for p in range(power[0], power[-1] + 1)]
    places = np.searchsorted(at_most, np.array([*PERCENTILES.values()]) * at_most[-1] / 100)
    return {
        "mean": float(sums.sum() / at_most[-1]),
        "least": int(values[0]),
        "most": int(values[-1]),
        **dict(zip(PERCENTILES, values[places].tolist(), strict=True)),
        "histogram": [
            [2**p, 2 ** (p + 1) - 1, int(counts[own].sum()), int(sums[own].sum())]
            for p, own in bins
        ],
    }


def _vocabulary(counts: np.ndarray, tokens: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which entries, special ones left out, the text uses; `curve` is [[rank, count, share covered up to it]]."""
    entries = np.delete(np.arange(len(counts)), list(tokenizer.special_ids.model_dump().values()))
    own = counts[entries]
    by_rank, seen = np.sort(own)[::-1], int(np.count_nonzero(own))
    covered = np.cumsum(by_rank) / tokens
    ranks = np.unique(np.geomspace(1, max(1, seen), CURVE).round().astype(int)).tolist()
    return {
        "kind": tokenizer.kind,
        "entries": len(entries),
        "seen": seen,
        "never_seen": tokenizer.tokens(entries[own == 0][:NEVER_SEEN]),
        "covered": {str(n): float(covered[n - 1]) for n in COVERAGE if n < len(entries)},
        "curve": [[rank, int(by_rank[rank - 1]), float(covered[rank - 1])] for rank in ranks],
    }


def tables(facts: dict[str, Any]) -> list[Table]:
    """The facts for people, in lines of text."""
    splits, words, unknowns = facts["splits"].values(), facts["vocabulary"], facts["unknowns"]
    counts = [
        (key, *(f"{split[key]:,}" for split in splits)) for key in ("documents", "tokens", "rows")
    ]
    shares = [(key, *(f"{split[key]:.2%}" for split in splits)) for key in ("padding", "unknown")]
    spreads = [("tokens_per_document", name) for name in ("mean", "least", *PERCENTILES, "most")]
    spreads += [("pieces_per_row", name) for name in ("mean", "most")]
    spreads = [
        (
            f"{key}, {name}".replace("_", " "),
            *(f"{round(split[key][name], 1):,}" for split in splits),
        )
        for key, name in spreads
    ]
    bins = facts["splits"]["train"]["tokens_per_document"]["histogram"]
    highest = max(count for _, _, count, _ in bins)
    lengths = [
        (f"{low:,} to {high:,}", f"{count:,}", f"{total:,}", "#" * math.ceil(BAR * count / highest))
        for low, high, count, total in bins
    ]
    unseen = words["entries"] - words["seen"]
    named = " ".join(words["never_seen"]) + " ..." * (unseen > NEVER_SEEN)
    vocabulary = [
        ("entries, special ones left out", f"{words['entries']:,}"),
        ("never seen", f"{unseen:,}: {named}"),
    ]
    vocabulary += [
        (f"the {int(n):,} most frequent", f"{share:.2%} of tokens")
        for n, share in words["covered"].items()
    ]
    if unknowns:
        most = ", ".join(f"{word} {count:,}" for word, count in unknowns["words"].items())
        vocabulary.append(
            (
                "unknown words",
                f"{unknowns['looked_at']:,} of {unknowns['found']:,} looked at: {most}",
            )
        )
    gone = [
        (reason, f"{count:,}")
        for kind in ("removed", "bad_lines")
        for reason, count in facts[kind].items()
    ]
    title = f"rows of {facts['sequence_length']} tokens, {facts['packing']}, dataset {facts['dataset_id']}"
    return [
        (title, ("", *facts["splits"]), counts + shares + spreads),
        ("tokens per document (train)", ("tokens", "documents", "their tokens", ""), lengths),
        (f"{words['kind']} vocabulary (train)", (), vocabulary),
        ("removed from the input", (), gone),
    ]


def page(facts: dict[str, Any], name: str) -> str:
    """The same as one HTML file that needs nothing else, with plots; light or dark as its reader's screen is."""
    parts = [HEAD, f"<h1>{html.escape(name)}</h1>"]
    for title, head, rows in tables(facts):
        lines = [
            "".join(f"<th>{html.escape(cell)}</th>" for cell in head),
            *("".join(map(_cell, row)) for row in rows),
        ]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(
            f"<h2>{html.escape(title)}</h2>\n<table{'' if head else ' class=text'}>\n{body}\n</table>"
        )
    ranks, counts, covered = np.array(facts["vocabulary"]["curve"]).T
    right, top = math.log10(max(10, ranks[-1])), math.ceil(math.log10(max(10, counts[0])))
    x, x_ticks = (
        np.log10(ranks) / right,
        [(power / right, f"{10**power:,}") for power in range(int(right) + 1)],
    )
    powers = [(power / top, f"{10**power:,}") for power in range(top + 1)]
    fifths = [(part / 5, f"{part / 5:.0%}") for part in range(6)]
    parts.append("<h2>how often entries occur, and what the most frequent ones cover (train)</h2>")
    parts.append(
        _plot(
            "rank of the entry",
            "occurrences",
            x_ticks,
            powers,
            x,
            np.log10(np.maximum(1, counts)) / top,
        )
    )
    parts.append(
        _plot("number of most frequent entries", "share of tokens", x_ticks, fifths, x, covered)
    )
    return "\n".join(parts)


def _cell(text: str) -> str:
    bar = not text.strip("#")
    return (
        f'<td><i style="width:{len(text) / 2}em"></i></td>'
        if bar
        else f"<td>{html.escape(text)}</td>"
    )


def _plot(
    x_label: str, y_label: str, x_ticks: list, y_ticks: list, x: np.ndarray, y: np.ndarray
) -> str:
    """A curve as SVG; x and y run from 0 to 1, ticks are [(place, text)]."""
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    grid = "".join(f"M{LEFT + at * WIDTH:.0f} {TOP}V{bottom}" for at, _ in x_ticks)
    grid += "".join(f"M{LEFT} {bottom - at * HEIGHT:.0f}H{right}" for at, _ in y_ticks)
    texts = [(LEFT + at * WIDTH, bottom + 18, "middle", text) for at, text in x_ticks]
    texts += [(LEFT - 6, bottom - at * HEIGHT + 4, "end", text) for at, text in y_ticks]
    texts += [
        (LEFT + WIDTH / 2, bottom + 38, "middle", x_label),
        (LEFT, TOP - 12, "middle", y_label),
    ]
    words = "".join(
        f'<text x="{a:.0f}" y="{b:.0f}" text-anchor="{side}">{text}</text>'
        for a, b, side, text in texts
    )
    points = " ".join(
        f"{LEFT + a * WIDTH:.1f},{bottom - b * HEIGHT:.1f}" for a, b in zip(x, y, strict=True)
    )
    return f'''<svg viewBox="0 0 {right + 40} {bottom + 45}" font-size="12" fill="currentColor">
<path d="{grid}" stroke="#888" stroke-width=".4"/>
<polyline points="{points}" fill="none" stroke="#5b8fc9" stroke-width="2"/>{words}</svg>'''
