"""Training state: what a checkpoint holds beside tensors."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a run stands, the same on every rank, plus the sums of the open logging interval.

    step: applied optimizer steps. skipped: attempts that were not applied; the position counts both.
    tokens: real tokens of all attempts. data: the state of the rows (kind, version, dataset_id, position, ...).
    interval: per rank, what the next log line has summed so far (continued only at the same world size).
    recent_losses: what guard.Guard measures the next loss against.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    data: dict = field(default_factory=dict)
    interval: list[list[float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
