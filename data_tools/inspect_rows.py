"""What do packed rows say? Decoded text by piece, and where each piece comes from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.formats.corpus import Source, Tally, documents
from data_tools.inputs.plan import make_plan
from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json
from electra_ds.data.shard_format import SourcePlan
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer


def describe_rows(
    data_dir: str | Path,
    split: str,
    rows: Iterable[int],
    *,
    source: bool = False,
    inputs: Sequence[str] = (),
) -> Iterator[str]:
    """Lines for people: a head line per row, then each of its pieces decoded, in order.

    `source` adds where a piece comes from: the input files and byte ranges of its unit, the document's number in the
    unit, the piece's first token in the document; `inputs` how that document begins there (see `reread`).
    UserError: no such split or row, a damaged block.
    """
    reader, tokenizer = ShardReader(data_dir, split), load_tokenizer(Path(data_dir) / "tokenizer")
    pad, texts = (
        reader.manifest.tokenizer.special_ids.pad,
        reread(data_dir, inputs) if inputs else None,
    )
    for number in rows:
        if not 0 <= number < reader.rows:
            raise UserError(
                f"{data_dir}: row {number} asked, split {split} has rows 0 to {reader.rows - 1}"
            )
        block = int(np.searchsorted(reader.block_starts, number, side="right")) - 1
        inside = number - int(reader.block_starts[block])
        ids, pieces = reader.block(block)[inside], reader.fragments(block)
        pieces = pieces[pieces[:, 0] == inside]
        shard, number_there = reader.place(block)
        padding = int((ids == pad).sum())
        counts = f"{len(ids) - padding} tokens, {padding} padding, {len(pieces)} pieces"
        yield f"row {number} (shard {shard}, block {number_there}): {counts}"
        for _, start, length, unit, document, token in pieces[np.argsort(pieces[:, 1])].tolist():
            text = tokenizer.decode(ids[start : start + length].tolist())
            yield f"  [{start}:{start + length}] {text}"
            if source or inputs:
                yield f"    from {_unit(reader.manifest.source, unit)}: document {document}, token {token}"
            if inputs:
                found = next(islice(texts(unit), document, None))
                yield f"    which begins: {' '.join(found.split())[:100]}"


def reread(data_dir: str | Path, inputs: Sequence[str]) -> Callable[[int], Iterator[str]]:
    """unit -> its documents as they stand in the input, in order; `inputs` are those that `prepare` was given.

    UserError: they hold no file of a name that `prepare` read, or it is damaged.
    """
    settings = read_json(Path(data_dir) / "prepare.json", "the settings of `prepare`")
    field = settings["text_field"]
    paths = {
        source.name: source.path for source in make_plan(inputs, format="text").sources
    }  # each has its own there
    sources = [Source(name, paths.get(name, ""), *rest) for name, *rest in settings["files"]]
    if missing := [source.name for source in sources if not source.path]:
        raise UserError(
            f"{missing[0]}: not among the files of --input; expected the inputs that `prepare` was given"
        )

    def texts(unit: int) -> Iterator[str]:
        for file, start, end in settings["units"][unit]:
            yield from documents(
                sources[file],
                start,
                end,
                text_field=field,
                tally=Tally(),
                on_progress=lambda count: None,
            )

    return texts


def _unit(plan: SourcePlan, unit: int) -> str:
    """The files and byte ranges of a unit, the first three of them by name."""
    parts = [f"{plan.files[file]} bytes {start}-{end}" for file, start, end in plan.units[unit]]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return f"unit {unit} ({', '.join(parts[:3])}{more})"
