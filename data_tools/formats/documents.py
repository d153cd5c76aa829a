"""Documents of one input file in any format, from any byte range.

A document belongs to the range in which its first line starts (for parquet: its row group), so
ranges that cut a file anywhere give each document exactly once. Lines that cannot be read are left
out and counted by class. A text longer than LONGEST becomes several documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from io import BufferedReader

from data_tools.formats.jsonl import read_jsonl
from data_tools.formats.source import TO_THE_END, Reader, Source, Tally, texts_of_value
from data_tools.formats.table import read_table
from data_tools.formats.tar import tar_reader
from data_tools.formats.text import read_text, read_wiki, read_wikitext
from data_tools.inputs import docstring_corpus, hub
from data_tools.inputs.streams import fingerprint, open_input
from electra_ds.common.decompression import content_of
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.redaction import without_secrets_of
from electra_ds.common.urls import is_url

PROGRESS_BYTES = 1 << 18  # least bytes between two calls of on_progress


def documents(
    source: Source,
    start: int,
    end: int,
    *,
    text_field: str,
    tally: Tally,
    on_progress: Callable[[int], None],
) -> Iterator[str]:
    """Yield the texts of the documents that start in bytes [start, end) of a file.

    text_field:  field of JSONL, column of a table, or text of webdataset samples
    tally:       counts the lines read
    on_progress: receives bytes read; the amounts add up to end - start
    Raises UserError with file and offset when a compressed file, a tar, a parquet or an arrow file
    is broken, and when a file has changed since it was planned; OSError when a remote file can no
    longer be read.
    """
    reported = start
    try:
        for position, text in _positioned_texts(source, start, end, text_field, tally):
            if min(position, end) - reported >= PROGRESS_BYTES:
                on_progress(min(position, end) - reported)
                reported = min(position, end)
            yield text
        on_progress(end - reported)
    except (UserError, OSError):
        raise
    except Exception as error:  # file systems and the library of datasets raise their own types
        if not is_url(source.path) and not source.format.startswith("dataset"):
            raise
        reason = printable(without_secrets_of(source.path, str(error))) or type(error).__name__
        raise OSError(f"{source.name}: {reason}") from error


def _positioned_texts(
    source: Source, start: int, end: int, text_field: str, tally: Tally
) -> Iterator[tuple[int, str]]:
    """Yield (about the bytes on disk read so far, text of a document)."""
    if source.format == "docs":
        yield from _docstrings(tally)
    elif source.format.startswith("dataset"):
        yield from _dataset_rows(source, text_field, tally)
    else:
        with open_input(source.path) as raw:
            _check_unchanged(source, raw, whole=start == 0)
            content = content_of(raw, source.name)
            content_end = TO_THE_END if source.is_stream else end
            for text in _read_format(source, content, start, content_end, text_field, tally):
                yield raw.tell(), text


def _docstrings(tally: Tally) -> Iterator[tuple[int, str]]:
    position = 0
    for _, size, text in docstring_corpus.documents():
        position += size
        tally.lines += text.count("\n")
        if text:
            yield position, text


def _dataset_rows(source: Source, text_field: str, tally: Tally) -> Iterator[tuple[int, str]]:
    """The position counts characters, since the library does not report bytes."""
    position = 0
    shard = int(source.format.partition(":")[2])
    for value in hub.read_shard(source.path, shard, text_field):
        tally.lines += 1
        for text in texts_of_value(value, source, position, text_field, tally):
            position += len(text)
            yield position, text


def _check_unchanged(source: Source, raw: BufferedReader, *, whole: bool) -> None:
    """Compare the size and, if `whole`, the first bytes of a file with the plan.

    The file is left at its start.
    """
    if whole:
        size, digest = fingerprint(raw)
    else:
        size, digest = raw.seek(0, os.SEEK_END), source.digest
    if (size, digest) != (source.size, source.digest):
        raise UserError(
            f"{source.name}: changed since the start: {size} bytes, {source.size} then, or "
            "other first bytes; expected files that do not change; give another --out"
        )
    raw.seek(0)


def _read_format(
    source: Source, content: BufferedReader, start: int, end: int, text_field: str, tally: Tally
) -> Iterator[str]:
    """Yield the documents of a file, or of a tar's member, by the reader of its format."""
    if source.format == "tfrecord":
        raise UserError(f"{source.name}: holds rows, not text; `electra-ds convert` reads it")
    reader = READERS[source.format.partition(":")[0]]
    yield from reader(source, content, start, end, text_field, tally)


READERS: dict[str, Reader] = {
    "text": read_text,
    "text_file": read_text,
    "wikitext": read_wikitext,
    "wiki": read_wiki,
    "jsonl": read_jsonl,
    "parquet": read_table,
    "arrow": read_table,
    "tar": tar_reader(_read_format),
}
