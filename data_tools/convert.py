"""Conversion of the pretraining TFRecords of google-research/electra, row by row.

A record is a tf.train.Example of three int64 features of S numbers: input_ids ([CLS] A [SEP] or
[CLS] A [SEP] B [SEP], and padding), input_mask, segment_ids. It is handled as a document of the
lines A and B, so workers, resume, shuffle and splits are those of `prepare`.
Dimensions: S sequence.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.formats.source import Source, Tally
from data_tools.inputs.plan import make_plan, readable, unit_size
from data_tools.inputs.streams import open_input
from data_tools.pipeline.units import REMOVED, EncodedDocument, UnitTask, UnitWriter, finished_unit
from data_tools.pipeline.unknowns import Unknowns
from data_tools.prepare import prepare
from data_tools.workers import OnProgress
from electra_ds.common.decompression import content_of
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import Manifest, ids_dtype
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

MOST_TOKENS = 65_535  # of a row
MOST_BYTES = 1 << 24  # of a record: three numbers of at most 10 bytes for each token, and names
FEATURES = ("input_ids", "input_mask", "segment_ids")
# tf.train.Example as it is encoded in a file, where its map is a list of entries.
EXAMPLE = """
name: "example.proto"
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type_name: "Features" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "Entry" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type_name: "Feature" }
}
message_type {
  name: "Feature"
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type_name: "Int64List" }
}
message_type {
  name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
"""


class Record(NamedTuple):
    """The features of one record, [S] int64 each."""

    input_ids: np.ndarray
    input_mask: np.ndarray
    segment_ids: np.ndarray


def convert(
    inputs: Sequence[str], tokenizer: str | Path, out: str | Path, **options: Any
) -> Manifest:
    """Make a data folder with packing "google" from TFRecords and return its manifest.

    Every row is kept. Rows are shuffled by `seed` and held out by the hash of their ids. The
    provenance of a row is its file and the number of its record.

    inputs:    TFRecord files, folders, globs, URLs
    tokenizer: path of the vocabulary with which the rows were made
    options:   those of `prepare` except format, packing, sequence_length, deduplicate, read_unit
    Raises UserError, with file and record, for a damaged record, for ids that do not fit the
    vocabulary, and for a row with another length than the first one; also when there is no record,
    and when the extra [tfrecord] is not installed.
    """
    sources = make_plan(inputs, format="tfrecord").sources
    records = (record for source in sources for _, record in _read_records(source))
    first = next(records, None)
    if first is None:
        raise UserError(f"{', '.join(inputs)}: no record in {len(sources)} input file(s)")
    width = len(first.input_ids)
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


def _convert_unit(width: int, task: UnitTask, on_progress: OnProgress) -> dict:
    """Write a unit's files, as `tokenize_unit` does, from a file of rows of `width` ids."""
    if marker := finished_unit(task):
        on_progress(unit_size(task.unit))
        return marker
    tokenizer = load_tokenizer(task.tokenizer)
    special = tokenizer.special_ids
    (source,) = task.sources
    unknowns = Unknowns()
    reported = 0
    with UnitWriter(task) as writer:
        for number, (position, record) in enumerate(_read_records(source)):
            if problem := _problem(record, width, tokenizer):
                raise UserError(f"{source.name}: record {number}: {problem}")
            text = record.input_ids[1 : record.input_mask.sum()]  # A [SEP] B [SEP]
            first, second = struct.unpack("<QQ", blake2b(text.tobytes(), digest_size=16).digest())
            stored = text.astype(ids_dtype(tokenizer.vocab_size))
            tokens = int((text != special.sep).sum())
            writer.add(EncodedDocument(number, (first, second), stored, tokens))
            unknowns.total += int((text == special.unk).sum())
            on_progress(position - reported)
            reported = position
        return writer.close(dict.fromkeys(REMOVED, 0), Tally(), unknowns)


def _problem(record: Record, width: int, tokenizer: Tokenizer) -> str:
    """Describe what is wrong with a record; empty if nothing is."""
    lengths = [len(feature) for feature in record]
    if lengths != [width] * 3:
        return (
            f"{lengths} numbers in {', '.join(FEATURES)}; expected {width} in each, as in the "
            "first record"
        )
    ids = record.input_ids
    special = tokenizer.special_ids.model_dump()
    role_letters = {token: role[0].encode() for role, token in special.items()}
    # The ids as letters: t for text, else the first letter of pad, unk, cls, sep, mask.
    letters = b"".join(role_letters.get(i, b"t") for i in ids[record.input_mask != 0].tolist())
    in_vocabulary = ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    if not in_vocabulary or not re.fullmatch(b"c[tu]+s([tu]+s)?", letters):
        return (
            f"ids from {ids.min()} to {ids.max()}, in order {letters.decode()}; expected the order "
            "ctts ([CLS] A [SEP]) or cttsts ([CLS] A [SEP] B [SEP]), with the vocabulary of "
            f"{tokenizer.vocab_size} entries and {tokenizer.special_ids}; give the vocabulary with "
            "which the rows were made"
        )
    positions = np.arange(width)
    is_real = positions < len(letters)
    is_second = is_real & (positions > letters.index(b"s"))
    if (record.input_mask != is_real).any() or (record.segment_ids != is_second).any():
        return (
            "input_mask is not 1 exactly before the padding, or segment_ids are not 1 on B and its "
            "[SEP] only"
        )
    return ""


def _load_libraries() -> tuple[Any, Any]:
    """Return (module google_crc32c, an empty tf.train.Example).

    Raises UserError when the extra [tfrecord] is not installed.
    """
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
    example_type = message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
    return google_crc32c, example_type()


def _read_records(source: Source) -> Iterator[tuple[int, Record]]:
    """Yield (bytes read so far, record) for each record of a file."""
    google_crc32c, example = _load_libraries()
    number = 0

    def read_checked(content: BufferedReader, size: int) -> bytes:
        """Read bytes that are followed by their masked CRC-32C."""
        if size > MOST_BYTES:
            raise UserError(
                f"{source.name}: record {number}: {size:,} bytes; expected at most "
                f"{MOST_BYTES:,}, as {MOST_TOKENS:,} tokens need; copy the file again"
            )
        data = content.read(size + 4)
        crc = google_crc32c.value(data[:size])
        masked_crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if len(data) < size + 4 or data[size:] != struct.pack("<I", masked_crc):
            raise UserError(
                f"{source.name}: record {number}: damaged or cut short; copy the file again"
                f"{'' if number else ', if it is a TFRecord of google-research/electra'}"
            )
        return data[:size]

    with readable(source.name), open_input(source.path) as raw:
        content = content_of(raw, source.name)
        while content.peek(1):
            (size,) = struct.unpack("<Q", read_checked(content, 8))
            example.ParseFromString(read_checked(content, size))
            features = {
                entry.key: entry.value.int64_list.value for entry in example.features.feature
            }
            if missing := [name for name in FEATURES if name not in features]:
                raise UserError(
                    f"{source.name}: record {number}: no {', '.join(missing)} among "
                    f"{sorted(features)}; expected what build_pretraining_dataset.py of "
                    "google-research/electra writes"
                )
            yield raw.tell(), Record(*(np.array(features[name], np.int64) for name in FEATURES))
            number += 1
