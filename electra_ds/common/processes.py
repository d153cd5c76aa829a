"""Identity, restarts and ports of processes and hosts."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of restarts of this SLURM job (SLURM_RESTART_COUNT); 0 without SLURM.

    Raises UserError when the variable is not a number of at most 9 digits.
    """
    text = environ.get("SLURM_RESTART_COUNT") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(
            f"SLURM_RESTART_COUNT={shortened(text)}: expected the number of restarts, as SLURM "
            "sets it"
        )
    return int(text)


def free_port() -> int:
    """Return a TCP port that is free on this host at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def machine_id() -> str:
    """Return an id of this boot and process namespace, in which process numbers are unique.

    A host name is not such an id: several hosts may have the same name (localhost), and each
    container of a machine has its own process numbers. The id is empty if the system has none.
    """
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, as text; "" if it has ended.

    The system reuses process numbers, so number and start time together identify a process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name in parentheses may contain spaces and ")"
    return "" if fields[0] in "ZX" else fields[19]


def is_gone(process: Mapping[str, Any]) -> bool:
    """Return whether a process has ended. Returns False for a process of another machine.

    process: `machine` (`machine_id`), `pid` and `started` (`start_time`), as recorded by it.
    """
    is_here = bool(process.get("machine")) and process["machine"] == machine_id()
    return is_here and start_time(process["pid"]) != process["started"]
