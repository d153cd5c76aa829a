"""The phases of a run in `check`: the table, the length of the run, and the largest memory."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from electra_ds.common.printable import printable
from electra_ds.config.phases import PhaseConfig
from electra_ds.config.schema import RunConfig
from electra_ds.data.masking import max_masked_positions
from electra_ds.reporting.memory import Memory, memory
from electra_ds.training.phase_texts import rates_text
from electra_ds.training.phases import Phase, Span, naming


class PhaseLine(NamedTuple):
    """One phase as text; empty where it depends on data that was not given.

    step: rows x tokens of a step, and micro-batches x rows of a rank. chosen: masked positions of a
    full row. rates: learning rate at its first and last step, and the largest. data: the name, and
    passes over its rows.
    """

    phase: str
    steps: str
    step: str
    chosen: str
    tokens: str
    rates: str
    data: str


def steps_of(runs: Sequence[RunConfig], planned: Sequence[Phase]) -> list[int]:
    """The steps of each phase; empty if one depends on data that was not given.

    runs: the config of each phase. planned: with data, the phases of the plan.
    """
    if planned:
        return [phase.steps for phase in planned]
    if any(run.train.total_steps is None for run in runs):
        return []
    return [run.total_steps(None) for run in runs]


def phase_lines(
    phases: Sequence[PhaseConfig],
    runs: Sequence[RunConfig],
    of_phases: Sequence[Span],
    planned: Sequence[Phase],
    world_size: int,
) -> Iterator[PhaseLine]:
    """Yield the line of each phase.

    runs, planned: as for `steps_of`. of_phases: the schedule of each phase, empty without steps.
    """
    steps = steps_of(runs, planned)
    first_step = 0
    for index, (phase, run) in enumerate(zip(phases, runs, strict=True)):
        with naming(phase.name):
            accumulation = run.accumulation(world_size)
        rows, length = run.train.global_batch_size, run.data.sequence_length
        own = run.train.total_steps if not steps else steps[index]
        rates = epochs = ""
        if steps:
            rates = rates_text(of_phases[index], first_step, first_step + steps[index] - 1)
            first_step += steps[index]
        if planned:
            passes = planned[index].steps * rows / planned[index].data.reader.rows
            epochs = f", {passes:.3f} epochs"
        data_name = planned[index].data_name if planned else phase.data_name
        yield PhaseLine(
            phase.name,
            f"{own:,}" if own else f"{phase.epochs:g} epochs",
            f"{rows:,} x {length:,} ({accumulation} x {run.train.micro_batch_size})",
            str(max_masked_positions(run.objective.mask_prob, length)),
            f"{own * rows * length:,}" if own else "",
            rates,
            printable(f"{data_name or 'one for all'}{epochs}"),
        )


def largest_memory(
    runs: Sequence[RunConfig], world_size: int
) -> tuple[int, dict[tuple[int, str], Memory]]:
    """Return the number of the phase with the largest peak, and its memory as `memory` gives it.

    Of equal phases it is the first one. Phases of the same size are counted once.
    """
    sizes: dict[tuple[int, int, float, int], int] = {}
    for index, run in enumerate(runs):
        train = run.train
        key = (
            train.micro_batch_size,
            run.data.sequence_length,
            run.objective.mask_prob,
            run.accumulation(world_size),
        )
        sizes.setdefault(key, index)
    found = {index: memory(runs[index], world_size) for index in sizes.values()}
    largest = max(found, key=lambda index: max(need.peak for need in found[index].values()))
    return largest, found[largest]
