"""Failures of a run: error files of the ranks, and their count over restarts.

A rank that ends by an error writes OUT/error-rank-N.json. OUT/restarts.json counts the failures.
"""

import contextlib
import json
import re
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from electra_ds.common.errors import LockedOut, UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import (
    Record,
    read_or_set_aside,
    read_record,
    set_aside,
    write_json,
)
from electra_ds.common.printable import printable, printable_lines
from electra_ds.common.redaction import redacted

ERRORS_KEPT = 10  # in restarts.json
MAX_ERROR_CHARACTERS = 100_000
MAX_FAILURES = 2**53
ERROR_FILES = "error-rank-*.json"


class AttemptError(Record):
    """One entry of OUT/restarts.json, and with `failure` the content of OUT/error-rank-N.json."""

    model_config = Record.model_config | {"extra": "ignore"}

    rank: int = Field(ge=0, le=2**20)
    host: str = Field(default="", max_length=1000)
    time: str = Field(default="", max_length=100)
    error: str = Field(max_length=MAX_ERROR_CHARACTERS)
    failure: bool = True

    def facts(self) -> dict[str, Any]:
        """The entry as JSON values, without `failure`."""
        return self.model_dump(exclude={"failure"})


class Failures(Record):
    """Content of OUT/restarts.json. A requested stop and a UserError are not counted as failures.

    failures: number of failures of the run.
    in_a_row: number of failures since the last new checkpoint.
    step: step of that checkpoint; -1 before the first attempt.
    errors: the last ERRORS_KEPT errors, each with rank, host, time and error.
    """

    model_config = Record.model_config | {"extra": "ignore"}

    failures: int = Field(default=0, ge=0, le=MAX_FAILURES)
    in_a_row: int = Field(default=0, ge=0, le=MAX_FAILURES)
    step: int = Field(default=-1, ge=-1, le=2**53)
    errors: tuple[AttemptError, ...] = Field(default=(), max_length=1000)

    def with_attempt(self, step: int, errors: Sequence[AttemptError]) -> "Failures":
        """Return the counts after an attempt.

        step: step of the latest checkpoint. errors: errors of the attempt, empty without a failure.
        """
        is_later = step > self.step
        in_a_row = 0 if is_later else self.in_a_row
        failed = 1 if errors else 0
        return Failures(
            failures=min(self.failures + failed, MAX_FAILURES),
            in_a_row=min(in_a_row + failed, MAX_FAILURES),
            step=max(step, self.step),
            errors=(*self.errors, *errors)[-ERRORS_KEPT:],
        )


def record_error(out: Path, rank: int, error: BaseException | str, host: str = "") -> None:
    """Write OUT/error-rank-N.json for the next attempt. Never raises.

    Nothing is written for LockedOut, because the folder belongs to another job.
    error: the exception of the rank, or a description. host: host of the rank; by default this one.
    """
    if isinstance(error, LockedOut):
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    is_failure = not isinstance(error, UserError | KeyboardInterrupt)
    facts = described(rank, text, host).facts() | {"failure": is_failure}
    with contextlib.suppress(OSError):
        # json.dumps escapes all characters that are not ASCII. launch/common.sh relies on it.
        write_bytes(out / f"error-rank-{rank}.json", (json.dumps(facts) + "\n").encode())


def read_errors(out: Path) -> list[AttemptError]:
    """Return the contents of OUT/error-rank-*.json, sorted by time; damaged files are named."""
    errors = [_read_error(file)[0] for file in sorted(out.glob(ERROR_FILES))]
    return sorted(errors, key=lambda error: error.time)


def count_failures(out: Path, step: int, limit: int, silent: str) -> list[str]:
    """Move the error files of the last attempt into OUT/restarts.json. Called on rank 0.

    step: step of the latest checkpoint. A later step than in restarts.json resets the count.
    limit: largest number of failures in a row without a new checkpoint; 0: no limit.
    silent: the former owner of the lock, if it was taken over. If there are no error files, it is
        counted as a failure without a message.
    Returns a line for each damaged file, which is set aside.
    Raises UserError when the limit is exceeded.
    """
    path = out / "restarts.json"
    before, note = read_or_set_aside(path, Failures, "the failures of this run")
    notes = [note] if note else []
    recorded = read_errors(out)
    failures = [error for error in recorded if error.failure]
    if silent and not recorded:
        failures = [described(0, f"ended without a message: {silent}")]
    after = (before or Failures()).with_attempt(step, failures)
    if failures:
        entries = [error.facts() for error in after.errors]
        write_json(path, after.model_dump(exclude={"errors"}) | {"errors": entries})
    for file in sorted(out.glob(ERROR_FILES)):
        _, problem = _read_error(file)
        if problem:
            notes.append(f"{problem}; {set_aside(file)}")
        else:
            file.unlink()
    if limit and after.in_a_row > limit:
        last = after.errors[-1] if after.errors else described(0, "unknown")
        raise UserError(
            f"{printable(out)} failed {after.in_a_row} times in a row at step {after.step} without "
            f"a new checkpoint (train.max_restarts = {limit}); the last time on rank {last.rank}, "
            f"{printable(last.host)}: {printable_lines(last.error)}. Correct the cause and remove "
            f"{printable(path)}, or raise train.max_restarts"
        )
    return notes


def described(rank: int, error: str, host: str = "") -> AttemptError:
    """The error of a rank now, without control characters and without secrets of URLs."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    text = printable_lines(redacted(error)[:MAX_ERROR_CHARACTERS])[:MAX_ERROR_CHARACTERS]
    return AttemptError(rank=rank, host=host or socket.gethostname(), time=now, error=text)


def _read_error(file: Path) -> tuple[AttemptError, str]:
    """(the error of an error file, what is wrong with the file or "")."""
    try:
        return read_record(file, AttemptError, "the error of a rank"), ""
    except UserError as problem:  # cut short by a kill or a full disk
        number = file.stem.rpartition("-")[2]
        rank = int(number) if re.fullmatch("[0-9]{1,6}", number) else 0
        return described(rank, f"{file.name} is cut short or damaged"), str(problem)
