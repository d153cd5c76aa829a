"""Verbs of fine-tuning: finetune, predict, submit.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app, leave, progress_line
from electra_ds.cli.options import Engine, Sets
from electra_ds.common.printable import printable, printable_lines
from electra_ds.common.redaction import redacted


@app.command()
def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Run, checkpoint, fine-tuned model or Hugging Face folder."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Output folder of the suite; finished seeds in it are kept.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated tasks: of GLUE (rte,cola; glue for all nine), of SuperGLUE "
            "(boolq,superglue-rte; superglue for all eight), squad, squad2, conll2000, conll2003, "
            "TASK.json files."
        ),
    ],
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="Recipe (tiny, small, base, large) or a JSON file."),
    ] = "small",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with CoLA, RTE, SQuAD, ..., or the folder of one task."),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, max=10_000, help="Number of seeds per task, starting at train.seed."),
    ] = 1,
    engine: Engine = None,
    sets: Sets = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Run seeds in parallel, one per rank.")
    ] = False,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Start from random weights, for comparison.")
    ] = False,
) -> None:
    """Fine-tune on GLUE, SuperGLUE, SQuAD or other tasks.

    Runs in one process or under any launcher. A call with the same --out resumes.
    """
    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.finetuning.config import load_finetune
    from electra_ds.finetuning.tasks import task_names

    recipe = load_finetune(config, sets or [], engine)
    ranks = find_ranks()
    from electra_ds.finetuning.finetune import finetune

    names = task_names(tasks)
    code = finetune(
        recipe, model, names, seeds, data, out, ranks, spread=spread, random_init=random_init
    )
    # Under torchrun a stopped suite has the code 0, too; it may not have a report yet.
    report = out / "report.md"
    if ranks.rank == 0 and code == 0 and report.is_file():
        text = str(report) if spread else report.read_text(encoding="utf-8", errors="replace")
        print(redacted(printable_lines(text)), flush=True)
    leave(code)


@app.command()
def predict(
    model: Annotated[
        Path,
        typer.Argument(metavar="FINETUNED", help="Fine-tuned model: DIR/TASK, or DIR/TASK/seed-N."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Output TSV: index, prediction, probabilities. Answers to questions: also JSON."
        ),
    ],
    file: Annotated[
        Path | None, typer.Option("--input", help="File with the columns of the task.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the task's data, such as valid, instead of --input."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data folder of the split, as for finetune.")
    ] = None,
) -> None:
    """Write predictions of a fine-tuned model.

    Scores are printed if the file has labels.
    """
    from electra_ds.finetuning.predict import predict

    scores, notes = predict(model, out, file, split, data, progress_line("examples"))
    for note in notes:
        print(printable(f"WARNING: {note}"))
    shown = "".join(f", {name} {value:.4f}" for name, value in scores.items())
    print(printable(f"{out}: written{shown}"))


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of finetune.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Output zip (default: DIR/submission.zip, or DIR/superglue.zip)."),
    ] = None,
    superglue: Annotated[
        bool,
        typer.Option("--superglue", help="The zip of SuperGLUE, in a suite that has GLUE, too."),
    ] = False,
) -> None:
    """Write the zip for the GLUE or SuperGLUE site.

    A suite without tasks of GLUE gives the zip of SuperGLUE.
    """
    from electra_ds.finetuning.submit import write_submission
    from electra_ds.finetuning.superglue_submit import has_superglue_alone, write_superglue

    superglue = superglue or has_superglue_alone(folder)
    out = out or folder / ("superglue.zip" if superglue else "submission.zip")
    for note in write_superglue(folder, out) if superglue else write_submission(folder, out):
        print(printable(note))
    print(printable(f"{out}: written"))
