"""Verbs of a trained model: evaluate, detect.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from electra_ds.cli.console import app, print_json, progress_line
from electra_ds.cli.options import Data, Model, TrustCode
from electra_ds.common.encodings import CONVERT, HEAD, wide_encoding
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted

MAX_TEXT_BYTES = 1 << 24  # of detect


@app.command()
def evaluate(
    model: Model,
    data: Data,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Largest number of held-out rows per source (default: all)."),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show losses and accuracies on held-out rows.

    AUC, precision and recall of the detection of replaced tokens are included, and a word about
    it: learning, on the plateau, or collapsed.
    """
    import math

    from rich.cells import cell_len

    from electra_ds.config.loading import parse_run
    from electra_ds.evaluation.evaluate import evaluate_checkpoint
    from electra_ds.training.checkpoint import find_checkpoint, read_meta
    from electra_ds.training.verdict import word_of_evaluation

    progress = progress_line("rows")
    values = evaluate_checkpoint(model, data, max_rows, trust_code, progress)
    folder = find_checkpoint(model)
    config = parse_run(read_meta(folder).config, f"{folder}/meta.json")
    verdict = word_of_evaluation(values, config.verdict)
    if as_json:  # a value without a definition, such as an AUC without replaced tokens, is null
        known = {key: value if math.isfinite(value) else None for key, value in values.items()}
        print_json(known | ({"verdict": verdict} if verdict else {}), indent=2)
        return
    print(printable(redacted(f"{folder}, held-out rows of {data}")))
    names = {key: printable(key) for key in values}  # a mixture names its sources
    width = max(24, *map(cell_len, names.values()))
    for key, value in values.items():
        name = names[key] + " " * (width - cell_len(names[key]))
        is_count = key.endswith(("tokens", "chosen"))
        print(f"  {name} {value:,.0f}" if is_count else f"  {name} {value:.4f}")
    if verdict:
        print(f"  {'verdict':{width}} {verdict}")


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
        float, typer.Option(min=0, max=1, help="Mark tokens with at least this probability.")
    ] = 0.5,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer (default: that of the run folder).")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show for each token how likely it was replaced."""
    from electra_ds.evaluation.detect import Detector, TokenScore
    from electra_ds.evaluation.detect_table import align, table

    if threshold != threshold:  # NaN lies between all limits
        raise UserError("--threshold nan: expected a probability from 0 to 1")
    if text is not None and file is not None:
        raise UserError("TEXT and --file were both given; choose one of them")
    if text is None:
        try:
            with open(file, "rb") if file is not None else sys.stdin.buffer as stream:
                content = stream.read(MAX_TEXT_BYTES + 1)
            if len(content) > MAX_TEXT_BYTES:
                raise UserError(
                    f"{file or 'standard input'}: more than {MAX_TEXT_BYTES:,} bytes; expected "
                    "a shorter text"
                )
            if encoding := wide_encoding(content[:HEAD]):
                raise UserError(
                    f"{file or 'standard input'}: not text in UTF-8 but in {encoding}; convert it: "
                    f"iconv -f {encoding} -t UTF-8"
                )
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file or 'standard input'}: byte {error.start} is not UTF-8; {CONVERT}"
            ) from None
    detector = Detector.load(model, tokenizer, trust_code)
    scores = detector(text)
    before = detector(original) if original is not None else None
    if as_json:
        values: list[dict] = [score._asdict() for score in scores]
        if before is not None:
            nothing = dict.fromkeys(TokenScore._fields)
            values = [
                (score._asdict() if score else nothing)
                | {"original": other._asdict() if other else None}
                for score, other in align(scores, before)
            ]
        print_json(values, indent=1)
        return
    for line in table(scores, threshold, before):
        print(line)
    if note := detector.note(scores):
        print(note)
