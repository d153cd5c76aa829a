"""Another process that holds the lock of a run folder."""

import os
import subprocess
import sys
from pathlib import Path

from running import ROOT

HOLD = """
import sys, time
from pathlib import Path
from electra_ds.common.folder_lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(out: Path, **environ: str) -> subprocess.Popen:
    """Start a process that holds OUT, with a heartbeat every five seconds; returns once it does."""
    command = [sys.executable, "-c", HOLD, str(out)]
    environ = os.environ | environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process
