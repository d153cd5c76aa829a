"""Stop signals and exit codes."""

import os
import signal
from collections.abc import Callable

from electra_ds.cluster.rank_log import LOG

DONE = 0  # exit codes; 2 is a user's mistake
FAILED = 1
STOPPED = 85


def on_stop_signal(note: Callable[[str], None]) -> None:
    """Make SIGTERM, SIGUSR1 and Ctrl-C call note(name) and nothing else.

    The ranks vote on the note at a later step: a save on one rank's signal alone would wait for the
    others. A second Ctrl-C interrupts at once.
    """

    def request_stop(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        note(name)
        LOG.info("%s: stop requested", name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, request_stop)


def stop_exit_code() -> int:
    """The exit code of a saved and stopped run: 85, which asks for a resume.

    Under torchrun it is 0, since torchrun restarts after any other code.
    """
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
