"""Log file of a rank: OUT/log/rank-N.log."""

import faulthandler
import io
import logging
import os
import signal
import socket
from pathlib import Path

from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.provenance import package_version
from electra_ds.common.own_folder import open_to_append, own_folder
from electra_ds.common.processes import restart_count

LOG = logging.getLogger("electra_ds")
LOG.setLevel(logging.INFO)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())  # without a handler early messages would go to stderr


class _QuietFileHandler(logging.FileHandler):
    def _open(self) -> io.TextIOWrapper:
        """Open the file. A link or a FIFO at its path is set aside."""
        file = io.BufferedWriter(open_to_append(Path(self.baseFilename)))
        return io.TextIOWrapper(file, "utf-8", write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors: a full disk is reported by the next checkpoint, not for each line."""


def open_log(out: Path, ranks: Ranks) -> None:
    """Open OUT/log/rank-N.log for the messages of this rank.

    It gets the start, stop signals, errors with their traceback, the first failure, and the stacks
    of all threads on SIGUSR2 and on a crash. Raises OSError when the file cannot be opened, UserError
    when OUT/log is a link out of OUT.
    """
    path = own_folder(out, "log") / f"rank-{ranks.rank}.log"
    handler = _QuietFileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for old in LOG.handlers[:]:
        LOG.removeHandler(old)
        old.close()
    LOG.addHandler(handler)
    assert handler.stream is not None  # opened by the constructor
    faulthandler.enable(handler.stream)
    faulthandler.register(signal.SIGUSR2, handler.stream)
    place = f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}"
    versions = ", ".join(f"{name} {package_version(name)}" for name in ("torch", "deepspeed"))
    LOG.info("%s, process %d, restart %d, %s", place, os.getpid(), restart_count(), versions)
