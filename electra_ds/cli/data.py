"""Verbs of data: train-tokenizer, prepare, convert, stage, verify, stats, inspect.

Each verb imports its modules in its own body, so that `--help` is fast.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from electra_ds.cli.console import app, print_json, print_table
from electra_ds.cli.options import (
    BadFraction,
    Format,
    Inputs,
    Kind,
    NearDuplicates,
    Packing,
    RepeatedLines,
    TextField,
)
from electra_ds.common.errors import UserError
from electra_ds.common.printable import counted, printable, shortened
from electra_ds.common.redaction import redacted
from electra_ds.common.urls import file_system, is_url

MOST_DIGITS = 18  # of a row number

if TYPE_CHECKING:
    from electra_ds.data.shard_format import Manifest


@app.command()
def train_tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder in which the vocabulary is written.")],
    kind: Kind = "wordpiece",
    vocab_size: Annotated[
        int, typer.Option(help="Number of entries, special tokens included.")
    ] = 30522,
    lowercase: Annotated[
        bool | None,
        typer.Option(help="Lower-case the text (default: yes; byte_bpe keeps the case)."),
    ] = None,
    strip_accents: Annotated[
        bool | None,
        typer.Option(
            help="WordPiece: strip accents (default: with --lowercase, if 90 % of the letters are "
            "Latin or Greek and at most 0.25 % of the words become equal to a more frequent word). "
            "Stripping makes different words equal in Vietnamese, Russian, French, Hindi, Korean "
            "and many other languages."
        ),
    ] = None,
    format: Format = "auto",
    text_field: TextField = "text",
    max_bad_fraction: BadFraction = 0.001,
) -> None:
    """Train a vocabulary on text, of one of four kinds."""
    from data_tools.train_tokenizer import train_tokenizer
    from data_tools.workers import console_progress

    facts: list[str] = []
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
            max_bad_fraction=max_bad_fraction,
            progress=progress,
            say=facts.append,
        )
    print(f"{printable(out)}: {tokenizer.describe()}", *facts, sep="\n")


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        Path,
        typer.Option(
            help="vocab.txt, spm.model, tokenizer.json (byte-level BPE, or WordPiece as BERT's), or "
            "a folder with one of them."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Output data folder (an interrupted prepare resumes), "
            "or a URL together with --work."
        ),
    ],
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
    packing: Packing = "best_fit",
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.005,
    workers: Annotated[
        int, typer.Option(help="Number of processes; the output is the same for any number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the document shuffle.")] = 0,
    deduplicate: Annotated[
        bool, typer.Option(help="Drop documents with a text that occurred before.")
    ] = True,
    near_duplicates: NearDuplicates = None,
    min_chars: Annotated[int, typer.Option(help="Drop documents with fewer characters.")] = 1,
    drop_repeated_lines: RepeatedLines = False,
    keep: Annotated[
        str | None,
        typer.Option(help="package.module:function, (text) -> bool; False drops the document."),
    ] = None,
    max_bad_fraction: BadFraction = 0.001,
    units: Annotated[
        Path | None,
        typer.Option(help="Keep the tokenized units in this folder, for other sequence lengths."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Local folder in which to prepare when --out is a URL.")
    ] = None,
    lowercase: Annotated[
        bool | None,
        typer.Option(
            help="For a vocab.txt without options: lower-case the text (default: if no entry has "
            "a capital)."
        ),
    ] = None,
    strip_accents: Annotated[
        bool | None,
        typer.Option(
            help="For a vocab.txt without options: strip accents (default: if lower-cased, as "
            "BERT). In Vietnamese, Russian, Japanese, Hindi or Korean text this strips meaning."
        ),
    ] = None,
    normalization: Annotated[
        Literal["nfc", "none"] | None,
        typer.Option(
            help="For a vocab.txt without options: put text into Unicode NFC before (default: "
            "none, as BERT)."
        ),
    ] = None,
    format: Format = "auto",
    text_field: TextField = "text",
) -> None:
    """Write text as packed rows in WebDataset tar shards.

    A share of the documents is held out. Runs in one process, or on the ranks of mpirun or srun.
    """
    from data_tools.prepare import prepare
    from data_tools.stage import stage
    from data_tools.workers import console_progress, mpi_ranks
    from electra_ds.cluster.launchers import find_ranks, mpi_world
    from electra_ds.data.tokenizer import load_tokenizer

    if is_url(out) != (work is not None):
        raise UserError(
            f"--out {out}, --work {work}: expected --work DIR exactly if --out is a URL"
        )
    if is_url(out):
        file_system(out)  # UserError for a protocol that is not opened, before the work
    ranks = find_ranks()
    otherwise = "prepare on one machine with --workers"
    world = mpi_world(ranks, otherwise) if ranks.world_size > 1 else None
    with mpi_ranks(world) as others:
        if others is None:
            return
        words = load_tokenizer(
            tokenizer,
            lowercase=lowercase,
            strip_accents=strip_accents,
            normalization=normalization,
        )
        with console_progress() as progress:
            manifest = prepare(
                inputs,
                words,
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
    print(f"{tokenizer}: {words.describe()}")
    _print_splits(out, manifest)
    _print_unknowns(manifest)
    removed = {**manifest.removed, **manifest.bad_lines}
    counts = ", ".join(f"{count:,} {printable(reason)}" for reason, count in removed.items())
    print(f"removed: {counts or 'nothing'}")


def _print_splits(out: str | Path, manifest: "Manifest") -> None:
    for name, split in manifest.splits.items():
        share = split.pad / (split.rows * manifest.sequence_length) if split.rows else 0.0
        print(
            f"{printable(redacted(str(out)))} {name}: "
            f"{counted(split.documents, 'document')}, {counted(split.tokens, 'token')}, "
            f"{counted(split.rows, 'row')}, padding {share:.2%}"
        )


def _print_unknowns(manifest: "Manifest") -> None:
    """Print the share of [UNK] in the input, if it is on record; warn of a large one."""
    from data_tools.pipeline.characters import SHOWN, WARN
    from electra_ds.common.printable import word_shown
    from electra_ds.data.tokenizer.wordpiece import LONG_WORDS

    unknowns = manifest.unknowns
    if unknowns is None or unknowns.share is None:
        return
    of_characters = unknowns.share_of_characters
    line = f"[UNK]: {unknowns.share:.2%} of the tokens"
    if of_characters is not None and unknowns.looked_at:
        line += f", {of_characters:.2%} of the characters"
    if unknowns.words:
        line += f", most frequent: {' '.join(map(word_shown, list(unknowns.words)[:SHOWN]))}"
    if max(unknowns.share, of_characters or 0.0) > WARN:
        is_long = 2 * (unknowns.long_characters or 0) > (unknowns.unknown_characters or 0)
        advice = (
            LONG_WORDS
            if is_long
            else "compare the vocabulary, --lowercase, --strip-accents and --normalization with "
            "the text"
        )
        line = f"WARNING: {line}; {advice}"
    print(line)


@app.command()
def convert(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="TFRecords: files, folders, globs, URLs.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Vocabulary with which the rows were made.")],
    out: Annotated[Path, typer.Option(help="Output data folder; an interrupted convert resumes.")],
    valid_fraction: Annotated[float, typer.Option(help="Share of the rows held out.")] = 0.005,
    workers: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="Number of processes; the output is the same for any number."
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
) -> None:
    """Convert TFRecords of google-research/electra to shards.

    Every row is kept as it is. TensorFlow is not needed.
    """
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
    to: Annotated[str, typer.Option(help="Target: a folder of this node, or a URL.")],
    workers: Annotated[int, typer.Option(min=1, help="Number of files copied at a time.")] = 4,
) -> None:
    """Copy a data folder to the disk of a node, or to a URL.

    Files are checked by sha256. Several ranks of a node make one copy.
    """
    from data_tools.stage import stage
    from data_tools.workers import console_progress

    with console_progress() as progress:
        copied = stage(source, to, workers=workers, progress=progress)
    result = f"{copied:,} bytes copied" if copied else "was complete"
    print(f"{printable(redacted(to))}: {result}")


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
) -> None:
    """Compare a data folder with its manifest.

    Damage is reported by shard and block, with exit code 1.
    """
    from data_tools.verify import verify
    from data_tools.workers import console_progress, running_total
    from electra_ds.data.shard_format import read_manifest

    total = sum(
        shard.bytes for split in read_manifest(data).splits.values() for shard in split.shards
    )
    with console_progress() as progress:
        problems = verify(data, running_total(lambda done: progress("verify", done, total)))
    for problem in problems:
        print(printable(problem))
    result = f"{len(problems)} problem(s)" if problems else f"{total:,} bytes as written"
    print(f"{printable(data)}: {result}")
    if problems:
        raise typer.Exit(1)


@app.command()
def stats(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as an HTML page with plots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show statistics of a data folder.

    They cover documents, lengths, vocabulary coverage, unknown words and removed documents.
    """
    from data_tools.stats import stats, tables
    from data_tools.stats_html import html_page
    from data_tools.workers import console_progress, running_total
    from electra_ds.common.files import write_output
    from electra_ds.common.outputs import check_output_file, check_outside
    from electra_ds.data.shard_format import read_manifest

    total = sum(
        shard.bytes for split in read_manifest(data).splits.values() for shard in split.shards
    )
    if html:
        check_outside(html, "--html", {"DATA": data})
        check_output_file(html, "--html")
        is_inside = html.resolve().is_relative_to(data.resolve())
        if is_inside and html.is_file() and html.suffix not in (".html", ".htm"):
            raise UserError(
                f"--html {printable(html)}: is a file of the data folder and would be overwritten; "
                "choose another file"
            )
    with contextlib.nullcontext(lambda *_: None) if as_json else console_progress() as progress:
        facts = stats(data, running_total(lambda done: progress("read", done, total)))
    if html:
        write_output(html, html_page(facts, str(data)).encode())
        print(f"{printable(html)}: written", file=sys.stderr)
    if as_json:
        print_json(facts)
        return
    for title, head, rows in tables(facts):
        print_table(title, head, rows)


@app.command()
def inspect(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `prepare` wrote.")],
    rows: Annotated[
        list[str] | None, typer.Argument(metavar="ROW", help="Row numbers (default: 0 1 2).")
    ] = None,
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    source: Annotated[
        bool, typer.Option("--source", help="Show the source file of each document fragment.")
    ] = False,
    input: Annotated[
        list[str] | None,
        typer.Option(help="The inputs of prepare: also show how each source document begins."),
    ] = None,
) -> None:
    """Show rows as text, with document boundaries."""
    from data_tools.inspect_rows import describe_rows

    numbers = [_row_number(row) for row in rows or ("0", "1", "2")]
    for line in describe_rows(data, split, numbers, source=source, inputs=input or ()):
        print(printable(line))


def _row_number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > MOST_DIGITS:
        raise UserError(
            f"ROW = {shortened(text)}; expected a row number, 0 or more; --source has no value, "
            "and --input names the files that `prepare` read"
        )
    return int(text)
