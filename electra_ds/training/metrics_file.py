"""Schema, reader and one-line summaries of metrics.jsonl."""

import json
from pathlib import Path

from electra_ds.common.errors import UserError

SCHEMA = {"schema": "electra_ds metrics", "version": 1}
# Keys that depend on the machine's speed: left out where runs are compared bit for bit.
TIMED = frozenset({"tokens_per_second", "data_wait_share", "seconds", "checkpoint_pause_seconds"})
# What people read, as far as the run has it: parts are two blanks apart.
TRAIN = "mlm {mlm_loss:.3f}  disc {disc_loss:.4f}"
VALID = (
    "mlm {mlm_loss:.3f} (unigram {unigram_loss:.3f})  accuracy {mlm_accuracy:.3f}  replaced {replaced_fraction:.3f}  "
    "disc {disc_loss:.4f}  base rate {base_rate_loss:.4f}  AUC {disc_auc:.3f}  fixed-corruption AUC {fixed_auc:.3f}"
)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl without its schema line; a last line cut by a crash is left out."""
    lines, records = path.read_text(encoding="utf-8").splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path}: line {number} is not JSON; remove it") from None
    if records[:1] != [SCHEMA]:
        found = lines[0].strip() if lines else "an empty file"
        raise UserError(f"{path}: expected the schema line {SCHEMA}, found {found}")
    return records[1:]


def summary(values: dict[str, float], line: str = VALID) -> str:
    """The figures of VALID or TRAIN in one line; those that the kind of objective does not have are left out."""
    return "  ".join(
        part.format(**values)
        for part in line.split("  ")
        if part.split("{")[1].split(":")[0] in values
    )
