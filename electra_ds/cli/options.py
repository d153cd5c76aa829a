"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="tiny, small, base, large, small++, or a RUN.json.")
]
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A run folder (its latest checkpoint) or a checkpoint."),
]
Data = Annotated[
    str, typer.Option(help="Folder that `prepare` wrote, a URL of one, or a MIX.json of several.")
]
Engine = Annotated[
    str | None, typer.Option(help="zero0 to zero3, with -fp32, -bf16, -fp16, or a DeepSpeed JSON.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="section.field=value; may be repeated.")
]
INPUT = "File, folder, glob, URL, dataset:NAME?config=C&split=S or builtin:docs; repeatable."
Inputs = Annotated[list[str], typer.Option("--input", help=INPUT)]
Format = Annotated[
    str,
    typer.Option(help="auto, text, text_file (one document), wikitext, wiki, jsonl, webdataset."),
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Let the checkpoint's model.factory run its code.")
]
TextField = Annotated[
    str, typer.Option(help="Field of JSONL, column of a table; of webdataset txt, json.FIELD.")
]
RepeatedLines = Annotated[
    bool, typer.Option("--drop-repeated-lines", help="Of a document's equal lines keep one.")
]
NearDuplicates = Annotated[
    float | None, typer.Option(help="Drop documents so similar to an earlier one: 0.5 to 1.")
]
Kind = Annotated[
    Literal["wordpiece", "unigram", "bpe"],
    typer.Option(help="WordPiece, or a SentencePiece model."),
]
Packing = Annotated[
    Literal["best_fit", "concat", "google"], typer.Option(help="How pieces of documents fill rows.")
]
