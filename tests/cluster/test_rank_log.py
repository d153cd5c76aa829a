"""The log of a rank: nothing on the console, no traceback on a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["watchdog", "stop_signals"])
def test_messages_before_the_log_file_is_open_are_not_printed(module: str) -> None:
    code = f"from electra_ds.cluster import {module}; {module}.LOG.error('rank 0 ends')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.rank_log import open_log
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
open_log(Path(sys.argv[1]), Ranks(0, 1, 0, 1, "none"))
"""


def test_a_log_on_a_full_disk_causes_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "log" / "rank-0.log").read_text() == ""


# The watchdog finds the path of the log by its handler.
OPEN = """
import logging, sys
from pathlib import Path
from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.rank_log import LOG, open_log
open_log(Path(sys.argv[1]), Ranks(0, 1, 0, 1, "none"))
assert [Path(h.baseFilename).name for h in LOG.handlers if isinstance(h, logging.FileHandler)] == [
    "rank-0.log"
]
LOG.error("caf\u00e9")
"""


def test_a_log_is_continued_and_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank-0.log").symlink_to(tmp_path / "victim")
    for count in (1, 2):
        subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], check=True)
        text = (tmp_path / "log" / "rank-0.log").read_text(encoding="utf-8")
        assert text.count("rank 0 of 1") == text.count("caf\u00e9") == count
    assert (tmp_path / "victim").read_text() == "precious"
