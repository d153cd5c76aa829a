"""Pretraining from Python: `electra_ds.pretrain`."""

from collections.abc import Sequence
from pathlib import Path

from electra_ds.cluster.launchers import find_ranks
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.training.pretrain import Limits
from electra_ds.training.pretrain import pretrain as pretrain_ranks


def pretrain(
    config: str | Path | RunConfig,
    data: str | Path,
    out: str | Path,
    *,
    engine: str | None = None,
    sets: Sequence[str] = (),
    stop_at_step: int | None = None,
    max_minutes: float | None = None,
    extend: bool = False,
    init_from: str | Path | None = None,
) -> int:
    """Pretrain, or resume what `out` holds. Under a launcher every rank calls this function.

    config: a preset's name, the path of a RUN.json, or a RunConfig (then without engine and sets).
    data: a data folder, its URL, or a MIX.json. out: the run folder.
    engine, sets: as --engine and --set of the command line.
    stop_at_step, max_minutes: save and stop after this step, or this time.
    extend: continue a finished run whose total_steps was raised.
    init_from: start from the weights of a run or checkpoint.
    Returns 0 if the schedule is complete, 85 if the run is saved and stopped. Raises UserError or
    RunFailure. A process can call it once: the ranks of a process group meet once.
    """
    if not isinstance(config, RunConfig):
        config = load_run(str(config), sets, engine)
    limits = Limits(
        stop_at_step, max_minutes, extend, None if init_from is None else Path(init_from)
    )
    return pretrain_ranks(config, data, Path(out), find_ranks(), limits)
