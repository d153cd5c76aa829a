"""Lines about the phases of a run for the console, and facts about them for OUT/config.json."""

from collections.abc import Sequence
from typing import Any

from electra_ds.training.phases import Phase, Span


def begin_line(phase: Phase, count: int, world_size: int) -> str:
    """The line at the beginning of a phase. count: of the phases of the run."""
    train, length = phase.config.train, phase.config.data.sequence_length
    of_data = f" of {phase.data_name}" if phase.data_name else ""
    accumulation = phase.config.accumulation(world_size)
    reset = "; the moments start at zero" if phase.resets_moments else ""
    return (
        f"phase {phase.name} ({phase.index + 1} of {count}): steps {phase.first_step + 1:,} to "
        f"{phase.end_step:,}; a step is {train.global_batch_size:,} rows of {length:,} tokens"
        f"{of_data} ({accumulation} x {train.micro_batch_size} per rank); learning rate "
        f"{rates_text(phase.span, phase.first_step, phase.end_step - 1)}{reset}"
    )


def rates_text(schedule: Span, first: int, last: int) -> str:
    """The learning rates after `first` and `last` steps, and the largest one between them."""
    ends = [schedule.rate(step) for step in (first, last)]
    text = " to ".join(f"{rate:.4g}" for rate in ends)
    warm = schedule.first_step + schedule.options.warmup_steps  # the rates fall afterwards
    largest = schedule.rate(min(max(warm, first), last))
    return f"{text}, at most {largest:.4g}" if largest > max(ends) else text


def facts(phases: Sequence[Phase]) -> dict[str, Any]:
    """The entry `phases` of the provenance in OUT/config.json; nothing without phases."""
    if not phases[0].name:
        return {}
    return {
        "phases": [
            {
                "name": phase.name,
                "steps": phase.steps,
                "tokens_per_step": phase.tokens_per_step,
                "dataset_id": phase.data.reader.manifest.dataset_id,
            }
            for phase in phases
        ]
    }
