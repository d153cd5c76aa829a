"""The table of `detect`: tokens with their probabilities, beside those of an original text."""

import difflib
import math
from itertools import zip_longest

from rich.cells import cell_len

from electra_ds.common.printable import printable
from electra_ds.evaluation.detect import TokenScore

# Tokens that are aligned together. The time of an alignment grows with the square of its length or
# faster, so longer texts are aligned window by window.
WINDOW = 512
MARKS = ("<- replaced", "<- most suspicious")


def table(
    scores: list[TokenScore], threshold: float, original: list[TokenScore] | None = None
) -> list[str]:
    """Lines of a table for the terminal: a heading, a rule, one line for each token.

    scores: what a Detector returns. Tokens with a probability of at least `threshold` are marked as
    replaced; below it, the highest one is marked as most suspicious. The mark is beside the
    probability. original: scores of the text before a change; tokens are aligned by their spelling
    and shown in two more columns. A token of only one of the texts has a line with empty cells for
    the other text.
    """
    highest = max(score.probability for score in scores)

    def cells(score: TokenScore | None) -> list[str]:
        return [printable(score.token), f"{score.probability:.4f}"] if score else ["", ""]

    def mark(score: TokenScore | None) -> str:
        if score is None:
            return ""
        is_replaced = score.probability >= threshold
        return MARKS[0] if is_replaced else MARKS[1] if score.probability == highest else ""

    heading = ["token", "replaced", ""]
    if original is None:
        rows = [[*cells(score), mark(score)] for score in scores]
    else:
        heading += ["original", "replaced"]
        pairs = align(scores, original)
        rows = [[*cells(score), mark(score), *cells(other)] for score, other in pairs]
    return _lines(heading, rows)


def _lines(heading: list[str], rows: list[list[str]]) -> list[str]:
    """The columns side by side with two spaces between them; numbers are on the right."""
    widths = [max(map(cell_len, column)) for column in zip(heading, *rows, strict=True)]
    is_number = [name == "replaced" for name in heading]

    def line(cells: list[str]) -> str:
        parts = []
        for cell, width, right in zip(cells, widths, is_number, strict=True):
            gap = " " * (width - cell_len(cell))
            parts.append(gap + cell if right else cell + gap)
        return "  ".join(parts).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [line(heading), rule, *map(line, rows)]


def align(
    scores: list[TokenScore], original: list[TokenScore]
) -> list[tuple[TokenScore | None, TokenScore | None]]:
    """Pairs (token, token of the original text that corresponds to it), in the order of the texts.

    All tokens of both texts are in a pair. One side is None for a token of only one of the texts.
    """
    old, new = [score.token for score in original], [score.token for score in scores]
    aligned: list[tuple[TokenScore | None, TokenScore | None]] = []
    i = j = 0  # of original and of scores
    while i < len(old) and j < len(new):
        is_last = i + WINDOW >= len(old) and j + WINDOW >= len(new)
        blocks = _blocks(old[i : i + WINDOW], new[j : j + WINDOW], is_last)
        for old_start, old_end, new_start, new_end in blocks:
            aligned += zip_longest(
                scores[j + new_start : j + new_end], original[i + old_start : i + old_end]
            )
        _, i_end, _, j_end = blocks[-1]
        i, j = i + i_end, j + j_end
    return [*aligned, *zip_longest(scores[j:], original[i:])]


def _blocks(old: list[str], new: list[str], is_last: bool) -> list[tuple[int, int, int, int]]:
    """(start, end, start, end) of parts of two windows that correspond, in order.

    Unless the windows are the last ones, their ends may have their counterparts in later tokens, so
    the blocks end with the last equal part that begins in the first three quarters.
    """
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    codes = matcher.get_opcodes()
    if not is_last:
        limit = math.ceil(0.75 * min(len(old), len(new)))
        kept = [
            number
            for number, (tag, i, _, j, _) in enumerate(codes)
            if tag == "equal" and i < limit and j < limit
        ]
        if kept:
            codes = codes[: kept[-1] + 1]
    return [tuple(code[1:]) for code in codes]  # type: ignore[misc]
