"""Verbs of fine-tuning: finetune, predict, submit. Imports stand inside each verb, so that `--help` is fast."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from electra_ds.cli.console import app, leave
from electra_ds.cli.options import Engine, Sets

if TYPE_CHECKING:
    pass


@app.command()
def finetune(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Run, checkpoint, fine-tuned or Hugging Face model."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the suite; finished seeds in it are kept.")],
    tasks: Annotated[
        str,
        typer.Option(help="GLUE tasks (rte,cola; glue: all nine) and TASK.json files, by commas."),
    ],
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="small, base, large, tiny, or a JSON.")
    ] = "small",
    data: Annotated[
        Path | None, typer.Option(help="Folder with CoLA, RTE, ..., or one task's own.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per task, from train.seed on.")] = 1,
    engine: Engine = None,
    sets: Sets = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Spread seeds over the ranks, a world each.")
    ] = False,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="The same from random weights.")
    ] = False,
) -> None:
    """Fine-tune on GLUE or own tasks, several seeds each; alone or under any launcher."""
    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.finetuning.config import load_finetune
    from electra_ds.finetuning.tasks import task_names

    found, ranks = load_finetune(config, sets or [], engine), find_ranks()
    from electra_ds.finetuning.finetune import finetune

    names = task_names(tasks)
    code = finetune(
        found, model, names, seeds, data, out, ranks, spread=spread, random_init=random_init
    )
    if ranks.rank == 0 and code == 0:
        print(
            f"{out}/report.md" if spread else (out / "report.md").read_text(encoding="utf-8"),
            flush=True,
        )
    leave(code)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="FINETUNED", help="DIR/TASK, or DIR/TASK/seed-N.")
    ],
    out: Annotated[Path, typer.Option(help="TSV to write: index, prediction, probabilities.")],
    file: Annotated[
        Path | None, typer.Option("--input", help="A file with the columns of the task.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Or a split of the task's own data, such as valid.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the split lies, as for finetune.")
    ] = None,
) -> None:
    """Write a fine-tuned model's predictions for any file; prints the scores where labels are there."""
    from electra_ds.finetuning.predict import predict

    scores = predict(model, out, file, split, data)
    print(f"{out}: written" + "".join(f", {name} {value:.4f}" for name, value in scores.items()))


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a suite.")],
    out: Annotated[
        Path | None, typer.Option(help="Zip to write (default: DIR/submission.zip).")
    ] = None,
) -> None:
    """Write the GLUE submission of a suite."""
    from electra_ds.finetuning.submit import write_submission

    out = out or folder / "submission.zip"
    for note in write_submission(folder, out):
        print(note)
    print(f"{out}: written")
