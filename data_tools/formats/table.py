"""Readers of parquet and arrow files: one document per row, the text in one column."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_tools.formats.detect import ARROW
from data_tools.formats.source import Source, Tally, texts_of_value
from electra_ds.common.arrow_sizes import DeclaredSizes
from electra_ds.common.decompression import COMPRESSED, check_expansion
from electra_ds.common.errors import UserError
from electra_ds.common.parquet_sizes import check_chunk
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import other_form
from electra_ds.common.urls import is_url

BATCH_ROWS = 256
BATCH_BYTES = 1 << 26  # most memory of a batch of parquet, unless one row needs more
TEXT_TYPES = {
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "null",
}
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
    try:
        if kind == "parquet":
            schema, batches = _parquet_batches(source.name, content, start, end, text_field)
        else:
            schema, batches = _arrow_batches(source.name, content)
        _check_column(source.name, schema, text_field)
        read = 0
        for offset, batch in batches:
            for value in _bytes_values(batch.column(text_field)):
                tally.lines += 1
                text = value.as_py()
                read += len(text or b"")
                if read > source.size:
                    check_expansion(source.name, source.size, read)
                yield from texts_of_value(text, source, offset, text_field, tally)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
        if is_url(source.path):  # may be an error of the network
            raise
        raise UserError(
            f"{source.name}: broken ({printable(' '.join(str(error).split()))}); expected a whole "
            f"{kind} file; copy it again or leave it out"
        ) from None


def _check_column(name: str, schema: Any, text_field: str) -> None:
    """Raise UserError when a table has no column of this name, or one without text."""
    texts = sorted({field.name for field in schema if _is_text(field.type)})
    expected = f"expected --text-field to be one of {', '.join(map(printable, texts)) or '(none)'}"
    found = schema.names.count(text_field)
    if found != 1:
        problem = f"{found} columns" if found else "no column"
        hint = other_form(text_field, schema.names)
        raise UserError(f"{name}: {problem} {shortened(text_field)} of text; {expected}{hint}")
    kind = schema.field(text_field).type
    if not _is_text(kind):
        raise UserError(
            f"{name}: the column {shortened(text_field)} holds values of type "
            f"{printable(str(kind))[:80]}, no text; {expected}"
        )


def _is_text(kind: Any) -> bool:
    """Whether a type of pyarrow is that of text, of bytes, or of missing values only."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in TEXT_TYPES


def _parquet_batches(
    name: str, content: BufferedReader, start: int, end: int, column: str
) -> tuple[Any, Batches]:
    """Return (schema, batches of the row groups that begin in bytes [start, end))."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(content, buffer_size=PAGE_BUFFER)
    groups = []
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        first = chunks[0].dictionary_page_offset or chunks[0].data_page_offset
        if start <= first < end:
            groups.append((number, first, [x for x in chunks if x.path_in_schema == column]))
    return table.schema_arrow, _group_batches(name, content, table, groups, column)


def _group_batches(
    name: str,
    content: BufferedReader,
    table: Any,
    groups: list[tuple[int, int, list[Any]]],
    column: str,
) -> Batches:
    """Yield the batches of row groups. groups: (number, offset, chunks of the column) of each."""
    for number, offset, chunks in groups:
        # Dictionaries and prefixes can repeat the whole chunk in every row.
        largest = max([1, *(check_chunk(name, content, chunk) for chunk in chunks)])
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // largest))
        for batch in table.iter_batches(rows, [number], [column], use_threads=False):
            yield offset, batch


def _arrow_batches(name: str, content: BufferedReader) -> tuple[Any, Batches]:
    """Return (schema, batches) of an arrow file or stream.

    Before a batch is read, UserError is raised if it would need too much memory.
    """
    from pyarrow import ArrowInvalid, ipc

    sizes = DeclaredSizes(name, content)
    if content.peek(len(ARROW[0])).startswith(ARROW[0]):
        positions = sizes.batches()
        table = ipc.open_file(content)
        return table.schema, _file_batches(table, content, sizes, positions)
    content.seek(-8, os.SEEK_END)
    if content.read() != ARROW[1] + bytes(4):  # pyarrow accepts a stream without an end mark
        raise ArrowInvalid("the stream has no end mark")
    content.seek(0)
    sizes.check_next()
    table = ipc.open_stream(content)
    return table.schema, _stream_batches(table, content, sizes)


def _file_batches(
    table: Any, content: BufferedReader, sizes: DeclaredSizes, positions: list[int]
) -> Batches:
    if len(positions) != table.num_record_batches:
        raise ValueError("its footer has other batches")
    for number, position in enumerate(positions):
        sizes.check_batch(position)
        batch = table.get_batch(number)
        yield content.tell(), batch


def _stream_batches(table: Any, content: BufferedReader, sizes: DeclaredSizes) -> Batches:
    while True:
        sizes.check_next()
        try:
            batch = table.read_next_batch()
        except StopIteration:
            return
        yield content.tell(), batch


def _bytes_values(column: Any) -> Any:
    """Return a column of text as an array of bytes, without a copy of its values.

    A copy could be much larger, since dictionaries and views can name a long value many times.
    Raises ArrowInvalid when an offset or an index points outside, as in damaged files.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        values = _without_encoding(column.dictionary)
        column = pyarrow.DictionaryArray.from_arrays(column.indices, values)
    else:
        column = _without_encoding(column)
    column.validate(full=True)
    return column


def _without_encoding(column: Any) -> Any:
    """Return an array of text as one of bytes, which need not be UTF-8; no copy."""
    import pyarrow

    kinds = {
        "string": pyarrow.binary(),
        "large_string": pyarrow.large_binary(),
        "string_view": pyarrow.binary_view(),
    }
    kind = str(column.type)
    return column.view(kinds[kind]) if kind in kinds else column
