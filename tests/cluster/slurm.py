"""A real SLURM of virtual nodes on this machine: slurmctld and one slurmd per node, all on 127.0.0.1, as children.

Every node shares this machine's name and files, so a job needs MASTER_ADDR=127.0.0.1. Each has two devices of type
gpu, which are /dev/null and /dev/zero. Nothing outside `folder` changes.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from electra_ds.ranks import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
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
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 Gres=gpu:2\n"


class Slurm:
    """The cluster while it is up; `run` is any of its commands, `environ` what they need."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.children = folder, []
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environ = outer | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host, user = os.uname().nodename.split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        conf = CONF.format(host=host, user=user, folder=folder, port=free_port())
        conf += "".join(NODE.format(i=i + 1, host=host, port=free_port()) for i in range(nodes))
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File=/dev/null,/dev/zero\n")
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", "--num-threads=2",
                        f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
                        f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log")  # fmt: skip
            self.until((folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-c")
            self.until(lambda: "UP" in self.run("scontrol", "ping", check=False))
            for i in range(nodes):
                (folder / f"spool-node{i + 1}").mkdir()
                self._start("slurmd", "-D", "-N", f"node{i + 1}")
            self.until(lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").count("node") == nodes)
        except BaseException:
            self.down()
            raise

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self.children)}.log").open("w") as log:
            self.children.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def run(self, *command: object, check: bool = True, cwd: Path | None = None, **environ: str) -> str:
        """What a SLURM command prints."""
        words, environ = [str(word) for word in command], self.environ | environ
        return subprocess.run(words, env=environ, check=check, capture_output=True, text=True, cwd=cwd).stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Wait; fails with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not holds():
            tails = [f"{log.name}: {log.read_text()[-500:]}" for log in self.folder.glob("*.log")]
            assert time.monotonic() < deadline, "\n".join(tails)
            time.sleep(0.1)

    def down(self) -> None:
        """Cancel all jobs and end the daemons, the last started first."""
        if len(self.children) > 2:
            self.run("scancel", "--me", check=False)
            ended = time.monotonic() + 20
            while self.run("squeue", "-h", check=False) and time.monotonic() < ended:
                time.sleep(0.1)
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
