"""The table of `detect`: tokens with their probabilities, beside those of an original text."""

import difflib
import math

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
    and shown in two more columns.
    """
    highest = max(score.probability for score in scores)
    heading = ["token", "replaced", ""]
    rows = []
    for score in scores:
        is_replaced = score.probability >= threshold
        mark = MARKS[0] if is_replaced else MARKS[1] if score.probability == highest else ""
        rows.append([printable(score.token), f"{score.probability:.4f}", mark])
    if original is not None:
        heading += ["original", "replaced"]
        for row, other in zip(rows, align(scores, original), strict=True):
            shown = [printable(other.token), f"{other.probability:.4f}"] if other else ["", ""]
            row += shown
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


def align(scores: list[TokenScore], original: list[TokenScore]) -> list[TokenScore | None]:
    """For each score the token of the original text that corresponds to it, or None."""
    old, new = [score.token for score in original], [score.token for score in scores]
    aligned: list[TokenScore | None] = [None] * len(new)
    i = j = 0  # of original and of scores
    while i < len(old) and j < len(new):
        is_last = i + WINDOW >= len(old) and j + WINDOW >= len(new)
        blocks = _blocks(old[i : i + WINDOW], new[j : j + WINDOW], is_last)
        for old_start, old_end, new_start, new_end in blocks:
            for offset in range(min(old_end - old_start, new_end - new_start)):
                aligned[j + new_start + offset] = original[i + old_start + offset]
        if is_last:
            break
        _, i_end, _, j_end = blocks[-1]
        i, j = i + i_end, j + j_end
    return aligned


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
