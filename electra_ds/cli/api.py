"""Pretraining from Python: `electra_ds.pretrain`."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.errors import UserError
from electra_ds.common.urls import check_local
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.interop.frozen_generator import generator_reader
from electra_ds.training.attempt import AttemptOptions
from electra_ds.training.pretrain import pretrain as pretrain_ranks

_has_run = False


def pretrain(
    config: str | Path | RunConfig,
    data: str | Path | Mapping[str, str | Path],
    out: str | Path,
    *,
    engine: str | None = None,
    sets: Sequence[str] = (),
    stop_at_step: int | None = None,
    max_minutes: float | None = None,
    extend: bool = False,
    init_from: str | Path | None = None,
    branch_from: str | Path | None = None,
    generator_from: str | Path | None = None,
) -> int:
    """Pretrain, or resume the unfinished run in `out`.

    Without a launcher it trains in this process, on one device. Under torchrun, deepspeed, srun or
    mpirun each rank calls it with the same arguments.

    config: name of a preset, path of a RUN.json, or a RunConfig (then without engine and sets).
    data: a data folder, its URL, or a MIX.json; of a run with phases also a mapping from the name
        of the data of a phase to one of these.
    out: the run folder.
    engine: name or path of a DeepSpeed file; replaces the config's `engine`.
    sets: settings such as "train.seed=1", applied to the config in order.
    stop_at_step: save and return after this step.
    max_minutes: save and return after this time.
    extend: continue a finished run with a larger train.total_steps, or with longer or more phases.
    init_from: a run or a checkpoint; a new run starts from its weights.
    branch_from: a run or a checkpoint with moments; a new run continues it with its own config.
    generator_from: a run, a checkpoint or a Hugging Face folder with the weights of a frozen
        generator (objective.generator = frozen).

    Returns the exit code of the command line: 0 if the schedule is complete, 85 if the run is saved
    and stopped. Under torchrun it is 0 in both cases, because torchrun restarts after any other
    code. A script for a launcher passes it to sys.exit.
    Raises UserError for a mistake in the arguments, and RunFailure when the run cannot continue.

    A process can complete one run, because DeepSpeed keeps the process groups of the first run.
    Resume in a new process. Call it from the main thread: it handles SIGINT, SIGTERM and SIGUSR1,
    which save and stop the run.
    """
    global _has_run
    for name, path in {
        "out": out,
        "init_from": init_from,
        "branch_from": branch_from,
        "generator_from": generator_from,
    }.items():
        check_local(path or "", name)
    if isinstance(config, RunConfig):
        if engine is not None or sets:
            raise UserError(
                "engine and sets change a preset or a file, but config is a RunConfig: give them "
                "to electra_ds.load_run(name, sets, engine)"
            )
    else:
        config = load_run(str(config), list(sets), engine)
    if _has_run:
        raise UserError(
            "electra_ds.pretrain has run in this process already, and DeepSpeed keeps the process "
            "groups of the first run: start a new process (in a notebook, restart the kernel)"
        )
    weights = None if init_from is None else Path(init_from)
    parent = None if branch_from is None else Path(branch_from)
    reader = generator_reader(generator_from)
    options = AttemptOptions(stop_at_step, max_minutes, extend, weights, reader, parent)
    with _restored_process():
        code = pretrain_ranks(config, data, Path(out), find_ranks(), options)
    _has_run = True
    return code


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the signal handlers, and remove all environment variables that the run added."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    environment = set(os.environ)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment:
            del os.environ[name]
