"""Position of a run in its data as a function of its attempts."""

from electra_ds.common.errors import UserError
from electra_ds.config.batch_sizes import BatchSizes
from electra_ds.training.state import TrainingState


def position_after(state: TrainingState, sizes: BatchSizes, attempts: int) -> int:
    """Return the position after `attempts` attempts of a run, of which `state` is a state.

    A run begins at position 0. A phase and a branch begin where the state says, and their own batch
    sizes apply from there on.
    """
    return state.first_position + sizes.rows_between(state.first_attempt, attempts)


def last_position(state: TrainingState, sizes: BatchSizes, total_steps: int) -> int:
    """Return the position after the last step, if no more steps are skipped."""
    return position_after(state, sizes, total_steps + state.skipped)


def check_position(where: str, state: TrainingState, sizes: BatchSizes) -> None:
    """Raise UserError when the position of a state is not that of its attempts.

    where: the file, for the message. sizes: of the run that wrote it.
    """
    begins = 0 <= state.first_attempt <= state.attempts
    expected = position_after(state, sizes, state.attempts) if begins else 0
    if not begins or state.consumed_rows != expected:
        first = f" after position {state.first_position:,}" if state.first_position else ""
        raise UserError(
            f"{where}: data.position = {state.consumed_rows:,}; expected {expected:,}, the rows of "
            f"{state.attempts - state.first_attempt:,} steps{first}; use an older checkpoint"
        )
