"""Facts about processes and hosts: identity, restarts, free ports."""

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path


def restart_count(environ: MutableMapping[str, str] = os.environ) -> int:
    """How often the scheduler restarted this job."""
    return int(environ.get("SLURM_RESTART_COUNT", "0"))


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def machine() -> str:
    """This boot and process space, where a pid means something; empty where the system does not say.

    Host names repeat (localhost), and containers of one machine do not see each other's processes.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When process `pid` started, in ticks since the boot; empty when it is gone. Numbers of processes come again."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        )  # the name before may hold anything
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_gone(process: dict) -> bool:
    """Whether a process, told by `machine`, `pid` and `started`, has ended; False of one on another machine."""
    here = bool(process.get("machine")) and process["machine"] == machine()
    return here and started(process["pid"]) != process["started"]
