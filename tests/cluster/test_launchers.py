"""Ranks: the variables of each launcher, what is exported for torch, refused environments."""

import pytest

from electra_ds.cluster import launchers
from electra_ds.cluster.launchers import Ranks, check_address, find_ranks
from electra_ds.common.errors import UserError
from electra_ds.common.processes import restart_count

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = MASTER | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = MASTER | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
# Variables of a batch script without srun: tasks are counted, but there is no step.
SBATCH = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
}
LAUNCHERS = {
    "torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "srun": SRUN | MASTER,
    "open mpi": OPEN_MPI | MASTER, "mpich": MPICH | MASTER,
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_ranks_and_exports(launcher):
    environ = dict(LAUNCHERS[launcher])
    found = find_ranks(environ)
    assert (found.rank, found.world_size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    exported = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "4",
        "CROSS_RANK": "1",
    }
    assert (exported | MASTER | {"CROSS_SIZE": "2"}).items() <= environ.items()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_call_gives_the_same_ranks(launcher):
    environ = dict(LAUNCHERS[launcher])
    first = find_ranks(environ)
    second = find_ranks(environ)
    assert (first.rank, first.world_size, first.local_rank) == (
        second.rank,
        second.world_size,
        second.local_rank,
    )


def test_without_a_launcher_there_is_one_rank_with_an_address():
    environ = {}
    assert find_ranks(environ) == Ranks(0, 1, 0, 1, "none")
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert environ["MASTER_ADDR"] == "127.0.0.1" and 0 < int(environ["MASTER_PORT"]) < 65536


def test_a_batch_script_without_srun_is_a_single_rank():
    assert find_ranks(dict(SBATCH)).world_size == 1
    with pytest.raises(UserError, match="--world-size is 8, but there is 1 rank, no launcher"):
        find_ranks(dict(SBATCH), expected_size=8)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_number_of_ranks_other_than_world_size_is_refused(launcher):
    assert find_ranks(dict(LAUNCHERS[launcher]), expected_size=8).world_size == 8
    with pytest.raises(UserError, match=r"--world-size is 4, but .* started 8 rank"):
        find_ranks(dict(LAUNCHERS[launcher]), expected_size=4)


@pytest.mark.parametrize("outer", ["srun", "open mpi", "mpich"])
def test_fewer_ranks_than_the_outer_launcher_started_are_refused(outer):
    alone = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(UserError, match=r"started a world of 1 ranks inside .*, which started 8"):
        find_ranks(LAUNCHERS[outer] | alone)


def test_torchrun_on_each_task_of_srun_is_one_world():
    one_task_a_node = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert find_ranks(TORCHRUN | one_task_a_node).world_size == 8


def test_mpirun_inside_a_step_of_srun_is_the_world():
    # mpirun starts one daemon per node as a task of srun.
    daemons = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    found = find_ranks(OPEN_MPI | MASTER | daemons)
    assert (found.rank, found.world_size, found.local_rank) == (5, 8, 1)


def test_the_pmi_names_that_srun_sets_do_not_hide_srun():
    found = find_ranks(SRUN | MASTER | {"PMI_RANK": "5", "PMI_SIZE": "8"})
    assert (found.rank, found.local_rank, found.launcher) == (5, 1, "srun")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"} | MASTER, "LOCAL_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, "MASTER_PORT"),
    ],
)
def test_an_incomplete_environment_is_refused_with_the_missing_variable(environ, named):
    with pytest.raises(UserError, match=named):
        find_ranks(dict(environ))


def test_a_rank_of_at_least_the_world_size_is_refused():
    with pytest.raises(UserError, match="RANK=8, outside a world of 8 ranks"):
        find_ranks(TORCHRUN | {"RANK": "8"})


def test_all_tasks_of_a_step_derive_the_same_address_without_communication(monkeypatch):
    class Listed:
        stdout = "node3\nnode4\n"

    commands = []

    def run(command, **_):
        commands.append(command)
        return Listed

    monkeypatch.setattr(launchers.subprocess, "run", run)
    found = set()
    for rank in range(8):
        environ = SRUN | {
            "SLURM_PROCID": str(rank),
            "SLURM_JOB_ID": "123456",
            "SLURM_STEP_NODELIST": "node[3-4]",
        }
        find_ranks(environ)
        found.add((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
    assert found == {("node3", str(20000 + 123456 % 20000))}
    assert commands[0] == ["scontrol", "show", "hostnames", "node[3-4]"]


@pytest.mark.parametrize(
    ("launcher", "changed"),
    [
        ("torchrun", {"WORLD_SIZE": "abc"}),
        ("torchrun", {"WORLD_SIZE": "0"}),
        ("torchrun", {"WORLD_SIZE": "\u0668"}),
        ("torchrun", {"RANK": "-1"}),
        ("torchrun", {"RANK": "1.5"}),
        ("torchrun", {"LOCAL_RANK": ""}),
        ("torchrun", {"LOCAL_WORLD_SIZE": "x"}),
        ("srun", {"SLURM_PROCID": "9" * 5000}),
        ("srun", {"SLURM_STEP_TASKS_PER_NODE": "(x2)"}),
        ("mpich", {"MPI_LOCALNRANKS": "0"}),
    ],
)
def test_a_variable_that_is_no_number_is_refused_with_its_name(launcher, changed):
    with pytest.raises(UserError, match=r"expected an integer of at least \d") as caught:
        find_ranks(LAUNCHERS[launcher] | changed)
    assert len(str(caught.value)) < 200


def test_a_job_id_that_is_no_number_is_refused(monkeypatch):
    with pytest.raises(UserError, match="SLURM_JOB_ID='a'"):
        find_ranks(SRUN | {"SLURM_JOB_ID": "a", "SLURM_STEP_NODELIST": "node1"})

    def run(*_, **__):
        raise FileNotFoundError(2, "No such file", "scontrol")

    monkeypatch.setattr(launchers.subprocess, "run", run)
    with pytest.raises(UserError, match="scontrol names no host"):
        find_ranks(SRUN | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1"})


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "9" * 5000, ""])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(UserError, match="expected a port from 1 to 65535"):
        check_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "a..b", "\x1b[31m"])
def test_a_host_without_an_address_is_refused_within_seconds(host, monkeypatch):
    monkeypatch.setattr(launchers.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="no address found") as caught:
        check_address(host, "29500")
    assert str(caught.value).isprintable()


def test_an_address_that_resolves_is_accepted():
    check_address("127.0.0.1", "29500")


def test_a_restart_count_that_is_no_number_is_refused():
    assert restart_count({}) == restart_count({"SLURM_RESTART_COUNT": ""}) == 0
    assert restart_count({"SLURM_RESTART_COUNT": "3"}) == 3
    for text in ("x", "-1", "1.5", "9" * 5000, "../x"):
        with pytest.raises(UserError, match="SLURM_RESTART_COUNT"):
            restart_count({"SLURM_RESTART_COUNT": text})


def test_ranks_of_mpirun_agree_on_an_address_without_pickles(monkeypatch):
    sent = []

    class World:
        def Bcast(self, message):
            if sent:
                message[:] = sent[0]
            sent.append(bytes(message))

    monkeypatch.setattr(launchers, "mpi_world", lambda *_: World())
    found = set()
    for rank in ("0", "5"):
        environ = MPICH | {"PMI_RANK": rank}
        find_ranks(environ)
        found.add((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
    assert len(found) == 1 and len(sent[0]) == launchers.PLACE_BYTES
