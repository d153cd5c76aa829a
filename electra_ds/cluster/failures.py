"""Failures of a run: error files of the ranks, and their count over restarts.

A rank that ends by an error writes OUT/error-rank-N.json. OUT/restarts.json counts the failures.
"""

import contextlib
import json
import socket
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from electra_ds.common.errors import LockedOut, UserError
from electra_ds.common.json_files import read_json, write_json

ERRORS_KEPT = 10  # in restarts.json


@dataclass
class Failures:
    """Content of OUT/restarts.json. A requested stop and a UserError are not counted as failures.

    failures: number of failures of the run.
    in_a_row: number of failures since the last new checkpoint.
    step: step of that checkpoint; -1 before the first attempt.
    errors: the last ERRORS_KEPT errors, each with rank, host, time and error.
    """

    failures: int = 0
    in_a_row: int = 0
    step: int = -1
    errors: list[dict[str, Any]] = field(default_factory=list)

    def with_attempt(self, step: int, errors: list[dict[str, Any]]) -> "Failures":
        """Return the counts after an attempt.

        step: step of the latest checkpoint. errors: errors of the attempt, empty without a failure.
        """
        is_later = step > self.step
        in_a_row = 0 if is_later else self.in_a_row
        failed = 1 if errors else 0
        return Failures(
            self.failures + failed,
            in_a_row + failed,
            max(step, self.step),
            (self.errors + errors)[-ERRORS_KEPT:],
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
    facts = _described(rank, text, host) | {"failure": is_failure}
    with contextlib.suppress(OSError):
        (out / f"error-rank-{rank}.json").write_text(json.dumps(facts) + "\n")


def read_errors(out: Path) -> list[dict[str, Any]]:
    """Return the contents of OUT/error-rank-*.json, sorted by time."""
    errors = [_read_error(file) for file in sorted(out.glob("error-rank-*.json"))]
    return sorted(errors, key=lambda error: error.get("time", ""))


def count_failures(out: Path, step: int, limit: int, silent: str) -> None:
    """Move the error files of the last attempt into OUT/restarts.json. Called on rank 0.

    step: step of the latest checkpoint. A later step than in restarts.json resets the count.
    limit: largest number of failures in a row without a new checkpoint; 0: no limit.
    silent: the former owner of the lock, if it was taken over. If there are no error files, it is
        counted as a failure without a message.
    Raises UserError when the limit is exceeded.
    """
    path = out / "restarts.json"
    before = Failures()
    if path.exists():
        before = Failures(**read_json(path, "the failures of this run"))
    recorded = read_errors(out)
    failures = [error for error in recorded if error.pop("failure", True)]
    if silent and not recorded:
        failures = [_described(0, f"ended without a message: {silent}")]
    after = before.with_attempt(step, failures)
    if failures:
        write_json(path, vars(after))
    for file in out.glob("error-rank-*.json"):
        file.unlink()
    if limit and after.in_a_row > limit:
        last = after.errors[-1]
        raise UserError(
            f"{out} failed {after.in_a_row} times in a row at step {after.step} without a new "
            f"checkpoint (train.max_restarts = {limit}); the last time on rank {last['rank']}, "
            f"{last['host']}: {last['error']}. Correct the cause and remove {path}, or raise "
            "train.max_restarts"
        )


def _described(rank: int, error: str, host: str = "") -> dict[str, Any]:
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return {"rank": rank, "host": host or socket.gethostname(), "time": now, "error": error}


def _read_error(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError:  # cut short by a kill or a full disk
        return _described(int(file.stem.rpartition("-")[2]), f"{file.name} is cut short")
