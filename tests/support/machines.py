"""Virtual nodes: namespaces with network, host name, processes, /dev/shm, /run and sshd.

File systems are shared, as on a cluster. `head` is the node that starts jobs on the others, and the
network switch between them. Needs root; nothing of this machine changes, and the virtual nodes end
with the process that made them.
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
# As the first process it also reaps orphans.
exec $(command -v sshd) -D -f {folder}/sshd_config -E {folder}/{name}.sshd.log
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
    """The reason why no virtual nodes can be made here, or an empty string."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here (apt-get install iproute2 util-linux openssh-server)"
    make = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    made = os.getuid() == 0 and subprocess.run(make, capture_output=True).returncode == 0
    return "" if made else "virtual nodes need root and the right to make namespaces"


class Machines:
    """The running machines `head`, `node1`, `node2`, ..."""

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
        """Start a machine, and wait until it accepts ssh connections."""
        init = INIT.format(name=name, folder=self.folder, address=self._address[name])
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
        with (self.folder / f"{name}.log").open("w") as log:
            # setpriv: the machine is killed when this process ends in any way
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
        else:  # after a reboot the same hardware address, which the others have cached
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
            f"{name} does not accept ssh connections",
        )

    def _init(self, name: str) -> int:
        """The process number, on this machine, of a machine's first process; 0 before its start."""
        unshare = self._booted[name].pid
        return int(
            (Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split() or ["0"])[0]
        )

    def _hostname(self, name: str) -> str:
        spaces = ["nsenter", "-t", str(self._init(name)), "--uts", "uname", "-n"]
        return subprocess.run(spaces, capture_output=True, text=True).stdout.strip()

    def on(self, name: str, folder: str | Path = "/") -> list[str]:
        """The prefix of a command that runs it on a machine, in `folder`."""
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "-t", str(self._init(name)), *spaces, f"--wd={folder}", "--"]

    def run(self, name: str, *command: object) -> str:
        """The output of a command on a machine; fails when the command does."""
        words = [*self.on(name), *map(str, command)]
        return subprocess.run(
            words, env=os.environ | {"PATH": PATH}, check=True, capture_output=True, text=True
        ).stdout

    def cut(self, name: str) -> None:
        """Cut the network: packets are lost without an error."""
        self.run("head", "ip", "link", "set", name, "down")

    def heal(self, name: str) -> None:
        """Connect the network again."""
        self.run("head", "ip", "link", "set", name, "up")

    def crash(self, name: str) -> None:
        """Power off. The network is cut first, so that the machine sends nothing more."""
        self.cut(name)
        self._end(name)

    def _end(self, name: str) -> None:
        self._booted[
            name
        ].kill()  # kills unshare and (--kill-child) the first process; the kernel kills the rest
        self._booted.pop(name).wait()

    def down(self) -> None:
        """Power off all machines."""
        for name in list(self._booted):
            self._end(name)


def wait_until(
    holds: Callable[[], object], problem: str, seconds: float = 30, logs: Sequence[Path] = ()
) -> None:
    """Wait until holds() is true; fails with `problem` and the ends of the logs."""
    deadline = time.monotonic() + seconds
    while not holds():
        tails = [f"{log}: {log.read_text()[-1500:]}" for log in logs if log.exists()]
        assert time.monotonic() < deadline, "\n".join([f"{problem} within {seconds} s", *tails])
        time.sleep(0.05)
