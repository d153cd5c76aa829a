"""Verbs of a run: check, pretrain, status, plot. Imports stand inside each verb, so that `--help` is fast."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from electra_ds.cli.console import app, leave, print_table
from electra_ds.cli.options import Data, Engine, Run, Sets

if TYPE_CHECKING:
    pass


@app.command()
def check(
    run: Run,
    engine: Engine = None,
    world_size: Annotated[int, typer.Option(help="Ranks the run is meant for.")] = 1,
    data: Annotated[
        str | None, typer.Option(help="Prepared data, for epochs and the vocabulary.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Show every value with its meaning, derived numbers, parameters and memory; refuse what would fail later."""
    from electra_ds.config.loading import load_run
    from electra_ds.config.schema import FactoryRun
    from electra_ds.data.dataset import open_data
    from electra_ds.reporting.check import Line, check
    from electra_ds.reporting.memory import device_here, memory

    report = check(load_run(run, sets or [], engine), world_size, open_data(data) if data else None)
    for title, lines in (
        ("config", report.fields),
        (f"derived, {world_size} rank(s)", report.derived),
    ):
        print_table(title, Line._fields, lines)
    if isinstance(report.config, FactoryRun):
        return  # what code of the user's own keeps for backward is not known
    head = ("ZeRO stage", "precision", "states", "buckets", "activations", "peak")
    rows = (
        (
            str(stage),
            name,
            *(f"{n / 2**30:.3f}" for n in (need.states, need.buckets, need.activations, need.peak)),
        )
        for (stage, name), need in memory(report.config, world_size).items()
    )
    where = "a GPU" if device_here() == "cuda" else "a CPU (a GPU keeps less of attention)"
    print_table(
        f"GiB a rank at most, activations as on {where}, not compiled, without offload", head, rows
    )


@app.command()
def pretrain(
    run: Run,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it is resumed.")],
    engine: Engine = None,
    sets: Sets = None,
    world_size: Annotated[
        int | None, typer.Option(help="Refuse to start with another number of ranks.")
    ] = None,
    stop_at_step: Annotated[
        int | None, typer.Option(help="Save and leave with exit code 85 after this step.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Save and leave with exit code 85 after this time.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a finished run, total_steps raised.")
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of a run or checkpoint.")
    ] = None,
) -> None:
    """Pretrain under deepspeed, torchrun, srun, mpirun, or alone. The same --out resumes."""
    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.config.loading import load_run

    config = load_run(run, sets or [], engine)
    ranks = find_ranks(promised=world_size)
    from electra_ds.training.pretrain import Limits, pretrain

    leave(pretrain(config, data, out, ranks, Limits(stop_at_step, max_minutes, extend, init_from)))


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each.")] = False,
) -> None:
    """What a run is doing, from its files alone: step, ETA, losses, checkpoint, failures, what to do next."""
    import json

    from electra_ds.reporting.status import lines, status

    for facts in map(status, runs):
        if as_json:
            print(json.dumps(facts))
        else:
            print_table(facts["out"], (), lines(facts).items())


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Run folders, drawn into one picture.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Picture (default: curves.png in the first run folder).")
    ] = None,
) -> None:
    """Draw the curves of metrics.jsonl."""
    from electra_ds.reporting.plot import plot

    target = out or runs[0] / "curves.png"
    plot(runs, target)
    print(target)
