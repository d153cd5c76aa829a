"""Verbs between formats: export, import.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app
from electra_ds.cli.options import Sets
from electra_ds.common.printable import printable


@app.command()
def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Run folder (its latest checkpoint), checkpoint or fine-tuned model.",
        ),
    ],
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
        print(printable(line))


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face folder of ELECTRA, BERT, ModernBERT or DeBERTa-v2, or a TensorFlow "
            "checkpoint.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="New run folder, for `pretrain OUT/config.json --init-from OUT`.")
    ],
    run: Annotated[
        str | None,
        typer.Option(
            help="Preset or RUN.json with the values that the weights do not determine (default: "
            "small, modern-small for ModernBERT, deberta-v3-small for DeBERTa-v2)."
        ),
    ] = None,
    generator: Annotated[
        Path | None, typer.Option(help="Folder of the generator, if SRC is a discriminator.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON with hidden_size and num_attention_heads, for TensorFlow."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Vocabulary (default: the one in SRC).")
    ] = None,
    sets: Sets = None,
) -> None:
    """Write a run folder at step 0 from imported weights.

    OUT/import.json lists every tensor: loaded, initialized, or unused with the reason.
    """
    from electra_ds.interop.import_weights import import_weights

    report = import_weights(
        source, out, run, sets or [], generator=generator, config=config, tokenizer=tokenizer
    )
    for warning in report.warnings:
        print(printable(f"WARNING: {warning}"))
    for reason, count in Counter(report.unused.values()).items():
        print(printable(f"unused: {count} ({reason})"))
    print(
        f"{out}: {len(report.loaded)} loaded, {len(report.initialized)} initialized, "
        f"{len(report.unused)} unused; {out}/import.json lists them"
    )
