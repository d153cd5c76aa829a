"""A real SLURM of virtual nodes: slurmctld, and a slurmd for each node.

With root the nodes are those of machines.py. Without root all nodes are on 127.0.0.1 and share the
name of this machine, so a job needs MASTER_ADDR=127.0.0.1. Each node has two devices of type gpu,
/dev/null and /dev/zero. A job in the partition `urgent` takes the nodes of a job in `main`, which
is queued again. Nothing outside `folder` changes.
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from machines import PATH, Machines, wait_until

from electra_ds.common.processes import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
MISSING = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
CONF = """
ClusterName=virtual
FirstJobId={first_job}
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdTimeout=15
KillWait=5
MinJobAge=300
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,bf_interval=5
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = "NodeName={node} {place} CPUs=4 RealMemory=1000 Gres=gpu:2\n"


class Slurm:
    """The running cluster; `run` calls its commands, `environ` holds their variables."""

    def __init__(self, folder: Path, nodes: int, machines: Machines | None = None):
        self.folder, self.machines = folder, machines
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.children: list[subprocess.Popen] = []
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environ = outer | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host = os.uname().nodename.split(".")[0]
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        controller = "head" if machines else f"{host}(127.0.0.1)"
        self._socket = "/run/munge.socket" if machines else f"{folder}/munge.socket"
        # A killed MPICH leaves shared memory that is named by job and step.
        first_job = secrets.randbelow(60_000_000) + 1
        values = {"controller": controller, "user": user, "folder": folder, "socket": self._socket}
        conf = CONF.format(first_job=first_job, port=free_port(), **values)
        for node in self.nodes:
            place = "" if machines else f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            conf += NODE.format(node=node, place=place)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(
            f"NodeName=node[1-{nodes}] Name=gpu File=/dev/null,/dev/zero\n"
        )
        try:
            self._start_munged("head")
            self._start("head", "slurmctld", "-D", "-c")
            self.until(lambda: "UP" in self.run("scontrol", "ping", check=False))
            for node in self.nodes:
                self.boot(node)
            self.until(lambda: self.idle() == nodes)
        except BaseException:
            self.down()
            raise

    def boot(self, node: str) -> None:
        """Start a node's daemons, as after a boot of its machine."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        if self.machines:
            self._start_munged(node)
        self._start(node, "slurmd", "-D", "-N", node)

    def _start_munged(self, place: str) -> None:
        own = {"pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge-{place}.{end}" for option, end in own.items()]
        self._start(
            place,
            "munged",
            "--foreground",
            "--force",
            f"--key-file={self.folder}/munge.key",
            f"--socket={self._socket}",
            "--num-threads=2",
            *options,
        )
        look = [*self._on(place), "test", "-e", self._socket]
        self.until(lambda: subprocess.run(look).returncode == 0)

    def _on(self, place: str, folder: str | Path = "/") -> list[str]:
        return self.machines.on(place, folder) if self.machines else []

    def _start(self, place: str, *command: str) -> None:
        with (self.folder / f"{command[0]}-{place}.log").open("a") as log:
            words = [*self._on(place), *command]
            self.children.append(subprocess.Popen(words, env=self.environ, stdout=log, stderr=log))

    def run(
        self, *command: object, check: bool = True, cwd: Path | None = None, **environ: str
    ) -> str:
        """The output of a SLURM command."""
        words, environ = [*self._on("head", cwd or "/"), *map(str, command)], self.environ | environ
        return subprocess.run(
            words, env=environ, check=check, capture_output=True, text=True, cwd=cwd
        ).stdout

    def idle(self) -> int:
        """The number of idle nodes."""
        return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").count("node")

    def state(self, job: str) -> str:
        """The state of a job: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until holds() is true; fails with the ends of the daemons' logs."""
        wait_until(
            holds, "SLURM does not reach the state", seconds, list(self.folder.glob("*.log"))
        )

    def down(self) -> None:
        """Cancel all jobs and end the daemons; those on virtual nodes end with the nodes."""
        if len(self.children) > 2:
            self.run("scancel", "--me", check=False)
            ended = time.monotonic() + 20
            while self.run("squeue", "-h", check=False) and time.monotonic() < ended:
                time.sleep(0.1)
        if self.machines:
            return
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
