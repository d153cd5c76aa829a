"""Phases of a run: the section of a phase, and the values of its config.

The config of a phase is that of the run with the values of `set`. It is a run config without phases
of its own. A phase that sets a field of the schedule starts a new schedule at its first step; the
other phases continue the schedule of the phase before them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from electra_ds.common.printable import printable, shortened
from electra_ds.common.section import Section, science
from electra_ds.common.suggestions import nearest

MAX_PHASES = 1000
NAME = "^[a-z0-9-]+$"  # of a phase, and of its data
SCHEDULE_FIELDS = (
    "peak_lr",
    "warmup_steps",
    "schedule",
    "final_lr_ratio",
    "decay_steps",
    "decay_shape",
)
# Fields of scope `machine` that a phase may set.
MACHINE_FIELDS = ("train.micro_batch_size", "train.eval_every")
THETAS = ("model.global_theta", "model.local_theta")
# The fields that a phase may set. All others are those of the run in every phase.
FIELDS = (
    "data.sequence_length",
    "train.global_batch_size",
    *MACHINE_FIELDS,
    "objective.mask_prob",
    "objective.masking",
    "objective.mask_token_prob",
    "objective.temperature",
    *(f"optimizer.{name}" for name in SCHEDULE_FIELDS),
    "optimizer.weight_decay",
    *THETAS,
)


class PhaseConfig(Section):
    """One phase of a run: its length, its data, and the values that it sets."""

    name: str = science(
        ...,
        "lower-case letters, digits and -; in messages and metrics",
        pattern=NAME,
        max_length=64,
    )
    steps: int | None = science(None, "optimizer steps; or give epochs", ge=1, le=10**9)
    epochs: float | None = science(
        None, "passes over the training rows of its data, instead of steps", gt=0, le=1e6
    )
    data: str | None = science(
        None, "NAME of --data NAME=D; null: its own name", pattern=NAME, max_length=64
    )
    moments: Literal["keep", "reset"] = science(
        "keep", "the optimizer's moments at its first step: of the phase before, or zero"
    )
    set: dict[str, Any] = Field(
        {},
        description="section.field -> value, for this phase only",
        json_schema_extra={"scope": "science"},
        max_length=len(FIELDS),
    )

    @field_validator("set")
    @classmethod
    def _fields_are_allowed(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in values:
            if key not in FIELDS:
                raise ValueError(
                    f"a phase cannot set {shortened(key)}{nearest(key, FIELDS)}; expected one of "
                    f"{', '.join(FIELDS)}"
                )
        return values

    @model_validator(mode="after")
    def _has_one_length(self) -> "PhaseConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps = {self.steps}, epochs = {self.epochs} in the phase {self.name}: give "
                "steps or epochs, exactly one"
            )
        return self

    @property
    def data_name(self) -> str:
        """The NAME of its --data NAME=D."""
        return self.data or self.name

    @property
    def starts_schedule(self) -> bool:
        """Whether it sets a field of the schedule."""
        return any(f"optimizer.{name}" in self.set for name in SCHEDULE_FIELDS)


def check_names(phases: Sequence[PhaseConfig]) -> None:
    """Raise ValueError for two phases with the same name."""
    names = [phase.name for phase in phases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"phases: {', '.join(twice)} is the name of more than one phase; expected a name of its "
            "own for each phase"
        )


def phase_values(
    values: dict[str, Any], phases: Sequence[PhaseConfig]
) -> Iterator[tuple[PhaseConfig, dict[str, Any]]]:
    """Yield each phase with the values of its config; they are not checked.

    values: of the run config, by section.
    """
    optimizer: dict[str, Any] = {}
    for index, phase in enumerate(phases):
        own = {key: dict(part) if isinstance(part, dict) else part for key, part in values.items()}
        own.pop("phases", None)
        own["provenance"] = None
        own["train"] |= {"total_steps": phase.steps, "epochs": phase.epochs}
        if index and not phase.starts_schedule:
            own["optimizer"] |= {name: optimizer[name] for name in SCHEDULE_FIELDS}
        for key, value in phase.set.items():
            section, _, field = key.partition(".")
            own[section][field] = value
        optimizer = own["optimizer"]
        yield phase, own


def phase_differences(
    before: Sequence[PhaseConfig], after: Sequence[PhaseConfig]
) -> tuple[list[str], list[str]]:
    """Return (differences of scope science, of scope machine) between the phases of two configs.

    Each is a text `phases.NAME.field: old -> new`. Phases after the last one that both have are
    `phases.NAME: not set -> ...`; other names or another order are one difference of the names.
    """
    science_lines: list[str] = []
    machine_lines: list[str] = []
    common = min(len(before), len(after))
    names = [[phase.name for phase in phases] for phases in (before, after)]
    has_none = bool(before) != bool(after)
    if has_none or names[0][:common] != names[1][:common]:
        shown = [", ".join(listed) or "none" for listed in names]
        return [f"phases: {shown[0]} -> {shown[1]}"], []
    for old, new in zip(before, after, strict=False):
        prefix = f"phases.{old.name}"
        for name in ("steps", "epochs", "data", "moments"):
            values = getattr(old, name), getattr(new, name)
            if values[0] != values[1]:
                science_lines.append(f"{prefix}.{name}: {values[0]} -> {values[1]}")
        for key in dict.fromkeys([*old.set, *new.set]):
            values = tuple(part.set.get(key, "not set") for part in (old, new))
            if values[0] != values[1]:
                lines = machine_lines if key in MACHINE_FIELDS else science_lines
                lines.append(f"{prefix}.set.{key}: {values[0]} -> {values[1]}")
    for phase in before[common:]:
        science_lines.append(f"phases.{phase.name}: {_shown(phase)} -> not set")
    for phase in after[common:]:
        science_lines.append(f"phases.{phase.name}: not set -> {_shown(phase)}")
    return [*map(printable, science_lines)], [*map(printable, machine_lines)]


def is_extension(difference: str, before: Sequence[PhaseConfig]) -> bool:
    """Whether a line of `phase_differences` only makes the run longer.

    Its last phase has another length, or there are more phases after it.
    """
    key, _, change = difference.partition(": ")
    last = f"phases.{before[-1].name}" if before else None
    names = {f"phases.{phase.name}" for phase in before}
    if last is not None and key in (f"{last}.steps", f"{last}.epochs"):
        return True
    return (
        bool(before)
        and key not in names
        and change.startswith("not set -> ")
        and (key.count(".") == 1)
    )


def _shown(phase: PhaseConfig) -> str:
    length = f"{phase.steps} steps" if phase.steps else f"{phase.epochs} epochs"
    values = ", ".join(f"{key} = {value}" for key, value in phase.set.items())
    return f"{length} ({values})" if values else length


def how_to_extend(phases: Sequence[Any]) -> str:
    """How a finished run becomes longer, for messages. phases: with names, may be empty."""
    if phases:
        return f"raise the length of the phase {phases[-1].name} or add phases"
    return "raise train.total_steps"
