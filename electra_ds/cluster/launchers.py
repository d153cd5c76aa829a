"""Rank and world size of this process, derived from the environment variables of its launcher.

DeepSpeed uses its own discovery unless RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
are all set. If a launcher sets none of them, DeepSpeed trains N separate copies. Therefore this
module derives, checks and exports all of them.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened
from electra_ds.common.processes import free_port

NO_LAUNCHER = "none"
PLACE_BYTES = 512  # of a message with host and port; a host name has at most 255

# launcher -> names of (rank, world size, local rank, ranks on this host). The innermost launcher
# comes first: processes of Open MPI also have the variables of srun, which starts its daemons, and
# srun --mpi=pmi2 also sets those of MPICH.
LAUNCHERS = {
    "torchrun or deepspeed": (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ),
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "srun": (
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        ("SLURM_STEP_TASKS_PER_NODE",),
    ),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
}


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and sizes of its world.

    local_rank, local_size: rank on this host, and number of ranks on this host.
    launcher: name of the launcher, NO_LAUNCHER without one, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str


def find_ranks(
    environ: MutableMapping[str, str] = os.environ, expected_size: int | None = None
) -> Ranks:
    """Return the ranks of this process, and export the variables that torch and DeepSpeed read.

    environ: read and changed.
    expected_size: expected number of ranks (--world-size); None for any.
    Raises UserError when the launcher's variables are incomplete or contradict each other, or when
    the number of ranks is not `expected_size`.
    """
    sizes = {
        name: _integer(environ, keys[1])
        for name, keys in LAUNCHERS.items()
        if keys[0] in environ and keys[1] in environ
    }
    if not sizes:
        # srun is not checked: sbatch without srun sets SLURM_PROCID, too.
        pairs = [keys[:2] for name, keys in LAUNCHERS.items() if name != "srun"]
        for present, absent in [*pairs, *(pair[::-1] for pair in pairs)]:
            if present in environ:
                raise UserError(
                    f"{present} is set but {absent} is not: the environment of the launcher is "
                    f"incomplete; unset {present} to train on one rank, or start with a launcher"
                )
        sizes, ranks = {}, Ranks(0, 1, 0, 1, NO_LAUNCHER)
    else:
        launcher = next(iter(sizes))
        ranks = _read(environ, launcher)
    for name, size in sizes.items():
        if size > ranks.world_size:
            raise UserError(
                f"{ranks.launcher} started a world of {ranks.world_size} ranks inside {name}, "
                f"which started {size} ranks; use one launcher for all ranks"
            )
    if expected_size is not None and expected_size != ranks.world_size:
        raise UserError(
            f"--world-size is {expected_size}, but {started_by(ranks)}: correct --world-size, or start "
            "that number of ranks with a launcher"
        )
    _export(environ, ranks)
    return ranks


def started_by(ranks: Ranks) -> str:
    """Return "2 rank(s), started by srun", or "1 rank, no launcher", for messages."""
    if ranks.launcher == NO_LAUNCHER:
        return "there is 1 rank, no launcher"
    return f"{ranks.launcher} started {ranks.world_size} rank(s)"


def check_address(host: str, port: str) -> None:
    """Raise UserError when a host has no address, or a port is no number from 1 to 65535.

    torch.distributed would try again for minutes without a message.
    """
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UserError(f"MASTER_PORT={shortened(port)}: expected a port from 1 to 65535")
    for pause in (1, 2, 0):  # a name server may be busy
        try:
            socket.getaddrinfo(host, int(port))
            return
        except (OSError, UnicodeError) as error:
            problem = error
        time.sleep(pause)
    raise UserError(
        f"MASTER_ADDR={shortened(host)}: no address found ({problem}); expected the name or the "
        "address of the host of rank 0"
    )


def single_rank_world(ranks: Ranks, environ: MutableMapping[str, str] = os.environ) -> Ranks:
    """Return a world of one rank on the device of `ranks`, for work without communication.

    environ: changed; MASTER_ADDR and MASTER_PORT are replaced and TORCHELASTIC_* is removed.
    """
    # With the variables of torchrun, torch would use the store of torchrun's agent.
    for name in [name for name in environ if name.startswith("TORCHELASTIC_")]:
        del environ[name]
    environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    single = Ranks(0, 1, ranks.local_rank, ranks.local_size, ranks.launcher)
    _export(environ, single)
    return single


def _read(environ: MutableMapping[str, str], launcher: str) -> Ranks:
    rank, size, local, local_sizes = LAUNCHERS[launcher]
    world_size = _integer(environ, size, least=1)
    local_size = next((environ[name] for name in local_sizes if name in environ), "1")
    if local not in environ:
        raise UserError(
            f"{launcher} set {rank} and {size} but not {local}: "
            "the launcher's environment is incomplete"
        )
    counts = {
        "ranks on this host": local_size.partition("(")[0].partition(",")[0]
    }  # 4(x2) of SLURM
    place = Ranks(
        _integer(environ, rank),
        world_size,
        _integer(environ, local),
        _integer(counts, "ranks on this host", least=1),
        launcher,
    )
    if not 0 <= place.rank < world_size:
        raise UserError(
            f"{launcher} set {rank}={place.rank}, outside a world of {world_size} ranks"
        )
    return place


def _integer(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environ[name].strip()
    is_number = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10
    if not is_number or int(text) < least:
        raise UserError(
            f"{name}={shortened(environ[name])}: expected an integer of at least {least}, as a "
            "launcher sets it"
        )
    return int(text)


def _export(environ: MutableMapping[str, str], ranks: Ranks) -> None:
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if not (address and port):
        default_address, default_port = _meeting_point(environ, ranks)
        address, port = address or default_address, port or str(default_port)
    hosts = max(1, ranks.world_size // max(1, ranks.local_size))
    values = {
        "RANK": ranks.rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_RANK": ranks.local_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "LOCAL_SIZE": ranks.local_size,
        "CROSS_RANK": ranks.rank // max(1, ranks.local_size),
        "CROSS_SIZE": hosts,
    }
    environ.update({key: str(value) for key, value in values.items()})


def _meeting_point(environ: MutableMapping[str, str], ranks: Ranks) -> tuple[str, int]:
    if ranks.world_size == 1:
        return "127.0.0.1", free_port()
    if ranks.launcher == "srun":
        job = _integer({"SLURM_JOB_ID": "0", **environ}, "SLURM_JOB_ID")
        return _first_node(environ), 20000 + job % 20000
    if ranks.launcher.startswith("mpirun"):
        here = (
            socket.gethostname() if ranks.local_size < ranks.world_size else "127.0.0.1",
            free_port(),
        )
        world = mpi_world(ranks, "export MASTER_ADDR and MASTER_PORT")
        message = bytearray(json.dumps(here).encode().ljust(PLACE_BYTES))
        world.Bcast(message)  # bytes; the lower-case bcast would pickle
        address, port = json.loads(message)
        return str(address), int(port)
    raise UserError(
        f"{ranks.launcher} set RANK and WORLD_SIZE but not MASTER_ADDR and MASTER_PORT: export both"
    )


def _first_node(environ: Mapping[str, str]) -> str:
    """Return the first node of this step of SLURM."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, ValueError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"srun: scontrol names no host for the nodes {shortened(nodes)} ({error}); export "
            "MASTER_ADDR and MASTER_PORT"
        ) from None


def mpi_world(ranks: Ranks, otherwise: str) -> Any:
    """Return mpi4py's communicator of all ranks.

    otherwise: an alternative to mpi4py, for the error message.
    Raises UserError when mpi4py cannot be loaded, or its world size differs from `ranks`.
    """
    if ranks.launcher == "srun":  # MPICH's ucx sometimes writes addresses too long for srun's pmi2
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        raise UserError(
            f"{ranks.launcher} started this process, but mpi4py cannot load its MPI library: use "
            f"the mpirun of this environment (pip install mpich), or {otherwise}"
        ) from None
    if (met := MPI.COMM_WORLD.Get_size()) != ranks.world_size:
        raise UserError(
            f"{ranks.launcher} started {ranks.world_size} ranks, mpi4py meets {met}: it was built "
            "for another MPI; install the one of this launcher (for srun --mpi=pmi2: pip install "
            f"mpich), or {otherwise}"
        )
    return MPI.COMM_WORLD
