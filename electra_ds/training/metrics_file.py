"""metrics.jsonl: schema, reader, one-line summaries.

The first line names the schema; every other line is {"step", "split": "train" | "valid", metrics}.
"""

import re
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import parse_strictly, read_small
from electra_ds.common.printable import printable, shortened

SCHEMA = {"schema": "electra_ds metrics", "version": 1}
# Keys that depend on the speed of the machine. Bitwise comparisons of runs ignore them.
TIMED = frozenset({"tokens_per_second", "data_wait_share", "seconds", "checkpoint_pause_seconds"})
# Console lines. `summary` splits them at two blanks and drops the parts with an unknown metric.
TRAIN = "mlm {mlm_loss:.3f}  disc {disc_loss:.4f}"
VALID = (
    "mlm {mlm_loss:.3f} (unigram {unigram_loss:.3f})  accuracy {mlm_accuracy:.3f}  "
    "replaced {replaced_fraction:.3f}  disc {disc_loss:.4f}  base rate {base_rate_loss:.4f}  "
    "AUC {disc_auc:.3f}  fixed-corruption AUC {fixed_auc:.3f}"
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, without its schema line.

    A last line without a newline, left by a crash, is ignored. Raises FileNotFoundError when the
    file is missing, and UserError when a line is no record or the schema line differs.
    """
    records, problem = readable_metrics(path)
    if problem:
        raise UserError(problem)
    return records


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return (records before the first damaged line, description of the damage or "").

    Raises FileNotFoundError when the file is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there")
    shown = printable(path)
    try:
        *lines, _ = read_small(path, "the metrics of a run").split(b"\n")
        first = parse_strictly(lines[0]) if lines else None
    except UserError as error:
        return [], str(error)
    except ValueError as error:
        return [], f"{shown}: line 1 is not JSON ({error}); remove it"
    if first != SCHEMA:
        found = "no line" if first is None else shortened(first)
        return [], f"{shown}: expected the schema line {SCHEMA}, found {found}"
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            record = parse_strictly(line)
        except ValueError:
            return records, f"{shown}: line {number} is not JSON; remove it"
        if wrong := _wrong_part(record):
            return records, f"{shown}: line {number}: {wrong}; remove it"
        records.append(record)
    return records, ""


def _wrong_part(record: Any) -> str:
    """What is wrong with a parsed line, or ""."""
    if not isinstance(record, dict):
        return "expected a JSON object"
    step, split = record.get("step"), record.get("split")
    if type(step) is not int or not 0 <= step < 2**53:
        return f"step = {shortened(step)}, expected a number of steps"
    if split not in ("train", "valid"):
        return f"split = {shortened(split)}, expected train or valid"
    for key, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key != "split" and not (value is None or (is_number and abs(value) < 1e300)):
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
