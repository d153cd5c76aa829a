"""Fixtures for the runs of scenarios.py, which start with the session, beside the first tests.

A plugin of pytest (tests/conftest.py names it).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shard_data
from running import CPU, ROOT
from small_run import STAGES

# Killed in a random step at each stage (the test names contain the step), and inside a save.
KILLS = (*(f"{stage}-step{random.randint(1, 20)}" for stage in STAGES), "1-tensors", "1-latest")
PHASES = {  # fixture -> phases of scenarios.py, in their order
    "suites": ("finetune-one", "finetune-two"),
    "disk": ("disk",),
    "kind_runs": ("kinds",),
    "optimizer_runs": ("optimizers", "optimizers-one"),
    "outs": ("two", *(f"killed-{kill}" for kill in KILLS), "one", "two-again", "memory"),
}


class ScenarioRuns:
    """A process that runs phases of scenarios.py one after the other into `outs`."""

    def __init__(self, data: Path, outs: Path, phases: list[str]):
        self.outs = outs
        self._log = outs / "scenarios.log"
        script = ROOT / "tests" / "support" / "scenarios.py"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["nice", sys.executable, str(script), str(data), str(outs), *phases],
                env=os.environ | CPU,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, phases: tuple[str, ...], seconds: float = 1200) -> Path:
        """Wait for phases; the folder of the runs. Fails with the log when one of them failed."""
        deadline = time.monotonic() + seconds
        while not all((self.outs / f"{phase}.finished").exists() for phase in phases):
            ended = self._process.poll() is not None
            assert not ended or self._process.returncode == 0, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            time.sleep(0.1)
        return self.outs

    def end(self) -> None:
        """Kill what still runs, such as after an interrupted session."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def mount_small_disk(folder: Path) -> bool:
    """Mount a file system of 32 MB; False where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.fixture(scope="session", autouse=True)
def scenario_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScenarioRuns | None]:
    """Start the phases that the tests of this session need; None when they need none."""
    used = {name for item in request.session.items for name in item.fixturenames}
    phases = [phase for fixture, names in PHASES.items() if fixture in used for phase in names]
    if not phases:
        yield None
        return
    outs = tmp_path_factory.mktemp("outs")
    has_disk = "disk" in phases and mount_small_disk(outs / "disk")
    if not has_disk:
        phases = [phase for phase in phases if phase != "disk"]
    data = request.getfixturevalue("data")
    other = data.with_name(data.name + "-other")
    other.mkdir()
    shards = [shard_data.best_fit_rows(100, 32, seed=seed) for seed in range(3, 6)]
    shard_data.write_data(other, shards, valid=shard_data.best_fit_rows(40, 32, seed=8))
    runs = ScenarioRuns(data, outs, phases)
    yield runs
    runs.end()
    if has_disk:
        subprocess.run(["umount", "--recursive", str(outs / "disk")], check=True)


@pytest.fixture(scope="session")
def outs(scenario_runs: ScenarioRuns) -> Path:
    """The folder with the runs of two ranks, of one, and of ranks that killed themselves."""
    return scenario_runs.wait(PHASES["outs"])


@pytest.fixture(scope="session")
def kind_runs(scenario_runs: ScenarioRuns) -> Path:
    """The folder with the runs of the other kinds of objectives and of a factory."""
    return scenario_runs.wait(PHASES["kind_runs"])


@pytest.fixture(scope="session")
def optimizer_runs(scenario_runs: ScenarioRuns) -> Path:
    """The folder with the runs of optimizers other than Adam."""
    return scenario_runs.wait(PHASES["optimizer_runs"])


@pytest.fixture(scope="session")
def suites(scenario_runs: ScenarioRuns) -> Path:
    """The folder of the fine-tuning runs: model, tasks, one/NAME and two/NAME."""
    return scenario_runs.wait(PHASES["suites"]) / "finetune"


@pytest.fixture(scope="session")
def disk(scenario_runs: ScenarioRuns) -> Path:
    """A file system of 32 MB with the runs of disk_scenarios.py."""
    if not os.path.ismount(scenario_runs.outs / "disk"):
        pytest.skip("a file system of its own needs root and the right to mount")
    outs = scenario_runs.wait(PHASES["disk"])
    log = (outs / "disk.log").read_text()
    assert "Traceback" not in log, log[-8000:]
    return outs / "disk"
