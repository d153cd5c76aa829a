"""The log of a rank writes nothing to the console."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["watchdog", "stop_signals"])
def test_messages_before_the_log_file_is_open_are_not_printed(module: str) -> None:
    code = f"from electra_ds.cluster import {module}; {module}.LOG.error('rank 0 ends')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
