"""Detection of the format of an input file from its name and first bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from electra_ds.common.decompression import COMPRESSED
from electra_ds.common.encodings import wide_encoding
from electra_ds.common.errors import UserError

# First bytes of arrow files, and of arrow streams.
ARROW = (b"ARROW1\0\0", b"\xff\xff\xff\xff")
# The title of a WikiText article; ` = = Title = = ` is the title of a section.
WIKITEXT_TITLE = re.compile(rb"= (?!= ).*(?<! =) =")
# The first line of an array of objects, or of an object that continues on later lines.
_BEGINS_JSON = re.compile(rb"\s*(\[\s*(\{|$)|\{\s*$)")
_OBJECT = re.compile(rb"\{\s*(\"|\}\s*$)")  # other text with braces: wiki templates, LaTeX
_TABLES = (".csv", ".tsv")
_NOT_LINES = (".json", ".parquet", ".arrow", ".tar", ".zip")  # extensions of files without lines
_TAR_MAGIC = slice(257, 262)  # bytes of the first tar header
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# First bytes of files that are not text, and what they are.
SIGNATURES = {
    b"%PDF-": "a PDF; extract its text",
    b"PK\x03\x04": "a zip archive, as .docx and .epub are; unpack it or extract its text",
    b"\xd0\xcf\x11\xe0": "an Office document; extract its text",
    b"\x1f\x8b": "compressed by gzip; add .gz to its name",
    b"BZh": "compressed by bzip2; add .bz2 to its name",
    b"\xfd7zXZ\0": "compressed by xz; add .xz to its name",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; add .zst to its name",
}
# Byte order marks of other encodings than UTF-8. That of UTF-32 begins with that of UTF-16.


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
    if wanted != "tfrecord":
        _check_encoding(name, head)
    if wanted != "auto":
        return wanted
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            raise UserError(f"{name}: not text but {kind}, or leave the file out")
    return _detect_lines(name, head)


def _check_encoding(name: str, head: bytes) -> None:
    """Raise UserError when the first bytes are those of UTF-16 or UTF-32."""
    if encoding := wide_encoding(head):
        raise UserError(
            f"{name}: not text in UTF-8 but in {encoding}; convert it: iconv -f {encoding} -t UTF-8"
        )


def _check_table(name: str, suffix: str) -> None:
    """Raise UserError for a CSV or TSV file by its suffix."""
    if suffix in _TABLES:
        raise UserError(
            f"{name}: a table, which cannot be read; convert it to JSONL (one object per line) and "
            "give the column of the text as --text-field, for example with pandas: read_csv(FILE"
            + (", sep='\\t'" if suffix == ".tsv" else "")
            + ").to_json('x.jsonl', orient='records', lines=True, force_ascii=False); if it is "
            "plain text, set --format text; or leave the file out"
        )


def _check_json(name: str, first: bytes) -> None:
    """Raise UserError if the first line begins a JSON value that continues on later lines."""
    if begins := _BEGINS_JSON.match(first):
        what, advice = ("an array", ".[]") if begins[0][:1] == b"[" else ("an object", ".")
        raise UserError(
            f"{name}: the file is one JSON value, {what} over its lines; expected JSONL, one "
            f"object per line; convert it: jq -c '{advice}' FILE > x.jsonl"
        )


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
    suffix = plain.suffix.lower()
    _check_table(name, suffix)
    lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if suffix in (".json", ".jsonl", ".ndjson"):
        _check_json(name, first)
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
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
    if suffix in _NOT_LINES or b"\0" in first:
        nul = first.find(b"\0")
        reason = f" (byte {nul} of its first line is NUL)" if nul >= 0 else ""
        raise UserError(
            f"{name}: not text{reason}; expected plain text, WikiText, WikiExtractor output, JSONL "
            "(one object per line), parquet, arrow or a tar of text, also "
            f"{' '.join(COMPRESSED)}; convert it, leave it out, or set --format if it is text"
        )
    return "wikitext" if WIKITEXT_TITLE.fullmatch(first.strip()) else "text"
