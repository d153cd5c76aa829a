"""metrics.jsonl: schema, reader, one-line summaries.

The first line names the schema; every other line is {"step", "split": "train" | "valid",
metrics}. In a run with phases each of these also has {"phase": name}.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from electra_ds.common.errors import UserError
from electra_ds.common.files import open_regular
from electra_ds.common.json_files import parse_strictly
from electra_ds.common.printable import printable, shortened

SCHEMA = {"schema": "electra_ds metrics", "version": 1}
# A held-out evaluation of 10,000 sources, the most that a mixture has, is a line of 2^23 bytes.
MAX_LINE_BYTES = 1 << 26
# Keys that depend on the speed of the machine. Bitwise comparisons of runs ignore them.
TIMED = frozenset({"tokens_per_second", "data_wait_share", "seconds", "checkpoint_pause_seconds"})
# Console lines. `summary` splits them at two blanks and drops the parts with an unknown metric.
TRAIN = "mlm {mlm_loss:.3f}  disc {disc_loss:.4f}  gain {disc_gain:.4f}"
VALID = (
    "mlm {mlm_loss:.3f} (unigram {unigram_loss:.3f})  accuracy {mlm_accuracy:.3f}  "
    "replaced {replaced_fraction:.3f}  disc {disc_loss:.4f}  base rate {base_rate_loss:.4f}  "
    "gain {disc_gain:.4f}  AUC {disc_auc:.3f}  fixed-corruption AUC {fixed_auc:.3f}"
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, without its schema line.

    A last line without a newline, left by a crash, is ignored. Raises FileNotFoundError when the
    file is missing, and UserError when a line is no record or the schema line differs.
    """
    return [record for _, record in metric_lines(path)]


def metric_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line with its newline, record) of a metrics.jsonl, without its schema line.

    One line at a time is in memory: the log of a long run has no limit. Errors as `read_metrics`,
    after the records before the damage.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there")
    shown = printable(path)
    try:
        with open_regular(path) as file:
            _check_schema(_read_line(file, 1, shown), shown)
            number = 2
            while line := _read_line(file, number, shown):
                yield line, _record(line, f"{shown}: line {number}")
                number += 1
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder; expected the metrics of a run") from None
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be read ({error.strerror}); expected the metrics of a run"
        ) from None


def _read_line(file: BinaryIO, number: int, shown: str) -> bytes:
    """Return a line with its newline; nothing at the end, and for a line without a newline."""
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise UserError(f"{shown}: line {number} has more than {MAX_LINE_BYTES:,} bytes; remove it")
    return line if line.endswith(b"\n") else b""


def _check_schema(line: bytes, shown: str) -> None:
    try:
        first = parse_strictly(line) if line else None
    except ValueError as error:
        raise UserError(f"{shown}: line 1 is not JSON ({error}); remove it") from None
    if first != SCHEMA:
        found = "no line" if first is None else shortened(first)
        raise UserError(f"{shown}: expected the schema line {SCHEMA}, found {found}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_strictly(line)
    except ValueError:
        raise UserError(f"{where} is not JSON; remove it") from None
    if wrong := _wrong_part(record):
        raise UserError(f"{where}: {wrong}; remove it")
    return record


def _wrong_part(record: Any) -> str:
    """What is wrong with a parsed line, or ""."""
    if not isinstance(record, dict):
        return "expected a JSON object"
    step, split = record.get("step"), record.get("split")
    if type(step) is not int or not 0 <= step < 2**53:
        return f"step = {shortened(step)}, expected a number of steps"
    if split not in ("train", "valid"):
        return f"split = {shortened(split)}, expected train or valid"
    if not isinstance(record.get("phase", ""), str):
        return f"phase = {shortened(record['phase'])}, expected the name of a phase"
    for key, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in ("split", "phase") and not (
            value is None or (is_number and abs(value) < 1e300)
        ):
            return f"{shortened(key)} = {shortened(value)}, expected a number or null"
    return ""


def summary(values: dict[str, float], line: str = VALID) -> str:
    """Return the metrics of VALID or TRAIN as one line, without those that `values` lacks."""
    parts = []
    for part in line.split("  "):
        keys = re.findall(r"{(\w+):", part)
        if all(key in values for key in keys):
            parts.append(part.format(**values))
    return "  ".join(parts)
