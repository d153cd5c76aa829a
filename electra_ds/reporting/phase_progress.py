"""Rate and remaining time of a run with phases: a step of one may be much longer than of another.

The time of a step is taken as proportional to its tokens, padding included.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from electra_ds.common.json_files import Record


class PhaseFacts(Record):
    """A phase in the provenance of OUT/config.json; other keys are ignored."""

    model_config = Record.model_config | {"extra": "ignore"}

    name: str
    steps: int = Field(ge=1, le=2**53)
    tokens_per_step: int = Field(ge=1, le=2**53)


class Progress(NamedTuple):
    """phase: of the next step, or the last one. tokens: with padding, so far and left."""

    phase: PhaseFacts
    tokens: float
    tokens_left: float


def progress_at(phases: Sequence[PhaseFacts], step: int) -> Progress:
    """The progress after `step` steps. phases: at least one."""
    first_step, done, left = 0, 0.0, 0.0
    present: PhaseFacts | None = None
    for phase in phases:
        in_phase = min(max(step - first_step, 0), phase.steps)
        done += float(in_phase) * phase.tokens_per_step
        left += float(phase.steps - in_phase) * phase.tokens_per_step
        if in_phase < phase.steps and present is None:
            present = phase
        first_step += phase.steps
    return Progress(present or phases[-1], done, left)
