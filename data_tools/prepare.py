"""Text in, a data folder out: plan -> units -> duplicates -> shards -> manifest, resumable, the same for any workers.

Every step is a function of what lies on disk before it, so a killed run goes on where it was: finished units and
shards have markers with sizes and hashes, and the manifest is written last.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.assemble import SPLITS, ShardTask, assemble_shard, find_duplicates, in_split, is_duplicate, read_table, shard_record
from data_tools.corpus import PLACES
from data_tools.pack import PACKINGS
from data_tools.plan import UNIT_BYTES, Plan, make_plan, plan_hash
from data_tools.units import UnitTask, tokenize_unit
from electra_ds.errors import UserError
from electra_ds.files import read_json, write_bytes, write_json
from electra_ds.shards import Manifest, ShardInfo, SourcePlan, SplitInfo, TokenizerInfo, ids_dtype, index_file, read_manifest, write_index, write_manifest
from electra_ds.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[str, int, int], None]  # (stage, done, total): bytes when tokenizing, documents, then tokens
SHARD_BYTES = 64 << 20
UNIT_FORMAT = 1  # raise it when the output of a unit changes


def prepare(
    inputs: Sequence[str], tokenizer: str | Path | Tokenizer, out: str | Path, *, sequence_length: int = 128,
    packing: str = "best_fit", valid_fraction: float = 0.005, workers: int = 1, seed: int = 0, block_rows: int = 256,
    shard_bytes: int = SHARD_BYTES, unit_bytes: int = UNIT_BYTES, format: str = "auto", text_field: str = "text",
    min_chars: int = 1, deduplicate: bool = True, max_bad_fraction: float = 0.001, units: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Manifest:
    """Prepare a data folder; returns its manifest. Called again after a stop, it goes on; when complete, it returns.

    inputs:         files, folders, globs, "builtin:docs"
    tokenizer:      a Tokenizer, or what load_tokenizer takes
    valid_fraction: share of documents held out, chosen by the hash of their text
    units:          where tokenized units are kept for other sequence lengths or packings; else they are removed
    Raises UserError for settings or inputs that cannot be used, for another data set in `out`, for too many bad lines.
    """
    if packing not in PACKINGS:
        raise UserError(f"packing = {packing!r}; expected one of {', '.join(PACKINGS)}")
    if not 8 <= sequence_length < 1 << 16:
        raise UserError(f"sequence_length = {sequence_length}; expected 8 to 65,535 tokens")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction = {valid_fraction}; expected at least 0 and less than 1")
    out, tokenizer = Path(out), tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    progress("plan", 0, 1)
    plan = make_plan(inputs, format=format, unit_bytes=unit_bytes)
    progress("plan", 1, 1)
    reading = {"unit_format": UNIT_FORMAT, "tokenizer": tokenizer.fingerprint, "seed": seed, "text_field": text_field,
               "min_chars": min_chars, **plan.identity()}
    settings = reading | {"sequence_length": sequence_length, "packing": packing, "valid_fraction": valid_fraction,
                          "block_rows": block_rows, "shard_bytes": shard_bytes, "deduplicate": deduplicate}
    work, units = out / "work", Path(units) if units is not None else out / "work" / "units"
    _claim(out / "prepare.json", settings)
    if (out / "manifest.json").exists():
        return read_manifest(out)
    _claim(units / "plan.json", reading)
    for folder in (work, out / "shards"):
        folder.mkdir(exist_ok=True)
    for folder in (out, work, units, out / "shards"):
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
    tokenizer.save(out / "tokenizer")

    with _pool(workers) as run:
        tasks = [UnitTask(number, unit, tuple(plan.sources[file] for file, _, _ in unit), str(units), str(out / "tokenizer"),
                          tokenizer.fingerprint, plan_hash(reading), seed, text_field, min_chars)
                 for number, unit in enumerate(plan.units)]
        total = sum(map(plan.unit_bytes, plan.units))
        unit_markers = run(tokenize_unit, tasks, lambda done: progress("tokenize", done, total))
        bad = _check_bad_lines(unit_markers, max_bad_fraction)
        documents, seen = sum(m["documents"] for m in unit_markers), Counter()
        def compared(count: int) -> None:
            seen["documents"] += count
            progress("deduplicate", seen["documents"], documents)
        duplicates = find_duplicates(str(units), len(tasks), compared) if deduplicate else np.empty((0, 2), np.int64)
        write_bytes(work / "duplicates.npy", _npy(duplicates))
        tokens = _split_tokens(str(units), len(tasks), valid_fraction, duplicates)
        if not tokens["train"] or valid_fraction and not tokens["valid"]:
            raise UserError(f"{documents} documents, of {sum(tokens.values())} tokens: valid_fraction = {valid_fraction} "
                            f"leaves a split without any; give more text or another --valid-fraction (0: none held out)")
        item = ids_dtype(tokenizer.vocab_size).itemsize
        first = ShardTask("train", 0, 0, len(tasks), str(units), str(work), str(out), plan_hash(settings), sequence_length,
                          packing, valid_fraction, seed, block_rows, tokenizer.vocab_size, tokenizer.special_ids)
        shards = [replace(first, split=split, shard=shard, shards=count) for split in SPLITS if tokens[split]
                  for count in [-(-tokens[split] * item // shard_bytes)] for shard in range(count)]
        markers = run(assemble_shard, shards, lambda done: progress("pack", done, sum(tokens.values())))

    removed = {"too_short": sum(m["too_short"] for m in unit_markers), "duplicates": len(duplicates)}
    manifest = _finish(out, plan, plan_hash(reading), tokenizer, first, shards, markers, removed, bad)
    if units.parent == work:
        shutil.rmtree(units)
    shutil.rmtree(work)
    return manifest


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder, or refuse another one's folder with the differences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if (path.parent / "manifest.json").exists():
            raise UserError(f"{path.parent}: a data folder that was made elsewhere; give another --out")
        write_json(path, settings)
        return
    found = read_json(path, "the settings of an earlier `prepare`")
    differences = [f"{key}: {_short(found.get(key))} there, {_short(settings.get(key))} asked for"
                   for key in sorted({*found, *settings}) if found.get(key) != settings.get(key)]
    if differences:
        raise UserError(f"{path.parent} holds other data ({'; '.join(differences)}); give another folder or remove this one")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def _check_bad_lines(markers: list[dict], max_bad_fraction: float) -> dict[str, int]:
    """Bad lines by class over all units; UserError when there are too many."""
    bad = sum((Counter(m["bad_lines"]) for m in markers), Counter())
    lines = sum(m["lines"] for m in markers)
    if bad.total() > max_bad_fraction * lines:
        places = [place for m in markers for place in m["places"]][:PLACES]
        counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(bad.items()))
        raise UserError(f"{bad.total()} of {lines} lines are bad ({counts}), more than max_bad_fraction = "
                        f"{max_bad_fraction}; the first: {'; '.join(places)}")
    return dict(sorted(bad.items()))


def _split_tokens(folder: str, units: int, valid_fraction: float, duplicates: np.ndarray) -> dict[str, int]:
    """Tokens of each split, duplicates left out."""
    tokens = dict.fromkeys(SPLITS, 0)
    for unit in range(units):
        table = read_table(folder, unit)
        kept = ~is_duplicate(duplicates, unit, table)
        for split in SPLITS:
            tokens[split] += int(table["tokens"][kept & in_split(table, split, valid_fraction)].sum(dtype=np.int64))
    return tokens


def _finish(out: Path, plan: Plan, plan_sha256: str, tokenizer: Tokenizer, settings: ShardTask, shards: list[ShardTask],
            markers: list[dict], removed: dict[str, int], bad: dict[str, int]) -> Manifest:
    """Indexes, unigram counts, then the manifest."""
    splits = {}
    for split in SPLITS:
        own = [marker for task, marker in zip(shards, markers, strict=True) if task.split == split]
        if own:
            records = [shard_record(marker) for marker in own]
            digest = write_index(out / index_file(split), records)
            counts = {key: sum(m[key] for m in own) for key in ("documents", "pieces", "tokens", "pad")}
            infos = tuple(ShardInfo(file=r.file, rows=r.rows, bytes=r.bytes, sha256=r.sha256) for r in records)
            splits[split] = SplitInfo(**counts, rows=sum(r.rows for r in records), index_sha256=digest, shards=infos)
    unigrams = sum(np.load(Path(task.work) / f"{task.split}-{task.shard:06d}.npy") for task in shards if task.split == "train")
    write_bytes(out / "unigrams.npy", _npy(unigrams))
    return write_manifest(out, Manifest(
        sequence_length=settings.sequence_length, dtype=ids_dtype(tokenizer.vocab_size).name, block_rows=settings.block_rows,
        packing=settings.packing, seed=settings.seed, splits=splits, removed=removed, bad_lines=bad,
        tokenizer=TokenizerInfo(kind=tokenizer.kind, sha256=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                                special_ids=tokenizer.special_ids),
        source=SourcePlan(sha256=plan_sha256, files=tuple(s.name for s in plan.sources), units=plan.units)))


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ processes

_moved: Any = None  # in a worker process: the queue to the parent


def _start_worker(queue: Any) -> None:
    global _moved
    _moved = queue
    os.environ["RAYON_NUM_THREADS"] = "1"


def _in_worker(function: Callable, task: Any) -> dict:
    return function(task, _moved.put)


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Callable, list, Callable[[int], None]], list[dict]]]:
    """A function run(function, tasks, told) -> results in the order of the tasks; told(sum of what `moved` heard)."""
    if workers == 1:
        def run_here(function: Callable, tasks: list, told: Callable[[int], None]) -> list[dict]:
            done = Counter()
            def moved(count: int) -> None:
                done["sum"] += count
                told(done["sum"])
            return [function(task, moved) for task in tasks]
        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()

    def run(function: Callable, tasks: list, told: Callable[[int], None]) -> list[dict]:
        futures = [pool.submit(_in_worker, function, task) for task in tasks]
        pending, done = set(futures), 0
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                done += queue.get()
            told(done)
            for future in finished:
                future.result()  # the first failure ends the run: its message is the user's
        return [future.result() for future in futures]

    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue,))
    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def console_progress() -> Iterator[Progress]:
    """A `progress` that draws bars on the terminal."""
    from rich.progress import BarColumn, Progress as Bars, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Bars(*columns) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
