"""The verbs on the command line. Imports stand inside each verb, so that `--help` answers at once."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from electra_ds.errors import RunFailure, UserError

if TYPE_CHECKING:
    from electra_ds.shards import Manifest

app = typer.Typer(
    name="electra-ds",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


@app.callback()
def root() -> None:
    """Pretrain text encoders by replaced token detection (ELECTRA) on DeepSpeed."""


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

    if ("://" in out) != (work is not None):
        raise UserError(
            f"--out {out}, --work {work}: expected --work DIR, to prepare in, for an --out at a URL alone"
        )
    with mpi_ranks() as others:
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
    from electra_ds.shards import read_manifest

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
    from electra_ds.files import write_bytes
    from electra_ds.shards import read_manifest

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
        _print_table(title, head, rows)


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
    from data_tools.inspect import describe_rows

    for line in describe_rows(data, split, rows or range(3), source=source, inputs=input or ()):
        print(line)


@app.command()
def check(
    run: Run,
    engine: Engine = None,
    world_size: Annotated[int, typer.Option(help="Ranks the run is meant for.")] = 1,
    data: Annotated[
        str | None, typer.Option(help="Prepared data, for epochs and the vocabulary.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Show every value with its meaning, derived numbers, parameters and memory; refuse what would fail later."""
    from electra_ds.check import Line, check
    from electra_ds.config import FactoryRun, load_run
    from electra_ds.cost import device_here, memory
    from electra_ds.sources import open_data

    report = check(load_run(run, sets or [], engine), world_size, open_data(data) if data else None)
    for title, lines in (
        ("config", report.fields),
        (f"derived, {world_size} rank(s)", report.derived),
    ):
        _print_table(title, Line._fields, lines)
    if isinstance(report.config, FactoryRun):
        return  # what code of the user's own keeps for backward is not known
    head = ("ZeRO stage", "precision", "states", "buckets", "activations", "peak")
    rows = (
        (
            str(stage),
            name,
            *(f"{n / 2**30:.3f}" for n in (need.states, need.buckets, need.activations, need.peak)),
        )
        for (stage, name), need in memory(report.config, world_size).items()
    )
    where = "a GPU" if device_here() == "cuda" else "a CPU (a GPU keeps less of attention)"
    _print_table(
        f"GiB a rank at most, activations as on {where}, not compiled, without offload", head, rows
    )


def _print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in head), show_header=bool(head))
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(f"\n{title}", table, sep="\n")


@app.command()
def pretrain(
    run: Run,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it is resumed.")],
    engine: Engine = None,
    sets: Sets = None,
    world_size: Annotated[
        int | None, typer.Option(help="Refuse to start with another number of ranks.")
    ] = None,
    stop_at_step: Annotated[
        int | None, typer.Option(help="Save and leave with exit code 85 after this step.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Save and leave with exit code 85 after this time.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a finished run, total_steps raised.")
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of a run or checkpoint.")
    ] = None,
) -> None:
    """Pretrain under deepspeed, torchrun, srun, mpirun, or alone. The same --out resumes."""
    from electra_ds.config import load_run
    from electra_ds.ranks import find_ranks

    config = load_run(run, sets or [], engine)
    ranks = find_ranks(promised=world_size)
    from electra_ds.pretrain import Limits, pretrain

    _leave(pretrain(config, data, out, ranks, Limits(stop_at_step, max_minutes, extend, init_from)))


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each.")] = False,
) -> None:
    """What a run is doing, from its files alone: step, ETA, losses, checkpoint, failures, what to do next."""
    import json

    from electra_ds.status import lines, status

    for facts in map(status, runs):
        if as_json:
            print(json.dumps(facts))
        else:
            _print_table(facts["out"], (), lines(facts).items())


@app.command()
def evaluate(
    model: Model,
    data: Data,
    max_rows: Annotated[
        int | None, typer.Option(help="Held-out rows to read of each source (default: all).")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Held-out losses, accuracies, AUC, precision and recall of a checkpoint."""
    import json

    from electra_ds.evaluate import evaluate_checkpoint, find_checkpoint

    values = evaluate_checkpoint(model, data, max_rows, trust_code=trust_code)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    print(f"{find_checkpoint(model)}, held-out rows of {data}")
    for key, value in values.items():
        print(
            f"  {key:24} {value:,.0f}"
            if key.endswith(("tokens", "chosen"))
            else f"  {key:24} {value:.4f}"
        )


@app.command()
def finetune(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Run, checkpoint, fine-tuned or Hugging Face model."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the suite; finished seeds in it are kept.")],
    tasks: Annotated[
        str,
        typer.Option(help="GLUE tasks (rte,cola; glue: all nine) and TASK.json files, by commas."),
    ],
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="small, base, large, tiny, or a JSON.")
    ] = "small",
    data: Annotated[
        Path | None, typer.Option(help="Folder with CoLA, RTE, ..., or one task's own.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per task, from train.seed on.")] = 1,
    engine: Engine = None,
    sets: Sets = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Spread seeds over the ranks, a world each.")
    ] = False,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="The same from random weights.")
    ] = False,
) -> None:
    """Fine-tune on GLUE or own tasks, several seeds each; alone or under any launcher."""
    from electra_ds.glue.config import load_finetune
    from electra_ds.glue.tasks import task_names
    from electra_ds.ranks import find_ranks

    found, ranks = load_finetune(config, sets or [], engine), find_ranks()
    from electra_ds.glue.finetune import finetune

    names = task_names(tasks)
    code = finetune(
        found, model, names, seeds, data, out, ranks, spread=spread, random_init=random_init
    )
    if ranks.rank == 0 and code == 0:
        print(
            f"{out}/report.md" if spread else (out / "report.md").read_text(encoding="utf-8"),
            flush=True,
        )
    _leave(code)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="FINETUNED", help="DIR/TASK, or DIR/TASK/seed-N.")
    ],
    out: Annotated[Path, typer.Option(help="TSV to write: index, prediction, probabilities.")],
    file: Annotated[
        Path | None, typer.Option("--input", help="A file with the columns of the task.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Or a split of the task's own data, such as valid.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the split lies, as for finetune.")
    ] = None,
) -> None:
    """Write a fine-tuned model's predictions for any file; prints the scores where labels are there."""
    from electra_ds.glue.predict import predict

    scores = predict(model, out, file, split, data)
    print(f"{out}: written" + "".join(f", {name} {value:.4f}" for name, value in scores.items()))


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a suite.")],
    out: Annotated[
        Path | None, typer.Option(help="Zip to write (default: DIR/submission.zip).")
    ] = None,
) -> None:
    """Write the GLUE submission of a suite."""
    from electra_ds.glue.submit import write_submission

    out = out or folder / "submission.zip"
    for note in write_submission(folder, out):
        print(note)
    print(f"{out}: written")


@app.command()
def detect(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="A text; without it, standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Read the text from it.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The text before the change, shown beside it.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Mark tokens from this probability on.")] = 0.5,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Its tokenizer (default: the run folder's).")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Probability of being replaced, for each token of a text."""
    import json

    from electra_ds.detect import Detector, table

    if text is not None and file is not None:
        raise UserError("a TEXT and --file were both given; choose one")
    if text is None:
        try:
            text = (file.read_bytes() if file is not None else sys.stdin.buffer.read()).decode(
                "utf-8"
            )
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file or 'standard input'}: not UTF-8 at byte {error.start}; convert it first"
            ) from None
    detector = Detector.load(model, tokenizer, trust_code)
    found = detector(text)
    if as_json:
        print(json.dumps([score._asdict() for score in found], indent=1, ensure_ascii=False))
        return
    for line in table(found, threshold, detector(original) if original is not None else None):
        print(line)


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="New folder: discriminator/ and generator/, or a fine-tuned model itself."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Its tokenizer (default: the one beside it).")
    ] = None,
) -> None:
    """Write a run, a checkpoint or a fine-tuned model as stock Hugging Face folders."""
    from electra_ds.export import export

    for line in export(model, out, tokenizer):
        print(line)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Hugging Face ELECTRA or BERT folder, TF checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option(help="New run folder, for `pretrain OUT/config.json --init-from OUT`.")
    ],
    run: Annotated[str, typer.Option(help="RUN with all that the weights do not say.")] = "small",
    generator: Annotated[
        Path | None, typer.Option(help="The generator's folder, beside a discriminator.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON with num_attention_heads, for a TF checkpoint.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Its vocabulary (default: the one in SRC).")
    ] = None,
    sets: Sets = None,
) -> None:
    """Make a run folder at step 0 from others' weights; every tensor is accounted for."""
    from electra_ds.import_weights import import_weights

    account = import_weights(
        source, out, run, sets or [], generator=generator, config=config, tokenizer=tokenizer
    )
    for foreign, ours in account.read:
        print(f"read  {foreign} -> {ours}")
    for ours in account.made:
        print(f"made  {ours}")
    for foreign, reason in account.left.items():
        print(f"left  {foreign} ({reason})")
    for warning in account.warnings:
        print(f"note: {warning}")
    print(f"{out}: {len(account.read)} read, {len(account.made)} made, {len(account.left)} left")


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Run folders, drawn into one picture.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Picture (default: curves.png in the first run folder).")
    ] = None,
) -> None:
    """Draw the curves of metrics.jsonl."""
    from electra_ds.plot import plot

    target = out or runs[0] / "curves.png"
    plot(runs, target)
    print(target)


def main() -> None:
    """Run a verb; a user's mistake becomes one message and exit code 2, a run that cannot go on exit code 1."""
    try:
        app()
    except (UserError, RunFailure) as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        _leave(2 if isinstance(error, UserError) else 1, f"electra-ds{rank}: error: {error}\n")
    except Exception:
        _leave(1, traceback.format_exc())


def _leave(code: int, last_words: str = "") -> NoReturn:
    # Threads of gloo or NCCL may wait for ranks that are gone, or abort after all work is done: an ordinary exit would
    # hang on them or lie about the code.
    for stream, text in ((sys.stdout, ""), (sys.stderr, last_words)):
        with contextlib.suppress(OSError):  # whoever read them may be gone
            print(text, end="", file=stream, flush=True)
    if code in (1, 2) and (
        mpi := sys.modules.get("mpi4py.MPI")
    ):  # or srun leaves the other ranks waiting
        time.sleep(1)  # a launcher that is told to abort may drop what was printed just before
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
