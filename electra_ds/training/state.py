"""Training state: the progress of a run, stored in meta.json."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TrainingState:
    """Progress of a run, equal on every rank. The fields are keys of meta.json.

    step: applied optimizer steps.
    skipped: attempts without an applied update (fp16 overflow, bad losses).
    skipped_in_a_row: such attempts since the last applied step.
    tokens: real tokens of all attempts.
    data: state of the data order (kind, version, dataset_id, position = consumed rows, ...).
    interval: for each rank, the sums of losses and of steps since the last log line.
    recent_losses: the last accepted losses, for the spike test (`spike_guard`).
    first_attempt: attempts before the present phase, or before a branch (--branch-from); else 0.
    first_position: position in the data at which the present phase or the branch began; else 0.
    reset_step: applied steps when the moments were last zero, for their bias correction.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    interval: list[list[float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    first_attempt: int = 0
    first_position: int = 0
    reset_step: int = 0

    @property
    def attempts(self) -> int:
        """Number of applied and skipped steps."""
        return self.step + self.skipped

    @property
    def consumed_rows(self) -> int:
        """Training rows of all attempts."""
        return self.data.get("position", 0)

    def advanced(self, applied: bool, **changes: Any) -> "TrainingState":
        """Return the state after one more attempt: step + 1 if applied, otherwise skipped + 1.

        changes: new values of other fields, such as data and tokens.
        """
        if applied:
            changes |= {"step": self.step + 1, "skipped_in_a_row": 0}
        else:
            in_a_row = self.skipped_in_a_row + 1
            changes |= {"skipped": self.skipped + 1, "skipped_in_a_row": in_a_row}
        return replace(self, **changes)
