"""How do the rows of others become ours? The authors' pretraining TFRecords, row by row as they are.

A record is a tf.train.Example of three int64 features of S numbers: input_ids, [CLS] A [SEP] or [CLS] A [SEP] B [SEP]
and padding; input_mask; segment_ids. It stands for a document of the lines A and B, so that workers, resume, shuffle
and splits are those of `prepare`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.corpus import Source, Tally
from data_tools.inputs.plan import make_plan, readable, unit_size
from data_tools.inputs.streams import content_of, open_input
from data_tools.pipeline.units import REMOVED, UnitTask, UnitWriter, finished, unit_paths
from data_tools.pipeline.unknowns import Unknowns
from data_tools.prepare import prepare
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import Manifest, ids_dtype
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

FEATURES = ("input_ids", "input_mask", "segment_ids")
EXAMPLE = """name: "example.proto"
message_type { name: "Example" field { name: "features" number: 1 label: LABEL_OPTIONAL type_name: "Features" } }
message_type { name: "Features" field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "Entry" } }
message_type { name: "Entry" field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
                             field { name: "value" number: 2 label: LABEL_OPTIONAL type_name: "Feature" } }
message_type { name: "Feature" field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type_name: "Int64List" } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""  # tf.train.Example as it stands in a file: its map is a list of entries


def convert(
    inputs: Sequence[str], tokenizer: str | Path, out: str | Path, **options: Any
) -> Manifest:
    """Make a data folder of packing "google" from TFRecords; returns its manifest.

    Every row is kept. Rows are shuffled by `seed` and held out by the hash of their ids; their provenance is file and
    record. inputs, options: as for `prepare`. Raises UserError, with file and record, for a record that is damaged, or
    no row of this vocabulary and of the first row's length.
    """
    sources = make_plan(inputs, format="tfrecord").sources
    width = next((len(ids) for source in sources for _, (ids, *_) in _rows(source)), None)
    if width is None:
        raise UserError(f"{', '.join(inputs)}: no record in {len(sources)} input file(s)")
    return prepare(
        inputs,
        tokenizer,
        out,
        format="tfrecord",
        packing="as_rows",
        sequence_length=width,
        deduplicate=False,
        read_unit=partial(_convert_unit, width),
        **options,
    )


def _convert_unit(width: int, task: UnitTask, on_progress: Callable[[int], None]) -> dict:
    """As `tokenize_unit`, of a file of rows of `width` ids."""
    if found := finished(unit_paths(task.folder, task.number)[2], task.plan_sha256):
        on_progress(unit_size(task.unit))
        return found
    tokenizer, (source,), told, unknowns = (
        load_tokenizer(task.tokenizer),
        task.sources,
        0,
        Unknowns(),
    )
    with UnitWriter(task, ids_dtype(tokenizer.vocab_size)) as writer:
        for number, (at, row) in enumerate(_rows(source)):
            if problem := _problem(row, width, tokenizer):
                raise UserError(f"{source.name}: record {number}: {problem}")
            own = row[0][1 : row[1].sum()]  # A [SEP] B [SEP]
            hashed = struct.unpack("<QQ", blake2b(own.tobytes(), digest_size=16).digest())
            writer.add(number, hashed, own, int((own != tokenizer.special_ids.sep).sum()))
            unknowns.found += int((own == tokenizer.special_ids.unk).sum())
            on_progress(at - told)
            told = at
        return writer.close(dict.fromkeys(REMOVED, 0), Tally(), unknowns)


def _problem(row: list[np.ndarray], width: int, tokenizer: Tokenizer) -> str:
    """What is wrong with a row, or nothing."""
    ids, mask, segments = row
    if (lengths := [len(part) for part in row]) != [width] * 3:
        return f"{lengths} numbers in {', '.join(FEATURES)}; expected {width}, as in the first record of all"
    roles = {i: role[0].encode() for role, i in tokenizer.special_ids.model_dump().items()}
    letters = b"".join(roles.get(i, b"t") for i in ids[mask != 0].tolist())
    if (
        ids.min() < 0
        or ids.max() >= tokenizer.vocab_size
        or not re.fullmatch(b"c[tu]+s([tu]+s)?", letters)
    ):
        return (
            f"ids from {ids.min()} to {ids.max()}, in order {letters.decode()}; expected [CLS] A [SEP] or [CLS] A "
            f"[SEP] B [SEP] (ctts, cttsts), and {tokenizer.special_ids} of {tokenizer.vocab_size} entries; give "
            f"the rows' own vocabulary"
        )
    places = np.arange(width)
    in_row, in_b = places < len(letters), (places > letters.index(b"s")) & (places < len(letters))
    if (mask != in_row).any() or (segments != in_b).any():
        return "input_mask is not 1 on all before the padding, or segment_ids are not 1 on B and its [SEP] alone"
    return ""


def _libraries() -> tuple[Any, Any]:
    """(google_crc32c, an empty tf.train.Example). UserError when the extra is not installed."""
    try:
        import google_crc32c
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    except ImportError as error:
        raise UserError(
            f"convert reads TFRecords with protobuf and google-crc32c ({error}): "
            "pip install 'electra_ds[tfrecord]'"
        ) from None
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return google_crc32c, message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))()


def _rows(source: Source) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(bytes read, the three features) of each record of a file."""
    google_crc32c, example = _libraries()
    number = 0

    def take(size: int) -> bytes:
        """The next bytes, which their masked CRC-32C follows."""
        data = content.read(size + 4)
        crc = google_crc32c.value(data[:size])
        if data[size:] != struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF):
            raise UserError(
                f"{source.name}: record {number}: damaged or cut short; copy the file again"
            )
        return data[:size]

    with readable(source.name), open_input(source.path) as raw:
        content = content_of(raw, source.name)
        while content.peek(1):
            example.ParseFromString(take(*struct.unpack("<Q", take(8))))
            found = {entry.key: entry.value.int64_list.value for entry in example.features.feature}
            if missing := [name for name in FEATURES if name not in found]:
                raise UserError(
                    f"{source.name}: record {number}: no {', '.join(missing)} among {sorted(found)}; "
                    f"expected what build_pretraining_dataset.py of google-research/electra writes"
                )
            yield raw.tell(), [np.array(found[name], np.int64) for name in FEATURES]
            number += 1
