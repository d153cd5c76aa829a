"""Strict JSON: parsing with limits, typed records, atomic writes.

A file that another program or person wrote may have any content. Therefore the parser limits size
and depth, and refuses NaN, infinities, duplicate keys and lone surrogates, which the JSON standard
forbids or does not define.

A file with known fields is read as a `Record`, which also checks types and values of the fields.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.files import open_regular, write_bytes
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import other_form_of_file

MAX_BYTES = 1 << 28  # of a JSON file; a manifest of 10^5 shards has about 2^24 bytes
# Objects, arrays, keys and values of a JSON text. A value of a few bytes of text takes up to 200
# bytes of memory.
MAX_VALUES = 1 << 22
MAX_VALUES_OF_DATA = 1 << 24  # of a manifest or prepare.json, which list all input files
MAX_DEPTH = 64  # of nested objects and arrays
MAX_DIGITS = 400  # of an integer; the largest float64 has 309
# Escape of a UTF-16 surrogate. A pair of surrogates is a character; a single one is an error.
PART = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{,:]', re.DOTALL)  # a string, or a mark before a value
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(BaseModel):
    """Base class of the typed content of a JSON file: frozen, without type conversions.

    Unknown keys are errors. A subclass for a file of another program sets `extra="ignore"`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically. Errors as in `write_bytes`.

    Letters of all scripts are written as they are. Raises ValueError for NaN and infinities.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as indented JSON with a final newline.

    Letters of all scripts are written as they are. Raises ValueError for NaN and infinities.
    """
    try:
        content = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # surrogates, in a name of a file that is not UTF-8
        content = json.dumps(value, indent=2, allow_nan=False).encode()
    return content + b"\n"


def read_json(
    path: str | Path,
    what: str,
    kinds: type | tuple[type, ...] = dict,
    max_values: int = MAX_VALUES,
) -> Any:
    """Read a JSON file and return its value.

    what: the expected content, for messages. kinds: accepted types of the value. max_values: see
    `parse_strictly`.
    Raises UserError, which names the path, when the file is missing, unreadable, not a regular
    file, too large, not valid JSON, or not one of `kinds`.
    """
    return parse_json(read_small(path, what), path, what, kinds, max_values=max_values)


def read_small(path: str | Path, what: str, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    what: the expected content, for messages. Raises UserError when the file is missing, unreadable,
    not a regular file, or too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UserError(
                    f"{printable(path)}: {size:,} bytes; expected {what} of at most {limit:,} bytes"
                )
            # read(n) allocates n bytes first, so n is the size of the file and not the limit.
            return file.read(min(limit, size) + 1)[:limit]
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{printable(path)}: not found; expected {what}{other_form_of_file(path)}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{printable(path)}: is a folder; expected {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(path)}: cannot be read ({reason}); expected {what}") from None


def parse_json(
    content: bytes,
    path: str | Path,
    what: str,
    kinds: type | tuple[type, ...] = dict,
    nan_as_null: bool = False,
    max_values: int = MAX_VALUES,
) -> Any:
    """Like `read_json`, for content that is in memory.

    path: a file or URL, for messages. nan_as_null, max_values: see `parse_strictly`.
    """
    try:
        value = parse_strictly(content, nan_as_null, max_values)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{printable(path)}: not valid JSON ({error}); expected {what}") from None
    if not isinstance(value, kinds):
        wanted = "a JSON object" if kinds is dict else "a JSON object or array"
        raise UserError(
            f"{printable(path)}: found a JSON {type(value).__name__}; expected {what}, {wanted}"
        )
    return value


def parse_strictly(
    content: bytes | str, nan_as_null: bool = False, max_values: int = MAX_VALUES
) -> Any:
    """Parse JSON within the limits of this module.

    nan_as_null: read NaN and infinities, which earlier versions wrote to some files, as null.
    max_values: largest number of objects, arrays, keys and values. It limits the memory.
    Raises ValueError, with a message of one line, when the content is not UTF-8, not JSON, nested
    too deeply or of too many values, and for an integer of too many digits, a number out of the
    range of float64, a duplicate key, and a lone surrogate.
    """
    text = content.decode() if isinstance(content, bytes) else content
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark; save it as UTF-8 without one")
    check_count(text, max_values)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_null_constant if nan_as_null else _refuse_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    may_have_surrogates = SURROGATE.search(text)
    for part, depth in _parts(value):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if may_have_surrogates and isinstance(part, str) and not _is_encodable(part):
            raise ValueError(f"{shortened(part)} has half of a surrogate pair")
    return value


def read_record(
    path: str | Path,
    kind: type[AnyRecord],
    what: str,
    nan_as_null: bool = False,
    max_values: int = MAX_VALUES,
) -> AnyRecord:
    """Read a JSON file as a record.

    what: the expected content, for messages. nan_as_null, max_values: see `parse_strictly`.
    Raises UserError as `read_json`, and for wrong fields, with key, value found and value expected.
    """
    content = read_small(path, what)
    value = parse_json(content, path, what, nan_as_null=nan_as_null, max_values=max_values)
    return parse_record(value, path, kind, what)


def parse_record(value: Any, path: str | Path, kind: type[AnyRecord], what: str = "") -> AnyRecord:
    """Return parsed JSON as a record. Arguments and UserError as in `read_record`."""
    try:
        # JSON has no tuples. In its JSON mode, pydantic converts arrays to tuples although strict.
        return kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        expected = f"; expected {what}" if what else ""
        raise UserError(f"{printable(path)}: {describe(error)}{expected}") from None


def set_aside(path: Path) -> str:
    """Rename a file or folder to NAME.damaged (NAME.damaged.2, ...).

    Used for files that a resume does not need, so that a damaged one does not prevent it.
    Returns the words "set aside as NAME.damaged", for messages. Raises OSError when the rename
    fails.
    """
    damaged, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(damaged):
        number += 1
        damaged = path.with_name(f"{path.name}.damaged.{number}")
    os.rename(path, damaged)
    return f"set aside as {printable(damaged)}"


def read_or_set_aside(path: Path, kind: type[AnyRecord], what: str) -> tuple[AnyRecord | None, str]:
    """Read a record that a resume does not need; a damaged file is renamed by `set_aside`.

    Returns (record, ""), (None, "") without a file, or (None, line that describes the damage).
    """
    if not os.path.lexists(path):
        return None, ""
    try:
        return read_record(path, kind, what), ""
    except UserError as error:
        return None, f"{error}; {set_aside(path)}"


def describe(error: ValidationError, most: int = 5) -> str:
    """Describe the wrong fields of a record in one line: key, value found, value expected.

    most: number of fields that are described.
    """
    problems = error.errors(include_url=False)
    lines = [_describe_field(dict(problem)) for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"and {len(problems) - most} more")
    return "; ".join(lines)


def _describe_field(problem: dict[str, Any]) -> str:
    key = printable(".".join(str(part) for part in problem["loc"])) or "the file"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{key} = {shortened(problem.get('input'))}: {message}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {shortened(twice)} occurs twice in one object")
    return value


def _null_constant(name: str) -> None:
    """Return None for NaN and infinities."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; expected at most {MAX_DIGITS}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shortened(digits)} is out of the range of float64")
    return value


def check_count(text: str, max_values: int) -> None:
    """Raise ValueError when a JSON text has more than `max_values` values, before it is parsed.

    A bracket, a comma or a colon outside of strings precedes each key and value.
    """
    if sum(map(text.count, "[{,:")) <= max_values:  # includes those in strings
        return
    count = 0
    for part in PART.finditer(text):
        count += text[part.start()] != '"'
        if count > max_values:
            raise ValueError(f"more than {max_values:,} values")


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield all objects, arrays, keys and values of parsed JSON, each with its depth."""
    stack: list[Iterator[Any]] = [iter([value])]
    while stack:
        for part in stack[-1]:
            yield part, len(stack) - 1
            if isinstance(part, dict):
                stack.append(chain.from_iterable(part.items()))
                break
            if isinstance(part, list):
                stack.append(iter(part))
                break
        else:
            stack.pop()


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
