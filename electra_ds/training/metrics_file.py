"""metrics.jsonl: schema, reader, one-line summaries.

The first line names the schema; every other line is {"step", "split": "train" | "valid", metrics}.
"""

import json
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError

SCHEMA = {"schema": "electra_ds metrics", "version": 1}
# Keys that depend on the machine's speed: left out where runs are compared bit for bit.
TIMED = frozenset({"tokens_per_second", "data_wait_share", "seconds", "checkpoint_pause_seconds"})
# Parts of a line on the console, two blanks apart; those without a metric in the run are left out.
TRAIN = "mlm {mlm_loss:.3f}  disc {disc_loss:.4f}"
VALID = (
    "mlm {mlm_loss:.3f} (unigram {unigram_loss:.3f})  accuracy {mlm_accuracy:.3f}  "
    "replaced {replaced_fraction:.3f}  disc {disc_loss:.4f}  base rate {base_rate_loss:.4f}  "
    "AUC {disc_auc:.3f}  fixed-corruption AUC {fixed_auc:.3f}"
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without its schema line.

    A last line without its newline (a crash) is left out. UserError when a line is not JSON or the
    schema is another one.
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
    """The metrics of VALID or TRAIN in one line; those that are not in `values` are left out."""
    parts = []
    for part in line.split("  "):
        first_key = part.split("{")[1].split(":")[0]
        if first_key in values:
            parts.append(part.format(**values))
    return "  ".join(parts)
