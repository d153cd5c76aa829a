"""Verbs between formats: export, import.

Imports stand inside each verb, so that `--help` is fast.
"""

from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app
from electra_ds.cli.options import Model, Sets


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="New folder with discriminator/ and generator/, or with a fine-tuned model."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer (default: the one beside the model).")
    ] = None,
) -> None:
    """Write a model as Hugging Face folders."""
    from electra_ds.interop.export import export

    for line in export(model, out, tokenizer):
        print(line)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Hugging Face ELECTRA or BERT folder, or TensorFlow checkpoint."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="New run folder, for `pretrain OUT/config.json --init-from OUT`.")
    ],
    run: Annotated[
        str,
        typer.Option(help="Preset or RUN.json with the values that the weights do not determine."),
    ] = "small",
    generator: Annotated[
        Path | None, typer.Option(help="Folder of the generator, if SRC is a discriminator.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON with num_attention_heads, for a TensorFlow checkpoint."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Vocabulary (default: the one in SRC).")
    ] = None,
    sets: Sets = None,
) -> None:
    """Write a run folder at step 0 from foreign weights.

    Every tensor is listed as read, made (newly initialized) or left (not used).
    """
    from electra_ds.interop.import_weights import import_weights

    report = import_weights(
        source, out, run, sets or [], generator=generator, config=config, tokenizer=tokenizer
    )
    for foreign, ours in report.loaded:
        print(f"read  {foreign} -> {ours}")
    for ours in report.initialized:
        print(f"made  {ours}")
    for foreign, reason in report.unused.items():
        print(f"left  {foreign} ({reason})")
    for warning in report.warnings:
        print(f"note: {warning}")
    counts = f"{len(report.loaded)} read, {len(report.initialized)} made, {len(report.unused)} left"
    print(f"{out}: {counts}")
