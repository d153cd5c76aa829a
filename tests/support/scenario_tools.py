"""Small runs on the ranks of this process, and their results for the tests.

The scenarios (scenarios.py) call these functions on every rank alike.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from small_run import CUT, SMALL_DEBERTA, SMALL_MODEL, SMALL_MODERN, STEPS

from electra_ds.cluster import stop_signals
from electra_ds.cluster.launchers import Ranks, find_ranks
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.config.loading import load_run
from electra_ds.training import spike_guard
from electra_ds.training.attempt import AttemptOptions
from electra_ds.training.engine import Engine, start
from electra_ds.training.pretrain import pretrain_on_ranks

SHORT = [
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    f"train.total_steps={STEPS}",
    "train.eval_every=1000",
    "train.eval_rows=8",
    "optimizer.warmup_steps=4",
    "optimizer.peak_lr=0.003",
    "checkpoint.every=1000",
    "logging.every=1",
    "logging.tensorboard=false",
]
SMALL = [*SMALL_MODEL, *SHORT]
SIZES = {  # preset -> settings of a small model
    "tiny": SMALL_MODEL,
    "modern-tiny": SMALL_MODERN,
    "deberta-tiny": SMALL_DEBERTA,
}
SAVED = "checkpoint.every=5"
STOPPED = (0, 85)  # exit codes of a run that stopped as asked: under torchrun, under others


@dataclass
class Here:
    """This rank: data folder, folder of the runs, rank and number of ranks."""

    data: Path = Path()
    outs: Path = Path()
    ranks: Ranks | None = None
    device: torch.device | None = None

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def other_data(self) -> Path:
        """A data folder of the same sizes with other rows."""
        return self.data.with_name(self.data.name + "-other")


here = Here()


def begin(data: Path, outs: Path) -> None:
    """Meet the other ranks; RANK, WORLD_SIZE and the other variables of a launcher are set."""
    here.data, here.outs, here.ranks = data, outs, find_ranks()
    here.device = start(here.ranks, timeout_minutes=2)
    spike_guard.WINDOW = 4  # the runs are short


def train(
    name: str,
    engine: str,
    *sets: str,
    data: Path | str = "",
    preset: str = "tiny",
    **options,
) -> int | str:
    """A run in OUTS/name; the exit code, or the message of the error that ended it."""
    config = load_run(preset, [*SIZES[preset], *SHORT, *sets], engine)
    options = AttemptOptions(**options)
    stop_signals.on_stop_signal(options.asked.append)
    out = here.outs / name
    try:
        return pretrain_on_ranks(config, data or here.data, out, here.ranks, here.device, options)
    except (UserError, RunFailure) as error:
        return f"{type(error).__name__}: {error}"


def finish(name: str, engine: str, *sets: str, **options) -> None:
    """A run that reaches its last step."""
    ended = train(name, engine, *sets, **options)
    assert ended == 0, (name, ended)


def stop(name: str, engine: str, *sets: str, at: int = CUT, **options) -> None:
    """A run that receives a request to stop at a step."""
    ended = train(name, engine, *sets, stop_at_step=at, **options)
    assert ended in STOPPED, (name, ended)


@contextlib.contextmanager
def in_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on every rank before the update of a step of the run inside."""
    original, steps = Engine.step, []

    def step(self, lr):
        steps.append(1)
        if len(steps) == number:
            act()
        return original(self, lr)

    Engine.step = step
    yield
    Engine.step = original


def wait_for_ranks() -> None:
    """Wait until every rank is here."""
    if here.world_size > 1:
        torch.distributed.barrier()


def copy(source: str, target: str) -> None:
    """Rank 0 copies a run folder; the others wait."""
    if here.rank == 0:
        shutil.copytree(here.outs / source, here.outs / target)
    wait_for_ranks()


def write_engine(name: str, values: dict) -> str:
    """Rank 0 writes an engine file into OUTS; its path, on every rank."""
    path = here.outs / f"{name}.json"
    if here.rank == 0:
        path.write_text(json.dumps(values))
    wait_for_ranks()
    return str(path)


def note(name: str, value: object) -> None:
    """Write what this rank found to OUTS/NAME-RANK.json."""
    (here.outs / f"{name}-{here.rank}.json").write_text(json.dumps(value))


def kill_self(number: int) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)
