"""Verbs of data: train-tokenizer, prepare, convert, stage, verify, stats, inspect.

Imports stand inside each verb, so that `--help` is fast.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from electra_ds.cli.console import app, print_table
from electra_ds.cli.options import (
    Format,
    Inputs,
    Kind,
    NearDuplicates,
    Packing,
    RepeatedLines,
    TextField,
)
from electra_ds.common.errors import UserError

if TYPE_CHECKING:
    from electra_ds.data.shard_format import Manifest


@app.command()
def train_tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the vocabulary.")],
    kind: Kind = "wordpiece",
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.")] = 30522,
    lowercase: Annotated[bool, typer.Option(help="Lower-case the text.")] = True,
    strip_accents: Annotated[
        bool | None, typer.Option(help="Strip accents (default: as lower-case).")
    ] = None,
    format: Format = "auto",
    text_field: TextField = "text",
) -> None:
    """Train a WordPiece or SentencePiece vocabulary on text."""
    from data_tools.train_tokenizer import train_tokenizer
    from data_tools.workers import console_progress

    with console_progress() as progress:
        tokenizer = train_tokenizer(
            inputs,
            out,
            kind=kind,
            vocab_size=vocab_size,
            lowercase=lowercase,
            strip_accents=strip_accents,
            format=format,
            text_field=text_field,
            progress=progress,
        )
    print(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size:,} entries")


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="vocab.txt, spm.model, or a folder with one.")],
    out: Annotated[
        str,
        typer.Option(help="Data folder, an unfinished one is gone on with; or a URL, with --work."),
    ],
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
    packing: Packing = "best_fit",
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.005,
    workers: Annotated[
        int, typer.Option(help="Processes; the bytes written are the same for any number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the document shuffle.")] = 0,
    deduplicate: Annotated[
        bool, typer.Option(help="Drop documents whose text was seen before.")
    ] = True,
    near_duplicates: NearDuplicates = None,
    min_chars: Annotated[int, typer.Option(help="Drop shorter documents.")] = 1,
    drop_repeated_lines: RepeatedLines = False,
    keep: Annotated[
        str | None, typer.Option(help="package.module:function, (text) -> bool: what stays.")
    ] = None,
    max_bad_fraction: Annotated[
        float, typer.Option(help="Fail when more of the lines cannot be read.")
    ] = 0.001,
    units: Annotated[
        Path | None, typer.Option(help="Keep tokenized units here, for other lengths.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Of an --out at a URL: prepare here, then copy there.")
    ] = None,
    format: Format = "auto",
    text_field: TextField = "text",
) -> None:
    """Turn text into packed rows in WebDataset tar shards, with a held-out split; alone, under mpirun or srun."""
    from data_tools.prepare import prepare
    from data_tools.stage import stage
    from data_tools.workers import console_progress, mpi_ranks
    from electra_ds.cluster.launchers import find_ranks, mpi_world

    if ("://" in out) != (work is not None):
        raise UserError(
            f"--out {out}, --work {work}: expected --work DIR, to prepare in, for an --out at a URL alone"
        )
    ranks = find_ranks()
    otherwise = "prepare on one machine with --workers"
    world = mpi_world(ranks, otherwise) if ranks.world_size > 1 else None
    with mpi_ranks(world) as others:
        if others is None:
            return
        with console_progress() as progress:
            manifest = prepare(
                inputs,
                tokenizer,
                work or out,
                sequence_length=sequence_length,
                packing=packing,
                valid_fraction=valid_fraction,
                workers=workers,
                ranks=others,
                seed=seed,
                deduplicate=deduplicate,
                near_duplicates=near_duplicates,
                min_chars=min_chars,
                drop_repeated_lines=drop_repeated_lines,
                keep=keep,
                max_bad_fraction=max_bad_fraction,
                units=units,
                format=format,
                text_field=text_field,
                progress=progress,
            )
            if work:
                stage(str(work), out, progress=progress)
    _print_splits(out, manifest)
    gone = {**manifest.removed, **manifest.bad_lines}
    print(
        f"removed: {', '.join(f'{count:,} {reason}' for reason, count in gone.items()) or 'nothing'}"
    )


def _print_splits(out: str | Path, manifest: "Manifest") -> None:
    for name, split in manifest.splits.items():
        share = split.pad / (split.rows * manifest.sequence_length) if split.rows else 0.0
        found = f"{split.documents:,} documents, {split.tokens:,} tokens, {split.rows:,} rows, padding {share:.2%}"
        print(f"{out} {name}: {found}")


@app.command()
def convert(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="TFRecords: files, folders, globs, URLs.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="The vocabulary that the rows were made with.")],
    out: Annotated[Path, typer.Option(help="Data folder; an unfinished one is gone on with.")],
    valid_fraction: Annotated[float, typer.Option(help="Share of the rows held out.")] = 0.005,
    workers: Annotated[
        int, typer.Option(help="Processes; the bytes written are the same for any number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
) -> None:
    """Turn the pretraining TFRecords of google-research/electra into shards, row by row, without TensorFlow."""
    from data_tools.convert import convert
    from data_tools.workers import console_progress

    with console_progress() as progress:
        manifest = convert(
            sources,
            tokenizer,
            out,
            valid_fraction=valid_fraction,
            workers=workers,
            seed=seed,
            progress=progress,
        )
    _print_splits(out, manifest)


@app.command()
def stage(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Data folder, or its URL.")],
    to: Annotated[str, typer.Option(help="Where the copy goes: a folder of this node, or a URL.")],
    workers: Annotated[int, typer.Option(min=1, help="Files copied at a time.")] = 4,
) -> None:
    """Copy a data folder, checked by sha256: to a node's own disk, once however many ranks ask, or to a URL."""
    from data_tools.stage import stage
    from data_tools.workers import console_progress

    with console_progress() as progress:
        copied = stage(source, to, workers=workers, progress=progress)
    print(f"{to}: {f'{copied:,} bytes copied' if copied else 'was complete'}")


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
) -> None:
    """Re-read a data folder against its manifest; says what is wrong, by shard and block."""
    from data_tools.verify import verify
    from data_tools.workers import console_progress, summed
    from electra_ds.data.shard_format import read_manifest

    total = sum(
        shard.bytes for split in read_manifest(data).splits.values() for shard in split.shards
    )
    with console_progress() as progress:
        problems = verify(data, summed(lambda done: progress("verify", done, total)))
    for problem in problems:
        print(problem)
    print(
        f"{data}: {len(problems)} problem(s)" if problems else f"{data}: {total:,} bytes as written"
    )
    if problems:
        raise typer.Exit(1)


@app.command()
def stats(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the report as a page with plots, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Documents, lengths, vocabulary coverage, unknown words and what was removed, of a data folder."""
    import json

    from data_tools.stats import page, stats, tables
    from data_tools.workers import console_progress, summed
    from electra_ds.common.files import write_bytes
    from electra_ds.data.shard_format import read_manifest

    total = sum(
        shard.bytes for split in read_manifest(data).splits.values() for shard in split.shards
    )
    with contextlib.nullcontext(lambda *_: None) if as_json else console_progress() as progress:
        facts = stats(data, summed(lambda done: progress("read", done, total)))
    if html:
        write_bytes(html, page(facts, str(data)).encode())
    if as_json:
        print(json.dumps(facts))
        return
    for title, head, rows in tables(facts):
        print_table(title, head, rows)


@app.command()
def inspect(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
    rows: Annotated[
        list[int] | None, typer.Argument(metavar="ROW", help="Row numbers (default: 0 1 2).")
    ] = None,
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    source: Annotated[
        bool, typer.Option("--source", help="Say where each piece comes from.")
    ] = False,
    input: Annotated[
        list[str] | None, typer.Option(help="As for prepare: show how documents begin.")
    ] = None,
) -> None:
    """Show rows decoded, with the boundaries of their pieces."""
    from data_tools.inspect_rows import describe_rows

    for line in describe_rows(data, split, rows or range(3), source=source, inputs=input or ()):
        print(line)
