"""Stop signals and exit codes."""

import os
import signal
from collections.abc import Callable

from electra_ds.cluster.rank_log import LOG

DONE = 0  # exit codes; 2 is a UserError
FAILED = 1
STOPPED = 85


def on_stop_signal(note: Callable[[str], None]) -> None:
    """Make SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) call note(name).

    The handler does not save: all ranks must save together, so they vote at the next step.
    After the first of these signals Ctrl-C raises KeyboardInterrupt.
    """

    def request_stop(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        note(name)
        LOG.info("%s: stop requested", name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, request_stop)


def stop_exit_code() -> int:
    """Return the exit code of a saved and stopped run: 85, so that scripts resume it.

    Under torchrun it is 0, because torchrun restarts after any other code.
    """
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
