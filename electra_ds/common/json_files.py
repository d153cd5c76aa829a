"""Strict JSON: parsing with limits, typed records, atomic writes.

JSON files of this project and of others are read here. A file that another program or person wrote
may have any content, so the parser limits its size and depth, and refuses what the JSON standard
leaves undefined: NaN and infinities, duplicate keys, lone surrogates.

A file with known fields is read as a `Record`, which also limits the fields' types and values.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.printable import printable, shortened

MAX_BYTES = 1 << 28  # of a JSON file; a manifest of 10^5 shards has 2^24
MAX_DEPTH = 64  # of nested objects and arrays
MAX_DIGITS = 400  # of a number; the largest float64 has 309
# An escape of a UTF-16 surrogate. A pair of them is a character; `parse_strictly` finds single ones.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(BaseModel):
    """Base class of the typed content of a JSON file. Frozen; other types are not converted.

    Unknown keys are refused. A subclass for a file of another program sets `extra="ignore"`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline; atomic as `write_bytes`."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as indented JSON with a final newline."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: str | Path, what: str, kinds: type | tuple[type, ...] = dict) -> Any:
    """Read a JSON object, or another of `kinds`.

    what: the expected content, for messages.
    Raises UserError, which names the path, when the file is missing, unreadable, not a regular
    file, too large, not valid JSON, or not one of `kinds`.
    """
    return parse_json(read_small(path, what), path, what, kinds)


def read_small(path: str | Path, what: str, limit: int = MAX_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes. UserError as in `read_json`."""
    try:
        # Opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise UserError(f"{printable(path)}: is {kind}; expected {what}")
            if status.st_size > limit:
                raise UserError(
                    f"{printable(path)}: {status.st_size:,} bytes; expected {what} of at most "
                    f"{limit:,} bytes"
                )
            # The size is given, since read() asks for that much memory first.
            return file.read(min(limit, status.st_size) + 1)[:limit]
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{printable(path)}: not found; expected {what}") from None
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
) -> Any:
    """Like `read_json`, for content that was read already.

    path: a file or URL, for messages. nan_as_null: see `parse_strictly`.
    """
    try:
        value = parse_strictly(content, nan_as_null)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{printable(path)}: not valid JSON ({error}); expected {what}") from None
    if not isinstance(value, kinds):
        wanted = "a JSON object" if kinds is dict else "a JSON object or array"
        raise UserError(
            f"{printable(path)}: found a JSON {type(value).__name__}; expected {what}, {wanted}"
        )
    return value


def parse_strictly(content: bytes | str, nan_as_null: bool = False) -> Any:
    """Parse JSON within the limits of this module.

    nan_as_null: read NaN and infinities, which earlier versions wrote to some files, as null.
    ValueError, in one line, when the content is not UTF-8, not JSON, nested too deeply, or has a
    number that is too long or not finite, a duplicate key or a lone surrogate.
    """
    text = content.decode() if isinstance(content, bytes) else content
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark; save it as UTF-8 without one")
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
    path: str | Path, kind: type[AnyRecord], what: str, nan_as_null: bool = False
) -> AnyRecord:
    """Read a JSON file as a record.

    what: the expected content, for messages. nan_as_null: see `parse_strictly`.
    UserError names the path, and for each wrong field the key, the value and what is expected.
    """
    value = parse_json(read_small(path, what), path, what, nan_as_null=nan_as_null)
    return parse_record(value, path, kind, what)


def parse_record(value: Any, path: str | Path, kind: type[AnyRecord], what: str = "") -> AnyRecord:
    """Check parsed JSON against a record's fields. Arguments and UserError as in `read_record`."""
    try:
        # JSON has no tuples and no enumerations; the JSON mode of pydantic converts arrays.
        return kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        expected = f"; expected {what}" if what else ""
        raise UserError(f"{printable(path)}: {describe(error)}{expected}") from None


def set_aside(path: Path) -> str:
    """Rename a file or folder to NAME.damaged (NAME.damaged.2, ...), and return the new name.

    For files that only tell of the past: damaged, they must not keep a run from resuming.
    Raises OSError when the rename fails.
    """
    damaged, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(damaged):
        number += 1
        damaged = path.with_name(f"{path.name}.damaged.{number}")
    os.rename(path, damaged)
    return f"set aside as {printable(damaged)}"


def read_or_set_aside(path: Path, kind: type[AnyRecord], what: str) -> tuple[AnyRecord | None, str]:
    """Read a record that only tells of the past; a damaged file is set aside.

    Returns (record, ""), (None, "") without a file, or (None, line that says what was damaged).
    """
    if not os.path.lexists(path):
        return None, ""
    try:
        return read_record(path, kind, what), ""
    except UserError as error:
        return None, f"{error}; {set_aside(path)}"


def describe(error: ValidationError, most: int = 5) -> str:
    """The wrong fields of a record, one line: key, value found, value expected."""
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
    """The value of NaN and of infinities where they are allowed."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shortened(digits)} is out of the range of float64")
    return value


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """All objects, arrays, keys and values of parsed JSON, each with its depth."""
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        yield part, depth
        if isinstance(part, dict):
            stack.extend((item, depth + 1) for pair in part.items() for item in pair)
        elif isinstance(part, list):
            stack.extend((item, depth + 1) for item in part)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
