"""Readers of parquet and arrow files: one document per row, the text in one column."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_tools.formats.detect import ARROW
from data_tools.formats.source import Source, Tally, texts_of_value
from data_tools.inputs.streams import COMPRESSED
from electra_ds.common.errors import UserError

BATCH_ROWS = 256
PAGE_BUFFER = 1 << 20  # bytes: pages instead of whole row groups in memory

Batches = Iterator[tuple[int, Any]]  # (offset in the file, pyarrow.RecordBatch)


def read_table(
    source: Source, content: BufferedReader, start: int, end: int, text_field: str, tally: Tally
) -> Iterator[str]:
    """Yield the column `text_field` of a table's rows.

    In parquet, the row groups that begin in bytes [start, end) are read; in arrow, the whole file.
    Raises UserError when the file is broken, compressed or in a tar, when it has no such column of
    text, and when pyarrow is not installed.
    """
    kind = source.format
    if not source.path or Path(source.name).suffix in COMPRESSED:
        raise UserError(
            f"{source.name}: {kind} compressed or in a tar cannot be read; unpack it, or leave it "
            "out"
        )
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{source.name}: reading {kind} needs pyarrow: pip install 'electra_ds[parquet]'"
        ) from None
    columns: list[str] = []
    try:
        if kind == "parquet":
            columns, batches = _parquet_batches(content, start, end, text_field)
        else:
            columns, batches = _arrow_batches(content)
        if text_field not in columns:
            raise KeyError
        for offset, batch in batches:
            column = batch.column(text_field).cast(pyarrow.large_binary())
            column.validate(full=True)  # offsets of a damaged file may point outside
            for value in column:
                tally.lines += 1
                yield from texts_of_value(value.as_py(), source, offset, text_field, tally)
    except (KeyError, pyarrow.ArrowNotImplementedError):
        raise UserError(
            f"{source.name}: no column {text_field!r} of text; expected --text-field to be one of "
            f"{', '.join(columns)}"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        if "://" in source.path:  # may be an error of the network
            raise
        raise UserError(
            f"{source.name}: broken ({' '.join(str(error).split())}); expected a whole {kind} "
            "file; copy it again or leave it out"
        ) from None


def _parquet_batches(
    content: BufferedReader, start: int, end: int, column: str
) -> tuple[list[str], Batches]:
    """Return (column names, batches of the row groups that begin in bytes [start, end))."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(content, buffer_size=PAGE_BUFFER)
    chunks = [table.metadata.row_group(group).column(0) for group in range(table.num_row_groups)]
    offsets = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    groups = [(group, offset) for group, offset in enumerate(offsets) if start <= offset < end]
    batches = (
        (offset, batch)
        for group, offset in groups
        for batch in table.iter_batches(BATCH_ROWS, [group], [column], use_threads=False)
    )
    return table.schema_arrow.names, batches


def _arrow_batches(content: BufferedReader) -> tuple[list[str], Batches]:
    """Return (column names, batches) of an arrow file or stream."""
    from pyarrow import ArrowInvalid, ipc

    if content.peek(len(ARROW[0])).startswith(ARROW[0]):
        table = ipc.open_file(content)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        content.seek(-8, os.SEEK_END)
        if content.read() != ARROW[1] + bytes(4):  # pyarrow accepts a stream without an end mark
            raise ArrowInvalid("the stream has no end mark")
        content.seek(0)
        table = batches = ipc.open_stream(content)
    return table.schema.names, ((content.tell(), batch) for batch in batches)
