"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Preset (tiny, small, base, large, small++, small-*, base-*, modern-* or deberta-*; "
        "see docs/models.md) or RUN.json.",
    ),
]
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Run folder (its latest checkpoint) or checkpoint."),
]
Data = Annotated[
    str,
    typer.Option(help="Folder that `prepare` wrote, its URL, or a MIX.json of several folders."),
]
DataOfRun = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="Folder that `prepare` wrote, its URL, or a MIX.json; in a run with phases also "
        "NAME=D, once for each data of the phases.",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="zero0 to zero3, optionally with -fp32, -bf16, -fp16 or -autocast; "
        "or a DeepSpeed JSON."
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="section.field=value; may be repeated.")
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="File, folder, glob, URL, dataset:NAME?config=C&split=S or builtin:docs; "
        "may be repeated.",
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="Input format: auto, text, text_file (one document per file), wikitext, wiki, jsonl, "
        "webdataset. CSV and TSV files are refused unless a format is set."
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Allow the checkpoint's model.factory to run its code."),
]
TextField = Annotated[
    str,
    typer.Option(
        help="Field of JSONL, or column of parquet, arrow or a dataset; for webdataset: txt or "
        "json.FIELD. Plain text has none."
    ),
]
BadFraction = Annotated[
    float, typer.Option(help="Fail if a larger share of the lines cannot be read.")
]
RepeatedLines = Annotated[
    bool,
    typer.Option("--drop-repeated-lines", help="Keep only the first of equal lines of a document."),
]
NearDuplicates = Annotated[
    float | None,
    typer.Option(help="Drop documents with at least this similarity to an earlier one (0.5 to 1)."),
]
Kind = Annotated[
    Literal["wordpiece", "unigram", "bpe", "byte_bpe"],
    typer.Option(
        help="WordPiece; unigram, bpe: a SentencePiece model; byte_bpe: a byte-level BPE, as of "
        "ModernBERT, which has no unknown characters."
    ),
]
Packing = Annotated[
    Literal["best_fit", "concat", "google"], typer.Option(help="How documents fill rows.")
]
