"""Input files, counts of their lines, and the limits that all formats share."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from electra_ds.common.decompression import COMPRESSED, Expansion
from electra_ds.common.encodings import CONVERT
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened

LOCATIONS = 3  # most locations of bad lines that are kept for messages
LONGEST = 4 << 20  # about the bytes of the longest document; longer texts become several documents
NO_FIELD = "no field "  # beginning of the class of JSON lines without the text field
TO_THE_END = 1 << 62  # end of the range that covers a whole stream


class Source(NamedTuple):
    """One input file.

    format: text, text_file (the whole file is one document), wikitext, wiki, jsonl, parquet, arrow,
            tar, tar:FORMAT (members are read as FORMAT), docs, tfrecord, or dataset:N (shard N)
    """

    name: str  # relative to the input root, or a URL; the only name that the output contains
    path: str  # or URL; empty for a member of a tar
    size: int  # bytes on disk
    format: str
    digest: str  # of the first HEAD bytes
    depth: int = 0  # number of tars around a member
    archive: Expansion | None = None  # of the outermost tar, for a member

    @property
    def is_stream(self) -> bool:
        """Whether the file can only be read from its start."""
        return (
            self.format.startswith(("docs", "dataset", "arrow", "tar", "tfrecord"))
            or Path(self.name).suffix in COMPRESSED
        )


def as_text(name: str) -> str:
    """Return a file name as text: bytes that are not UTF-8, and control characters, as escapes."""
    with contextlib.suppress(UnicodeEncodeError):  # surrogates that stand for no byte
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return printable(name)


@dataclass
class Tally:
    """Line counts of the files that a reader has read."""

    lines: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # class -> unreadable lines
    locations: list[str] = field(default_factory=list)  # first bad lines: "file: byte n: class"

    def add_bad(self, kind: str, source: Source, offset: int, found: str = "") -> None:
        """Count a bad line and keep the location of the first ones.

        found: what the line has instead, for the first location with a line of this class
        """
        self.bad[kind] += 1
        if len(self.locations) < LOCATIONS:
            found = f" (found {found})" if found and self.bad[kind] == 1 else ""
            self.locations.append(f"{source.name}: byte {offset}: {kind}{found}")


def check_share(max_bad_fraction: float) -> None:
    """Raise UserError if a share is not from 0 to 1."""
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction = {max_bad_fraction}; expected a share from 0 to 1")


def check_bad_lines(tally: Tally, max_bad_fraction: float) -> None:
    """Raise UserError if more than this share of the lines could not be read."""
    bad = tally.bad.total()
    if bad <= max_bad_fraction * tally.lines:
        return
    advice = f"if they are in another encoding: {CONVERT}; " if tally.bad["not UTF-8"] else ""
    if any(kind.startswith(NO_FIELD) for kind in tally.bad):
        advice += "give the field of the text as --text-field; "
    raise UserError(
        f"{bad:,} of {tally.lines:,} lines cannot be read ({described(tally.bad)}); expected at "
        f"most the share {max_bad_fraction}; {advice}correct them or raise --max-bad-fraction; the "
        f"first: {'; '.join(tally.locations[:LOCATIONS])}"
    )


def described(bad: Counter[str]) -> str:
    """Return the counts of bad lines by class, as text."""
    return ", ".join(f"{kind}: {count:,}" for kind, count in sorted(bad.items()))


# A reader of one format: (source, content, start, end, text field, tally) -> the texts of the
# documents that start in bytes [start, end) of the content.
Reader = Callable[[Source, BufferedReader, int, int, str, Tally], Iterator[str]]


def texts_of_value(
    value: object, source: Source, offset: int, text_field: str, tally: Tally
) -> Iterator[str]:
    """Yield the text of a row's field, in parts of at most LONGEST characters.

    A value that is no text is counted as a bad line at `offset`, and nothing is yielded.
    """
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise TypeError
        text.encode()
    except UnicodeDecodeError:
        tally.add_bad("not UTF-8", source, offset)
    except UnicodeEncodeError:
        tally.add_bad("half a surrogate pair", source, offset)
    except TypeError:
        kind = "null" if value is None else type(value).__name__
        tally.add_bad(f"no text in field {shortened(text_field)} ({kind})", source, offset)
    else:
        for start in range(0, len(text) or 1, LONGEST):
            yield text[start : start + LONGEST]
