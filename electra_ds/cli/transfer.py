"""Verbs that write models: export, import, average.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app
from electra_ds.cli.options import Sets
from electra_ds.common.errors import UserError
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
            help="Hugging Face folder of ELECTRA, BERT, ModernBERT or DeBERTa-v2, a TensorFlow "
            "checkpoint, or a run or checkpoint of electra-ds (for a deeper or wider model).",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="New run folder, for `pretrain OUT/config.json --init-from OUT`.")
    ],
    run: Annotated[
        str | None,
        typer.Option(
            help="Preset or RUN.json with the values that the weights do not determine (default: "
            "small, modern-small for ModernBERT, deberta-v3-small for DeBERTa-v2; the config of SRC "
            "if that is a run)."
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

    OUT/import.json lists every tensor: loaded, initialized, or unused with the reason. A run of
    electra-ds is enlarged to the sizes of --run and --set by tiling its layers and matrices.
    """
    from electra_ds.interop.import_weights import import_weights

    report = import_weights(
        source, out, run, sets or [], generator=generator, config=config, tokenizer=tokenizer
    )
    for warning in report.warnings:
        print(printable(f"WARNING: {warning}"))
    for reason, count in Counter(report.unused.values()).items():
        print(printable(f"unused: {count} ({reason})"))
    for part, layers in (report.layers or {}).items():
        print(f"{part}: its {len(layers)} layers start from {', '.join(map(str, layers))}")
    print(
        f"{out}: {len(report.loaded)} loaded, {len(report.initialized)} initialized, "
        f"{len(report.unused)} unused; {out}/import.json lists them"
    )


@app.command()
def average(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="CKPT...", help="Checkpoints (O/ckpt/STEP) or run folders; at least two."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="New run folder, for evaluate, finetune, export and --init-from.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Numbers separated by commas, one for each CKPT; they are divided by their sum "
            "(default: equal weights)."
        ),
    ] = None,
) -> None:
    """Write the average of the weights of several checkpoints.

    All must have the same architecture, sizes and tokenizer. OUT has the config of the first CKPT;
    OUT/average.json lists the checkpoints.
    """
    from electra_ds.interop.average import average

    averaged = average(models, out, None if weights is None else _numbers(weights))
    for line in averaged.lines():
        print(printable(line))
    for part in averaged.checkpoints:
        if part.differences:
            print(printable(f"{part.path}: config differs: {'; '.join(part.differences)}"))
    count = len(averaged.checkpoints)
    print(printable(f"{out}: average of {count} checkpoints; {out}/average.json lists them"))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {printable(text)}: expected numbers separated by commas, such as 1,1,2"
        ) from None
