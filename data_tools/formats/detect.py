"""Detection of the format of an input file from its name and first bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from data_tools.inputs.streams import COMPRESSED
from electra_ds.common.errors import UserError

# First bytes of arrow files, and of arrow streams.
ARROW = (b"ARROW1\0\0", b"\xff\xff\xff\xff")
# The title of a WikiText article; ` = = Title = = ` is the title of a section.
WIKITEXT_TITLE = re.compile(rb"= (?!= ).*(?<! =) =")
_OBJECT = re.compile(rb"\{\s*(\"|\}\s*$)")  # other text with braces: wiki templates, LaTeX
_NOT_LINES = (".json", ".parquet", ".arrow", ".tar", ".zip")  # extensions of files without lines
_TAR_MAGIC = slice(257, 262)  # bytes of the first tar header
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def detect_format(name: str, head: bytes, wanted: str = "auto") -> str:
    """Return the format of a file (see Source) from its name and first bytes.

    wanted: the format that the user set. It is also the format of a tar's members; it does not
            change the format of parquet and arrow files.
    Raises UserError when the format is not supported.
    """
    if head[_TAR_MAGIC] == b"ustar":
        return "tar" if wanted == "auto" else f"tar:{wanted}"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(ARROW):
        return "arrow"
    if wanted == "webdataset":
        raise UserError(
            f"{name}: not a tar; --format webdataset expects tars only; prepare this file "
            "separately, and train on both data folders with --data MIX.json"
        )
    if wanted != "auto":
        return wanted
    return _detect_lines(name, head)


def _is_object(line: bytes) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _detect_lines(name: str, head: bytes) -> str:
    """Return the format of a file of lines: text, wikitext, wiki or jsonl."""
    plain = Path(name)
    while plain.suffix in COMPRESSED:
        plain = plain.with_suffix("")
    if plain.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if first.startswith((b"<doc ", b"<doc>")):
        return "wiki"
    if _OBJECT.match(first):
        is_cut = first is lines[-1]  # the line may continue after the head
        if is_cut or _is_object(first):
            return "jsonl"
        if first.rstrip().endswith(b"}"):
            raise UserError(
                f"{name}: its first line looks like a JSON object but is none; set --format jsonl "
                "if the file has one object per line, or --format text if it is plain text"
            )
    if plain.suffix in _NOT_LINES or b"\0" in first:
        nul = first.find(b"\0")
        reason = f" (byte {nul} of its first line is NUL)" if nul >= 0 else ""
        raise UserError(
            f"{name}: not text{reason}; expected plain text, WikiText, WikiExtractor output, JSONL "
            "(one object per line), parquet, arrow or a tar of text, also "
            f"{' '.join(COMPRESSED)}; convert it, leave it out, or set --format if it is text"
        )
    return "wikitext" if WIKITEXT_TITLE.fullmatch(first.strip()) else "text"
