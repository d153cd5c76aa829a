"""The verbs on the command line. Imports stand inside each verb, so that `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from electra_ds.errors import RunFailure, UserError

app = typer.Typer(
    name="electra-ds", help="Pretrain text encoders by replaced token detection (ELECTRA) on DeepSpeed.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A shipped config (tiny, small, base, large, small++) or a RUN.json.")
]
Data = Annotated[Path, typer.Option("--data", help="Folder that `prepare` wrote.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="A shipped engine file (zero0 to zero3, ...) or a DeepSpeed JSON.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="section.field=value, as JSON or text; may be repeated.")]
Inputs = Annotated[list[str], typer.Option("--input", help="File, folder, glob or builtin:docs; may be repeated.")]


@app.callback()
def root() -> None:
    """Pretrain text encoders by replaced token detection (ELECTRA) on DeepSpeed."""


@app.command()
def pretrain(
    run: RunName,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Run folder; an unfinished run in it is resumed.")],
    engine: EngineName = None,
    sets: Sets = None,
    world_size: Annotated[int | None, typer.Option(help="Refuse to start with another number of ranks.")] = None,
    stop_at_step: Annotated[int | None, typer.Option(help="Save and leave with exit code 85 after this step.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Save and leave with exit code 85 after this time.")] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a finished run whose total_steps was raised.")
    ] = False,
    init_from: Annotated[Path | None, typer.Option(help="Start from the weights of a run or checkpoint.")] = None,
) -> None:
    """Pretrain under deepspeed, torchrun, srun, mpirun, or alone. The same --out resumes."""
    from electra_ds.config import load_run
    from electra_ds.ranks import find_ranks

    config = load_run(run, sets or [], engine)
    ranks = find_ranks(promised=world_size)
    from electra_ds.pretrain import Limits, pretrain_safely

    raise typer.Exit(pretrain_safely(config, data, out, ranks, Limits(stop_at_step, max_minutes, extend, init_from)))


def main() -> None:
    """Run a verb; a user's mistake becomes one message and exit code 2, a run that cannot go on exit code 1."""
    try:
        app()
    except (UserError, RunFailure) as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"electra-ds{rank}: error: {error}", file=sys.stderr, flush=True)
        _leave(2 if isinstance(error, UserError) else 1)


def _leave(code: int) -> None:
    # Threads of gloo or NCCL may wait for ranks that are gone: an ordinary exit could hang on them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
