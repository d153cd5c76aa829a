"""Virtual machines on this one: each has a network, host name, process space, /dev/shm, /run and sshd of its own.

File systems are shared, as on a cluster. `head` is the machine that others are started from, and the switch that all
cables lead to. Needs root; nothing of this machine changes, and all ends with the process that made it.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NETWORK = "10.77.0"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh-keygen")
INIT = """
set -e
hostname {name}
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
until ip link set eth0 up 2> /dev/null; do sleep 0.02; done # until its cable is there
ip addr add {address}/24 dev eth0
exec $(command -v sshd) -D -f {folder}/sshd_config -E {folder}/{name}.sshd.log # reaps what others leave, as init does
"""
SSHD_CONFIG = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
"""
SSH_CONFIG = """
IdentityFile {folder}/id
IdentitiesOnly yes
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 5
"""


def missing() -> str:
    """What keeps machines from being made here; empty where nothing does."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here (apt-get install iproute2 util-linux openssh-server)"
    make = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    made = os.getuid() == 0 and subprocess.run(make, capture_output=True).returncode == 0
    return "" if made else "virtual machines need root and the right to make namespaces"


class Machines:
    """`head` and `node1`, `node2`, ... while they are up."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(nodes)]
        self._booted: dict[str, subprocess.Popen] = {}
        self._address = {
            name: f"{NETWORK}.{10 + i}" for i, name in enumerate(["head", *self.nodes])
        }
        for name in ("id", "host"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        hosts = [f"{address} {name}" for name, address in self._address.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        try:
            for name in self._address:
                self.boot(name)
        except BaseException:
            self.down()
            raise

    def boot(self, name: str) -> None:
        """Switch a machine on, and wait until it takes ssh."""
        init = INIT.format(name=name, folder=self.folder, address=self._address[name])
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
        with (self.folder / f"{name}.log").open(
            "w"
        ) as log:  # setpriv: it goes when we go, however that is
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", "-c", init]
            self._booted[name] = subprocess.Popen(
                command,
                env=os.environ | {"PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(
            lambda: self._init(name) and self._hostname(name) == name, f"{name} does not start"
        )
        if name == "head":
            self.run("head", "ip", "link", "add", "eth0", "type", "bridge")
        else:  # the same hardware address after a reboot, which others remember
            subprocess.run([*self.on("head"), "ip", "link", "del", name], capture_output=True)
            mac = "02:00:00:00:00:{:02x}".format(int(self._address[name].rpartition(".")[2]))
            cable = [
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "address",
                mac,
                "netns",
                str(self._init(name)),
            ]
            switch = ["nsenter", "-t", str(self._init("head")), "--net"]
            subprocess.run([*switch, "ip", "link", "add", name, *cable], check=True)
            self.run("head", "ip", "link", "set", name, "master", "eth0", "up")
        enter = [*self.on("head"), "ssh", name, "true"]
        wait_until(
            lambda: subprocess.run(enter, capture_output=True).returncode == 0,
            f"{name} takes no ssh",
        )

    def _init(self, name: str) -> int:
        """The number here of a machine's first process; 0: not yet."""
        unshare = self._booted[name].pid
        return int(
            (Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split() or ["0"])[0]
        )

    def _hostname(self, name: str) -> str:
        spaces = ["nsenter", "-t", str(self._init(name)), "--uts", "uname", "-n"]
        return subprocess.run(spaces, capture_output=True, text=True).stdout.strip()

    def on(self, name: str, folder: str | Path = "/") -> list[str]:
        """The words before a command that run it on a machine, in `folder`."""
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "-t", str(self._init(name)), *spaces, f"--wd={folder}", "--"]

    def run(self, name: str, *command: object) -> str:
        """What a command on a machine prints; it has to succeed."""
        words = [*self.on(name), *map(str, command)]
        return subprocess.run(
            words, env=os.environ | {"PATH": PATH}, check=True, capture_output=True, text=True
        ).stdout

    def cut(self, name: str) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        self.run("head", "ip", "link", "set", name, "down")

    def heal(self, name: str) -> None:
        self.run("head", "ip", "link", "set", name, "up")

    def crash(self, name: str) -> None:
        """Power off: the cable first, so that no last word gets out."""
        self.cut(name)
        self._end(name)

    def _end(self, name: str) -> None:
        self._booted[name].kill()  # unshare, and by --kill-child init: the kernel ends the rest
        self._booted.pop(name).wait()

    def down(self) -> None:
        for name in list(self._booted):
            self._end(name)


def wait_until(
    holds: Callable[[], object], problem: str, seconds: float = 30, logs: Sequence[Path] = ()
) -> None:
    """Poll; fails with `problem` and the ends of the logs."""
    deadline = time.monotonic() + seconds
    while not holds():
        tails = [f"{log}: {log.read_text()[-1500:]}" for log in logs if log.exists()]
        assert time.monotonic() < deadline, "\n".join([f"{problem} within {seconds} s", *tails])
        time.sleep(0.05)
