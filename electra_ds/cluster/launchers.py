"""Rank and world size of this process, derived from the environment variables of its launcher.

DeepSpeed uses its own discovery unless RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
are all set. If a launcher sets none of them, DeepSpeed trains N separate copies. Therefore this
module derives, checks and exports all of them.
"""

import os
import socket
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.processes import free_port

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
    launcher: name of the launcher, "none" without one, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str


def find_ranks(
    environ: MutableMapping[str, str] = os.environ, promised: int | None = None
) -> Ranks:
    """Return the ranks of this process, and export the variables that torch and DeepSpeed read.

    environ: read and changed.
    promised: expected number of ranks (--world-size); None for any.
    Raises UserError when the launcher's variables are incomplete or contradict each other, or when
    the number of ranks is not `promised`.
    """
    sizes = {
        name: int(environ[keys[1]])
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
        sizes, ranks = {}, Ranks(0, 1, 0, 1, "none")
    else:
        launcher = next(iter(sizes))
        ranks = _read(environ, launcher)
    for name, size in sizes.items():
        if size > ranks.world_size:
            raise UserError(
                f"{ranks.launcher} started a world of {ranks.world_size} ranks inside {name}, "
                f"which started {size} ranks; use one launcher for all ranks"
            )
    if promised is not None and promised != ranks.world_size:
        raise UserError(
            f"--world-size is {promised}, but {ranks.launcher} started {ranks.world_size} rank(s): "
            "correct --world-size or the launcher's number of ranks"
        )
    _export(environ, ranks)
    return ranks


def alone(ranks: Ranks, environ: MutableMapping[str, str] = os.environ) -> Ranks:
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
    world_size = int(environ[size])
    local_size = next((environ[name] for name in local_sizes if name in environ), "1")
    if local not in environ:
        raise UserError(
            f"{launcher} set {rank} and {size} but not {local}: "
            "the launcher's environment is incomplete"
        )
    on_this_host = int(local_size.partition("(")[0].partition(",")[0])  # SLURM writes 4(x2)
    place = Ranks(int(environ[rank]), world_size, int(environ[local]), on_this_host, launcher)
    if not 0 <= place.rank < world_size:
        raise UserError(
            f"{launcher} set {rank}={place.rank}, outside a world of {world_size} ranks"
        )
    return place


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
        nodes = [
            "scontrol",
            "show",
            "hostnames",
            environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"],
        ]
        first = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
        return first, 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000
    if ranks.launcher.startswith("mpirun"):
        here = (
            socket.gethostname() if ranks.local_size < ranks.world_size else "127.0.0.1",
            free_port(),
        )
        return mpi_world(ranks, "export MASTER_ADDR and MASTER_PORT").bcast(
            here if ranks.rank == 0 else None
        )
    raise UserError(
        f"{ranks.launcher} set RANK and WORLD_SIZE but not MASTER_ADDR and MASTER_PORT: export both"
    )


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
