"""Verbs of a trained model: evaluate, detect.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app
from electra_ds.cli.options import Data, Model, TrustCode
from electra_ds.common.errors import UserError


@app.command()
def evaluate(
    model: Model,
    data: Data,
    max_rows: Annotated[
        int | None, typer.Option(help="Largest number of held-out rows per source (default: all).")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show losses and accuracies on held-out rows.

    AUC, precision and recall of the detection of replaced tokens are included.
    """
    import json

    from electra_ds.evaluation.evaluate import evaluate_checkpoint
    from electra_ds.training.checkpoint import find_checkpoint

    values = evaluate_checkpoint(model, data, max_rows, trust_code=trust_code)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    print(f"{find_checkpoint(model)}, held-out rows of {data}")
    for key, value in values.items():
        is_count = key.endswith(("tokens", "chosen"))
        print(f"  {key:24} {value:,.0f}" if is_count else f"  {key:24} {value:.4f}")


@app.command()
def detect(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Text to score (default: standard input).")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File with the text to score.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="Original text; its scores are shown in more columns.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Mark tokens with at least this probability.")
    ] = 0.5,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer (default: that of the run folder).")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show for each token how likely it was replaced."""
    import json

    from electra_ds.evaluation.detect import Detector, table

    if text is not None and file is not None:
        raise UserError("TEXT and --file were both given; choose one of them")
    if text is None:
        try:
            text = (file.read_bytes() if file is not None else sys.stdin.buffer.read()).decode(
                "utf-8"
            )
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file or 'standard input'}: byte {error.start} is not UTF-8; convert it"
            ) from None
    detector = Detector.load(model, tokenizer, trust_code)
    scores = detector(text)
    if as_json:
        print(json.dumps([score._asdict() for score in scores], indent=1, ensure_ascii=False))
        return
    for line in table(scores, threshold, detector(original) if original is not None else None):
        print(line)
