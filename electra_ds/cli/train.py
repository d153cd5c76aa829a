"""Verbs of a run: check, pretrain, status, plot.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from electra_ds.cli.console import app, leave, print_json, print_table
from electra_ds.cli.options import DataOfRun, Engine, Run, Sets

if TYPE_CHECKING:
    from electra_ds.reporting.check import Report


@app.command()
def check(
    run: Run,
    engine: Engine = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks of the run.")] = 1,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Prepared data, for epochs and the vocabulary; of a run with phases also NAME=D, "
            "once for each data."
        ),
    ] = None,
    sets: Sets = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every value with its scope and meaning.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the learning rate into this png, svg or pdf file."),
    ] = None,
) -> None:
    """Show what a run needs, and report errors in its config."""
    from electra_ds.common.printable import printable
    from electra_ds.config.loading import config_names, load_run
    from electra_ds.config.schema import FactoryRun
    from electra_ds.data.named_data import open_named
    from electra_ds.reporting.check import Line, check
    from electra_ds.reporting.check_phases import PhaseLine

    is_preset = run in config_names("pretrain")
    config = load_run(run, sets or [], engine)
    if isinstance(config, FactoryRun):
        print(f"running the code of model.factory = {printable(config.model.factory)}", flush=True)
    report = check(
        config,
        world_size,
        open_named(data, config.phases) if data else None,
        load_run(run) if is_preset else None,
    )
    if picture is not None:
        _plot_schedule(report, picture)
    derived = [(line.key, line.value, line.meaning) for line in report.derived]
    print_table(f"{printable(run)} on {world_size} rank(s)", ("key", "value", "meaning"), derived)
    if report.phases:
        print_table("phases", PhaseLine._fields, report.phases)
    for line in report.warnings:
        print(line)
    if not isinstance(report.config, FactoryRun):  # the memory of a user's modules is not known
        _print_memory(report, world_size)
    if show_all:
        print_table("every value", Line._fields, report.fields)
        return
    other = f"differ from the preset {printable(run)}" if is_preset else "differ from the defaults"
    if report.changed:
        print_table(f"values that {other} (--all shows every value)", Line._fields, report.changed)
    else:
        print(f"\nno values {other} (--all shows every value)")


def _plot_schedule(report: "Report", picture: Path) -> None:
    from electra_ds.reporting.plot import plot_schedule

    if report.total_steps is None:
        report.config.total_steps(None)  # UserError: it needs --data
    plot_schedule(report.spans, picture)
    print(picture)


def _print_memory(report: "Report", world_size: int) -> None:
    from electra_ds.reporting.check_phases import largest_memory
    from electra_ds.reporting.memory import device_here

    head = ("ZeRO stage", "precision", "states", "buckets", "activations", "peak")
    rows = []
    phase, needs = largest_memory(report.runs, world_size)
    for (stage, name), need in needs.items():
        sizes = (need.states, need.buckets, need.activations, need.peak)
        rows.append((str(stage), name, *(f"{size / 2**30:.3f}" for size in sizes)))
    on_gpu = device_here() == "cuda"
    where = "a GPU" if on_gpu else "a CPU (a GPU stores less for attention)"
    of_phase = f" in the phase {report.config.phases[phase].name}" if report.config.phases else ""
    title = (
        f"GiB per rank (maximum{of_phase}), activations as on {where}, layers not compiled, no "
        "offload"
    )
    print_table(title, head, rows)


@app.command()
def pretrain(
    run: Run,
    data: DataOfRun,
    out: Annotated[Path, typer.Option(help="Run folder. An unfinished run in it is resumed.")],
    engine: Engine = None,
    sets: Sets = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks; another number is refused.")
    ] = None,
    stop_at_step: Annotated[
        int | None, typer.Option(help="Save after this step and exit with code 85.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Save after this many minutes and exit with code 85.")
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Continue a finished run with a larger total_steps, or with longer or more phases.",
        ),
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of a run or checkpoint.")
    ] = None,
    branch_from: Annotated[
        Path | None,
        typer.Option(
            help="Continue a run or checkpoint in the new folder --out, with another schedule, "
            "batch, mask rate, engine or data."
        ),
    ] = None,
    generator_from: Annotated[
        Path | None,
        typer.Option(
            help="Run, checkpoint or Hugging Face folder with the weights of a frozen generator "
            "(objective.generator = frozen)."
        ),
    ] = None,
) -> None:
    """Pretrain a model, or resume the run in --out.

    Runs in one process, or on the ranks of deepspeed, torchrun, srun or mpirun. Exit codes: 0
    finished, 85 saved and stopped (0 under torchrun), 2 a mistake in the command or the config, 1
    any other failure.
    """
    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.config.loading import load_run

    config = load_run(run, sets or [], engine)
    ranks = find_ranks(expected_size=world_size)
    from electra_ds.interop.frozen_generator import generator_reader
    from electra_ds.training.attempt import AttemptOptions
    from electra_ds.training.pretrain import pretrain

    options = AttemptOptions(
        stop_at_step,
        max_minutes,
        extend,
        init_from,
        generator_reader(generator_from),
        branch_from,
    )
    leave(pretrain(config, data, out, ranks, options))


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per run.")] = False,
) -> None:
    """Show the state of runs from their files.

    It covers step, ETA, losses, checkpoint, owner, failures, and the command to use next.
    """
    from electra_ds.common.printable import printable
    from electra_ds.reporting.status import lines, status

    for facts in map(status, runs):
        if as_json:
            print_json(facts)
        else:
            print_table(printable(facts["out"]), (), lines(facts).items())


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Run folders, drawn into one picture.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Picture (default: curves.png in the first run folder).")
    ] = None,
) -> None:
    """Draw the curves of runs from metrics.jsonl."""
    from electra_ds.reporting.plot import plot

    target = out or runs[0] / "curves.png"
    note = plot(runs, target)
    print(target)
    if note:
        print(note)
