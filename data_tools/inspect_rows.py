"""Rows of a data folder as text, by document fragment, with the source of each fragment."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from data_tools.formats.documents import READERS, documents
from data_tools.formats.source import Source, Tally
from data_tools.inputs.plan import Segment, make_plan
from electra_ds.common.errors import UserError
from electra_ds.common.json_files import MAX_VALUES_OF_DATA, Record, read_record
from electra_ds.common.printable import printable, shortened
from electra_ds.data.data_tokenizer import load_data_tokenizer
from electra_ds.data.shard_format import Count, SourcePlan, read_manifest
from electra_ds.data.shard_reader import ShardReader

TITLE_CHARS = 100
FORMAT_NAME = f"^({'|'.join(READERS)}|docs|tfrecord|tar:[a-z_]+|dataset:[0-9]{{1,9}})$"
SHOWN_FILES = 3  # most files of a unit that a line names


class PrepareRecord(Record):
    """What is read from DATA/prepare.json."""

    model_config = ConfigDict(extra="ignore")

    files: tuple[tuple[str, Count, Annotated[str, Field(pattern=FORMAT_NAME)], str], ...]
    units: tuple[tuple[tuple[Count, Count, Count], ...], ...]
    text_field: str


class SourceDocument(NamedTuple):
    """A document as read from the input."""

    segment: Segment  # the byte range in which it starts
    number: int  # in that byte range, from 0
    text: str


def describe_rows(
    data_dir: str | Path,
    split: str,
    rows: Iterable[int],
    *,
    source: bool = False,
    inputs: Sequence[str] = (),
) -> Iterator[str]:
    """Yield lines of text: a head line for each row, then its document fragments in order.

    source: add the source of each fragment: input file, byte range, number of the document in it
            (from 0), first token of the fragment in the document (from 0)
    inputs: those of `prepare`; add the source and, as a title, the first words of the document
    Raises UserError when there is no such split or row, and for a damaged block.
    """
    reader = ShardReader(data_dir, split)
    tokenizer = load_data_tokenizer(data_dir, reader.manifest.tokenizer)
    plan = reader.manifest.source
    read_unit = source_reader(data_dir, inputs) if inputs else None
    for number in rows:
        if not 0 <= number < reader.rows:
            raise UserError(
                f"{printable(data_dir)}: no row {shortened(number)}, split {split} has rows 0 to "
                f"{reader.rows - 1}"
            )
        block = int(np.searchsorted(reader.block_starts, number, side="right")) - 1
        row_in_block = number - int(reader.block_starts[block])
        ids = reader.block(block)[row_in_block]
        fragments = reader.fragments(block)
        fragments = fragments[fragments[:, 0] == row_in_block]
        yield _head_line(reader, number, block, ids, len(fragments))
        by_start = np.argsort(fragments[:, 1])
        for _, start, length, unit, document, token in fragments[by_start].tolist():
            text = tokenizer.decode(ids[start : start + length].tolist())
            yield f"  [{start}:{start + length}] {text}"
            if unit >= len(plan.units):
                raise reader.block_error(
                    block, f"a fragment of unit {unit}, of {len(plan.units)} units"
                )
            if read_unit is not None:
                origin = next(islice(read_unit(unit), document, None), None)
                if origin is None:
                    raise UserError(
                        f"unit {unit} of the input has no document {document}; expected the inputs "
                        "that `prepare` was given, unchanged"
                    )
                location = f"{_segment(plan, origin.segment)}: document {origin.number}"
                yield f"    from {location}, token {token} (unit {unit})"
                yield f"    title: {' '.join(origin.text.split())[:TITLE_CHARS]}"
            elif source:
                yield f"    from {_location(plan, unit, document)}, token {token} (unit {unit})"


def _head_line(
    reader: ShardReader, number: int, block: int, ids: np.ndarray, fragments: int
) -> str:
    """Return the line that describes row `number`, with its ids [S]."""
    shard, block_in_shard = reader.shard_and_number(block)
    padding = int((ids == reader.manifest.tokenizer.special_ids.pad).sum())
    plural = "" if fragments == 1 else "s"
    return (
        f"row {number} (shard {shard}, block {block_in_shard}): {len(ids) - padding} tokens, "
        f"{padding} padding, {fragments} document fragment{plural}"
    )


def source_reader(
    data_dir: str | Path, inputs: Sequence[str]
) -> Callable[[int], Iterator[SourceDocument]]:
    """Return a function from the number of a unit to its documents in the input, in order.

    inputs: those that `prepare` was given
    Raises UserError when a file that `prepare` read is not among them; the function raises it when
    a file is damaged.
    """
    path = Path(data_dir) / "prepare.json"
    plan = read_manifest(data_dir).source
    settings = read_record(
        path, PrepareRecord, "the settings of `prepare`", max_values=MAX_VALUES_OF_DATA
    )
    if settings.units != plan.units or tuple(name for name, *_ in settings.files) != plan.files:
        raise UserError(
            f"{printable(path)}: other input files than in manifest.json; expected the file that "
            "`prepare` wrote into this folder"
        )
    # The format given here has no effect: the formats are read from prepare.json.
    paths = {source.name: source.path for source in make_plan(inputs, format="text").sources}
    sources = [
        Source(name, paths.get(name, ""), size, format, digest)
        for name, size, format, digest in settings.files
    ]
    if missing := [source.name for source in sources if not source.path]:
        raise UserError(
            f"{missing[0]}: not among the files of --input; give with --input the file or folder "
            "that `prepare` read under this name"
        )

    def read_unit(unit: int) -> Iterator[SourceDocument]:
        for file, start, end in settings.units[unit]:
            texts = documents(
                sources[file],
                start,
                end,
                text_field=settings.text_field,
                tally=Tally(),
                on_progress=lambda amount: None,
            )
            for number, text in enumerate(texts):
                yield SourceDocument((file, start, end), number, text)

    return read_unit


def _segment(plan: SourcePlan, segment: Segment) -> str:
    """Return a byte range with the name of its file."""
    file, start, end = segment
    return f"{plan.files[file]}, bytes {start}-{end}"


def _location(plan: SourcePlan, unit: int, document: int) -> str:
    """Return the byte ranges of a unit, the first SHOWN_FILES of them, and a document's number.

    In a unit of several small files, documents are numbered over all of them.
    """
    segments = [_segment(plan, segment) for segment in plan.units[unit]]
    if len(segments) == 1:
        return f"{segments[0]}: document {document}"
    hidden = len(segments) - SHOWN_FILES
    more = f"; {hidden} more files" if hidden > 0 else ""
    return f"{'; '.join(segments[:SHOWN_FILES])}{more}: document {document} of these files"
