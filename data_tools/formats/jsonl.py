"""Reader of JSON lines: one object per line, the text in one of its fields."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from io import BufferedReader

from data_tools.formats.source import NO_FIELD, Source, Tally, texts_of_value
from data_tools.formats.text import read_lines
from electra_ds.common.json_files import check_count
from electra_ds.common.printable import shortened
from electra_ds.common.suggestions import other_form

FIELDS_SHOWN = 10  # names of fields in a message
LONGEST_LINE = 16 << 20  # bytes
# Objects, arrays, keys and values of a line. Each takes up to 100 bytes of memory, of 3 of text.
MOST_VALUES = 1 << 20


def read_jsonl(
    source: Source, content: BufferedReader, start: int, end: int, text_field: str, tally: Tally
) -> Iterator[str]:
    """Yield the field `text_field` of each line. Lines without it are counted as bad."""
    is_rest = False  # whether the line continues a line that is too long
    for offset, line in read_lines(content, start, LONGEST_LINE):
        was_rest, is_rest = is_rest, not line.endswith(b"\n")
        if was_rest:
            continue
        if offset >= end:
            return
        if not line.strip():
            continue
        tally.lines += 1
        if not _has_few_values(line):
            tally.add_bad(f"more than {MOST_VALUES:,} values", source, offset)
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number that is too long
            tally.add_bad(_error_class(line, error), source, offset)
            continue
        if not isinstance(record, dict):
            tally.add_bad("not a JSON object", source, offset)
        elif text_field not in record:
            hint = other_form(text_field, record)
            kind = f"{NO_FIELD}{shortened(text_field)}{hint}"
            tally.add_bad(kind, source, offset, _names(record))
        else:
            yield from texts_of_value(record[text_field], source, offset, text_field, tally)


def _names(record: dict) -> str:
    """Return the names of the first fields of an object."""
    shown = ", ".join(shortened(name, 40) for name in itertools.islice(record, FIELDS_SHOWN))
    return f"{shown or 'none'}{', ...' * (len(record) > FIELDS_SHOWN)}"


def _has_few_values(line: bytes) -> bool:
    """Return whether a line, which need not be JSON, has at most MOST_VALUES values."""
    if len(line) <= MOST_VALUES:  # a mark before each value
        return True
    try:
        # A byte of a longer UTF-8 character is no mark.
        check_count(line.decode("latin-1"), MOST_VALUES)
    except ValueError:
        return False
    return True


def _error_class(line: bytes, error: Exception) -> str:
    """Return the class of bad lines to which a line that is not JSON belongs."""
    if len(line) >= LONGEST_LINE:
        return f"longer than {LONGEST_LINE >> 20} MiB"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
