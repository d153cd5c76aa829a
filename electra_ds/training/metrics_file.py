"""metrics.jsonl: schema, reader, one-line summaries.

The first line names the schema; every other line is {"step", "split": "train" | "valid", metrics}.
"""

import json
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError

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
    file is missing, and UserError when a line is not JSON or the schema line differs.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number} is not JSON; remove it") from None
    if records[:1] != [SCHEMA]:
        found = lines[0].strip() if lines else "an empty file"
        raise UserError(f"{path}: expected the schema line {SCHEMA}, found {found}")
    return records[1:]


def summary(values: dict[str, float], line: str = VALID) -> str:
    """Return the metrics of VALID or TRAIN as one line, without those that `values` lacks."""
    parts = []
    for part in line.split("  "):
        first_key = part.split("{")[1].split(":")[0]
        if first_key in values:
            parts.append(part.format(**values))
    return "  ".join(parts)
