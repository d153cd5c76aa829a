"""Statistics of a data folder as one HTML page with plots, without scripts or links."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools.stats import tables
from electra_ds.common.printable import printable

# Pixels: a plot's frame, and the margins left of it and above it.
WIDTH = 560
HEIGHT = 280
LEFT = 90
TOP = 30
COLOR = "#5b8fc9"
HEAD = f"""<!doctype html><meta charset="utf-8"><title>Data folder</title><style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 50em; margin: 2em auto; padding: 0 1em }}
h1, h2 {{ font-size: 1.1em; margin: 2em 0 .5em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .15em 1em .15em 0; text-align: right; vertical-align: top }}
td:first-child, .text td {{ text-align: left }} td:first-child {{ white-space: nowrap }}
i {{ display: block; height: 1em; background: {COLOR} }}
</style>"""

Ticks = Sequence[tuple[float, str]]  # (position from 0 to 1, text)


def html_page(facts: dict[str, Any], name: str) -> str:
    """Return the result of `stats` as an HTML page. name: its heading"""
    parts = [HEAD, f"<h1>{html.escape(printable(name))}</h1>"]
    for title, head, rows in tables(facts):
        lines = [
            "".join(f"<th>{html.escape(cell)}</th>" for cell in head),
            *("".join(map(_cell, row)) for row in rows),
        ]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        kind = "" if head else " class=text"
        parts.append(f"<h2>{html.escape(title)}</h2>\n<table{kind}>\n{body}\n</table>")
    parts.append("<h2>occurrences of entries, and coverage by the most frequent ones (train)</h2>")
    parts += _vocabulary_plots(facts["vocabulary"]["curve"])
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Return a table cell; a text with only # becomes a bar of that length."""
    if not text.strip("#"):
        return f'<td><i style="width:{len(text) / 2}em"></i></td>'
    return f"<td>{html.escape(printable(text))}</td>"


def _vocabulary_plots(curve: list[list[float]]) -> list[str]:
    """Return the plots of occurrences and of coverage by rank; axes of counts are logarithmic."""
    ranks, counts, covered = np.array(curve).T
    right = math.log10(max(10, ranks[-1]))
    top = math.ceil(math.log10(max(10, counts[0])))
    x = np.log10(ranks) / right
    x_ticks = [(power / right, f"{10**power:,}") for power in range(int(right) + 1)]
    count_ticks = [(power / top, f"{10**power:,}") for power in range(top + 1)]
    share_ticks = [(part / 5, f"{part / 5:.0%}") for part in range(6)]
    log_counts = np.log10(np.maximum(1, counts)) / top
    return [
        _plot("rank of the entry", "occurrences", x_ticks, count_ticks, x, log_counts),
        _plot(
            "number of most frequent entries", "share of tokens", x_ticks, share_ticks, x, covered
        ),
    ]


def _plot(
    x_label: str, y_label: str, x_ticks: Ticks, y_ticks: Ticks, x: np.ndarray, y: np.ndarray
) -> str:
    """Return a curve as SVG. x, y: [points], from 0 to 1"""
    right = LEFT + WIDTH
    bottom = TOP + HEIGHT
    grid = "".join(f"M{LEFT + at * WIDTH:.0f} {TOP}V{bottom}" for at, _ in x_ticks)
    grid += "".join(f"M{LEFT} {bottom - at * HEIGHT:.0f}H{right}" for at, _ in y_ticks)
    texts: list[tuple[float, float, str, str]] = []
    texts += [(LEFT + at * WIDTH, bottom + 18, "middle", text) for at, text in x_ticks]
    texts += [(LEFT - 6, bottom - at * HEIGHT + 4, "end", text) for at, text in y_ticks]
    texts += [
        (LEFT + WIDTH / 2, bottom + 38, "middle", x_label),
        (LEFT, TOP - 12, "middle", y_label),
    ]
    labels = "".join(
        f'<text x="{left:.0f}" y="{down:.0f}" text-anchor="{side}">{text}</text>'
        for left, down, side, text in texts
    )
    points = " ".join(
        f"{LEFT + across * WIDTH:.1f},{bottom - up * HEIGHT:.1f}"
        for across, up in zip(x, y, strict=True)
    )
    return f"""<svg viewBox="0 0 {right + 40} {bottom + 45}" font-size="12" fill="currentColor">
<path d="{grid}" stroke="#888" stroke-width=".4"/>
<polyline points="{points}" fill="none" stroke="{COLOR}" stroke-width="2"/>{labels}</svg>"""
