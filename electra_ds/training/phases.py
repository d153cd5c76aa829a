"""Phases of a run at training: steps, schedules, and the rows that each data has given.

A run without phases is one phase named "". The position of a phase in its data is the sum of the
rows of the earlier phases with the same data in the same order, so it follows from the state.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import Field

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, parse_record
from electra_ds.config.phases import PhaseConfig
from electra_ds.config.schema import OptimizerConfig, RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.loader import consumed_rows_from_state, data_state
from electra_ds.data.masking import MaskingRecipe
from electra_ds.data.rows import RowOrder, RowReader
from electra_ds.training.positions import check_position
from electra_ds.training.schedule import learning_rate
from electra_ds.training.state import TrainingState

# Advice of a message that is about the config of a phase: --set changes the run, not its phases.
SETTING = re.compile(r"--set ([\w.]+)=(\w+)")
IN_PHASE = r'"\1": \2 in the `set` of the phase'


@dataclass(frozen=True)
class TrainingData:
    """Training rows of a phase: source, reader, order and masking recipe."""

    source: Data
    reader: RowReader
    row_order: RowOrder
    recipe: MaskingRecipe

    def state(self) -> dict[str, Any]:
        """What a checkpoint and a run that resumes from it must share."""
        return data_state(self.reader, self.row_order)

    def order(self, config: RunConfig) -> dict[str, Any]:
        """What the row at each position depends on; equal for phases that continue each other.

        config: of the phase.
        """
        return order_of(self.state(), config)


class Span(NamedTuple):
    """The steps of one schedule, which may belong to several phases.

    options: with the fields of the schedule. first_step: steps applied before it. steps: of it.
    """

    options: OptimizerConfig
    first_step: int
    steps: int

    def rate(self, applied_steps: int) -> float:
        """The learning rate after so many steps of the run."""
        return learning_rate(self.options, applied_steps - self.first_step, self.steps)


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    index: its number from 0 on. name: "" in a run without phases. data_name: see `named_data`.
    config: of the phase, without phases. span: the schedule of its steps.
    first_step, end_step: steps of the run that are applied before it, and at its end.
    resets_moments: whether the moments are zero at its first step.
    """

    index: int
    name: str
    data_name: str
    config: RunConfig
    data: TrainingData
    span: Span
    first_step: int
    end_step: int
    resets_moments: bool = False

    @property
    def steps(self) -> int:
        """Number of its steps."""
        return self.end_step - self.first_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, padding included."""
        return self.config.train.global_batch_size * self.config.data.sequence_length


def order_of(state: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what the row at each position depends on: the order of streamed rows also on the batch.

    state: of the data and the order. config: of the run or phase that read the rows.
    """
    if not _is_streamed(state):
        return state
    return state | {"global_batch_size": config.train.global_batch_size}


def _is_streamed(state: Mapping[str, Any]) -> bool:
    """Whether the rows, or those of a source of a mixture, are streamed."""
    return state.get("kind") == "stream" or any(
        map(_is_streamed, state.get("sources", {}).values())
    )


def spans(
    runs: Sequence[RunConfig], phases: Sequence[PhaseConfig], steps: Sequence[int]
) -> list[Span]:
    """Return the schedule of each phase; phases that continue one have the same.

    runs: the config of each phase. phases: [] for a run without phases. steps: of each phase.
    """
    starts = [i for i in range(len(runs)) if i == 0 or phases[i].starts_schedule]
    found: list[Span] = []
    for start, end in zip(starts, [*starts[1:], len(runs)], strict=True):
        span = Span(runs[start].optimizer, sum(steps[:start]), sum(steps[start:end]))
        found += [span] * (end - start)
    return found


# ----------------------------------------------------------------------------------- data state


class _PhaseRecord(Record):
    """`phase` in the data state: the present phase.

    steps: of each phase of the run, by name.
    """

    name: str
    steps: dict[str, int]


class _EarlierPhase(Record):
    """One of `earlier` in the data state: a phase that has ended, its rows and their order.

    name: "" for rows of the parent of a branch.
    """

    name: str
    rows: int = Field(ge=0, lt=2**62)
    data: dict[str, Any]


class _DataState(Record):
    """The keys of the data state that a run with phases adds."""

    model_config = Record.model_config | {"extra": "ignore"}

    position: int = Field(ge=0, lt=2**62)
    phase: _PhaseRecord
    earlier: list[_EarlierPhase]


def current_index(state: TrainingState, phases: Sequence[Phase]) -> int:
    """The number of the phase that `state` is in, before the step after it."""
    if "phase" not in state.data:
        return 0
    name = state.data["phase"]["name"]
    return next(phase.index for phase in phases if phase.name == name)


def entered(state: TrainingState, phases: Sequence[Phase], index: int) -> TrainingState:
    """The state at the beginning of a phase: at the start of a run, or at the end of the phase before.

    The spike test starts anew, because another phase has another loss.
    """
    phase = phases[index]
    if not phase.name:
        return replace(state, data=phase.data.state() | {"position": 0})
    earlier = list(state.data.get("earlier", []))
    if index:
        before = phases[index - 1]
        rows = state.consumed_rows - state.first_position
        order = before.data.order(before.config)
        earlier.append({"name": before.name, "rows": rows, "data": order})
    state = replace(state, interval=[], recent_losses=[])
    if phase.resets_moments:
        state = replace(state, reset_step=state.step)
    return _begun(state, phases, index, earlier)


def branched(state: TrainingState, theirs: RunConfig, phases: Sequence[Phase]) -> TrainingState:
    """The state of a branch before its first step, in the phase to which that step belongs.

    state: of the checkpoint that the branch continues. theirs: the config of that checkpoint, of
    its phase if it has phases. The rows continue where rows of the same data in the same order have
    stopped, otherwise they start at position 0.
    """
    index = next(phase.index for phase in phases if state.step < phase.end_step)
    earlier = _consumed(state, theirs)
    for phase in phases[:index]:
        order = phase.data.order(phase.config)
        earlier.append({"name": phase.name, "rows": 0, "data": order})
    state = replace(state, interval=[])  # the first log line covers steps of the branch only
    return _begun(state, phases, index, earlier)


def _consumed(state: TrainingState, theirs: RunConfig) -> list[dict[str, Any]]:
    """The rows that a checkpoint has consumed, as entries of `earlier`; see `branched`."""
    own = ("position", "phase", "earlier")
    order = order_of({key: state.data[key] for key in state.data if key not in own}, theirs)
    # Of a run with phases, the rows before `first_position` belong to entries of `earlier`.
    begun = state.first_position if "phase" in state.data else 0
    rows = state.consumed_rows - begun
    earlier = [part for part in state.data.get("earlier", []) if part["rows"]]
    return [part | {"name": ""} for part in [*earlier, {"rows": rows, "data": order}]]


def _begun(
    state: TrainingState, phases: Sequence[Phase], index: int, earlier: list[dict[str, Any]]
) -> TrainingState:
    """The state with the position of a phase that begins, after the rows in `earlier`."""
    phase = phases[index]
    position = _rows_before(phase, earlier)
    data = phase.data.state() | {"position": position}
    if phase.name:
        record = {"name": phase.name, "steps": {part.name: part.steps for part in phases}}
        data |= {"phase": record, "earlier": earlier}
    return replace(state, data=data, first_attempt=state.attempts, first_position=position)


def check_resume(
    state: TrainingState, phases: Sequence[Phase], where: str, *, extends: bool = False
) -> None:
    """Compare the data state of a checkpoint with the phases and the data of this run.

    where: the file, for messages. extends: the last phase of the checkpoint may have another
    length, and there may be more phases.
    Raises UserError for other data, other steps of a phase, and a position that does not fit.
    """
    phase = phases[0]
    if phase.name:
        found = parse_record(state.data, where, _DataState, "the data state of a run with phases")
        phase = _checked_phase(state, found, phases, where, extends=extends)
    with naming(phase.name):
        consumed_rows_from_state(state.data, phase.data.reader, phase.data.row_order)
        check_position(where, state, phase.config.batch_sizes)
    if phase.name and not phase.first_step <= state.step <= phase.end_step:
        raise UserError(
            f"{where}: step {state.step:,} in the phase {phase.name}; expected one from "
            f"{phase.first_step:,} to {phase.end_step:,}; use an older checkpoint"
        )


def _checked_phase(
    state: TrainingState,
    found: _DataState,
    phases: Sequence[Phase],
    where: str,
    *,
    extends: bool,
) -> Phase:
    """The phase of a data state. UserError when the phases before it or their steps differ.

    found: the data state of `state`.
    """
    ended = [part for part in found.earlier if part.name]
    names = [*(part.name for part in ended), found.phase.name]
    own = [phase.name for phase in phases]
    if own[: len(names)] != names:
        raise UserError(
            f"{where}: has the phases {', '.join(names)}; expected {', '.join(own)}; use an older "
            "checkpoint"
        )
    for part, phase in zip(ended, phases, strict=False):
        if part.data != phase.data.order(phase.config):
            raise UserError(
                f"the phase {part.name} had other data (dataset_id "
                f"{part.data.get('dataset_id')!r}, now {phase.data.state()['dataset_id']!r}): pass "
                "the data of the checkpoint, or start from its weights with --init-from"
            )
    phase = phases[len(names) - 1]
    begun = _rows_before(phase, [part.model_dump() for part in found.earlier])
    if begun != state.first_position:
        raise UserError(
            f"{where}: first_position = {state.first_position:,} of the phase {phase.name}; "
            f"expected {begun:,}, the rows before it; use an older checkpoint"
        )
    _check_steps(found.phase.steps, phases, extends=extends)
    return phase


def _rows_before(phase: Phase, earlier: list[dict[str, Any]]) -> int:
    """The rows that earlier phases had of the data of a phase, in the same order."""
    own = phase.data.order(phase.config)
    return sum(part["rows"] for part in earlier if part["data"] == own)


def _check_steps(steps: Mapping[str, int], phases: Sequence[Phase], *, extends: bool) -> None:
    """UserError when a phase has other steps than in the checkpoint: with epochs, by other data."""
    fixed = list(steps)[:-1] if extends else list(steps)
    for phase in phases:
        if phase.name in fixed and phase.steps != steps[phase.name]:
            raise UserError(
                f"the phase {phase.name} had {steps[phase.name]:,} steps, now {phase.steps:,}, "
                "because its data has another number of rows: pass the data of the checkpoint"
            )


@contextlib.contextmanager
def naming(phase: str) -> Iterator[None]:
    """Begin the message of a UserError with the phase, which it advises on; "" changes nothing."""
    try:
        yield
    except UserError as error:
        if not phase:
            raise
        raise UserError(f"phase {phase}: {SETTING.sub(IN_PHASE, str(error))}") from None
