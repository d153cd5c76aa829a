"""Facts about processes and hosts: identity, restarts, free ports."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """How often the scheduler restarted this job."""
    return int(environ.get("SLURM_RESTART_COUNT", "0"))


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def machine() -> str:
    """An id of this boot and process namespace, in which a process number is unique.

    Host names repeat (localhost), and containers of one machine do not see each other's processes.
    Empty if the system does not provide it.
    """
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process started, in clock ticks since the boot; empty if it has ended.

    Together with the number it identifies a process, since numbers are reused.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process has ended; False for one on another machine.

    process: `machine`, `pid` and `started` of the process when it ran.
    """
    is_here = bool(process.get("machine")) and process["machine"] == machine()
    return is_here and started(process["pid"]) != process["started"]
