"""Text in, a data folder out: plan -> units -> duplicates -> shards -> manifest, resumable, the same for any workers.

Every step is a function of what lies on disk before it, so a killed run goes on where it was: finished units and
shards have markers with sizes and hashes, and the manifest is written last.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.corpus import PLACES
from data_tools.inputs.plan import UNIT_BYTES, Plan, make_plan, plan_hash, unit_size
from data_tools.pipeline import assemble, clean
from data_tools.pipeline.assemble import SPLITS, ShardTask
from data_tools.pipeline.dedup import find_near_duplicates
from data_tools.pipeline.pack import PACKINGS
from data_tools.pipeline.units import (
    REMOVED,
    UnitTask,
    array_bytes,
    tokenize_unit,
    tokenizers,
    unit_paths,
)
from data_tools.pipeline.unknowns import sum_unknowns
from data_tools.workers import Progress, Rank, Run, Task, pool
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.common.folder_lock import Lock
from electra_ds.common.plugins import load_function
from electra_ds.data import shard_format
from electra_ds.data.shard_format import (
    INDEX_DTYPE,
    Manifest,
    SourcePlan,
    SplitInfo,
    TokenizerInfo,
    ids_dtype,
)
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 64 << 20
UNIT_FORMAT = 2  # raise it when the output of a unit changes


def prepare(
    inputs: Sequence[str],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    sequence_length: int = 128,
    packing: str = "best_fit",
    valid_fraction: float = 0.005,
    workers: int = 1,
    ranks: Sequence[Rank] = (),
    seed: int = 0,
    block_rows: int = 256,
    shard_bytes: int = SHARD_BYTES,
    unit_bytes: int = UNIT_BYTES,
    format: str = "auto",
    text_field: str = "text",
    min_chars: int = 1,
    drop_repeated_lines: bool = False,
    keep: str | None = None,
    deduplicate: bool = True,
    near_duplicates: float | None = None,
    max_bad_fraction: float = 0.001,
    units: str | Path | None = None,
    read_unit: Task = tokenize_unit,
    progress: Progress = lambda stage, done, total: None,
) -> Manifest:
    """Prepare a data folder; returns its manifest. Called again after a stop, it goes on; when complete, it returns.

    inputs:         files, folders, globs, URLs, "dataset:NAME", "builtin:docs"
    tokenizer:      a Tokenizer, or what load_tokenizer takes
    valid_fraction: share of documents held out, chosen by the hash of their text
    min_chars:      shorter documents are left out
    drop_repeated_lines: leave out a line that stood already in the same document
    keep:           "package.module:function" of a function (text) -> bool, False for a document to leave out
    deduplicate:    leave out documents whose text, but for case and white space, stood before
    near_duplicates: leave out documents whose similarity to an earlier one that stays is estimated as so much or more
    workers, ranks: as for `pool`
    units:          folder in which tokenized units stay for other lengths or packings; without it they are removed
    read_unit:      makes a unit's files, of what is no text
    progress:       hears (stage, done, total) of plan, tokenize (bytes), deduplicate (documents), near-duplicates
                    (parts of the work), pack (tokens)
    Raises UserError for settings or inputs that cannot be used, for another data set in `out`, for too many bad lines,
    while another `prepare` is at work in `out` or `units`; RunFailure for a disk that is full.
    """
    if packing not in PACKINGS:
        raise UserError(f"packing = {packing!r}; expected one of {', '.join(PACKINGS)}")
    if not 8 <= sequence_length < 1 << 16:
        raise UserError(f"sequence_length = {sequence_length}; expected 8 to 65,535 tokens")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction = {valid_fraction}; expected at least 0 and less than 1")
    if workers < 1 or (workers > 1 and ranks):
        raise UserError(
            f"workers = {workers}; expected at least 1 process, and 1 where MPI's ranks are the workers"
        )
    if near_duplicates is not None and not 0.5 <= near_duplicates <= 1:
        raise UserError(f"near_duplicates = {near_duplicates}; expected a similarity of 0.5 to 1")
    if keep:
        load_function("keep", keep)  # a mistake is told before any work
    signatures = clean.minhash().ALGORITHM_VERSION if near_duplicates else None
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    tokenizers.clear()  # those of earlier calls
    tokenizers[tokenizer.fingerprint] = tokenizer  # for `tokenize_unit` in this process
    progress("plan", 0, 1)
    plan = make_plan(inputs, format=format, unit_bytes=unit_bytes)
    progress("plan", 1, 1)
    reading = {
        "unit_format": UNIT_FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed,
        "text_field": text_field,
        "min_chars": min_chars,
        "drop_repeated_lines": drop_repeated_lines,
        "keep": keep,
        "signatures": signatures,
        **plan.identity(),
    }
    settings = reading | {
        "sequence_length": sequence_length,
        "packing": packing,
        "valid_fraction": valid_fraction,
        "block_rows": block_rows,
        "shard_bytes": shard_bytes,
        "deduplicate": deduplicate,
        "near_duplicates": near_duplicates,
    }
    out = Path(out)
    work = out / "work"
    units = Path(units) if units is not None else work / "units"
    try:
        _claim(out / "prepare.json", settings, reading)
        if not (out / "manifest.json").exists():
            _claim(units / "plan.json", reading, reading)
            with Lock(work), Lock(units), pool(workers, ranks) as run:
                for folder in (out, work, units, out / "shards"):
                    folder.mkdir(exist_ok=True)
                    for stale in folder.glob(".*.tmp"):
                        stale.unlink(missing_ok=True)  # our own heartbeat's comes and goes
                tokenizer.save(out / "tokenizer")
                _write(
                    plan,
                    tokenizer,
                    out,
                    units,
                    reading,
                    settings,
                    max_bad_fraction,
                    run,
                    read_unit,
                    progress,
                )
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise RunFailure(
            f"{out}: {error}; the same command goes on from what is finished"
        ) from error
    return shard_format.read_manifest(out)


def _write(
    plan: Plan,
    tokenizer: Tokenizer,
    out: Path,
    units: Path,
    reading: dict,
    settings: dict,
    max_bad_fraction: float,
    run: Run,
    read_unit: Task,
    progress: Progress,
) -> None:
    """The stages from units to manifest, each a function of what lies on disk before it."""
    work, folder, count = out / "work", str(units), len(plan.units)
    units_sha256, shards_sha256 = (
        plan_hash(reading),
        plan_hash(settings),
    )  # once: the plan may hold many units
    unit_tasks = [
        UnitTask(
            number,
            unit,
            tuple(plan.sources[file] for file, _, _ in unit),
            folder,
            str(out / "tokenizer"),
            tokenizer.fingerprint,
            units_sha256,
            reading["seed"],
            reading["text_field"],
            reading["min_chars"],
            reading["drop_repeated_lines"],
            reading["keep"],
            bool(reading["signatures"]),
        )
        for number, unit in enumerate(plan.units)
    ]
    total = sum(map(unit_size, plan.units))
    unit_markers = run(read_unit, unit_tasks, lambda done: progress("tokenize", done, total))
    bad = _check_bad_lines(unit_markers, max_bad_fraction)
    removed = {key: sum(marker["removed"][key] for marker in unit_markers) for key in REMOVED}
    documents = sum(marker["documents"] for marker in unit_markers)
    if not documents:
        gone = ", ".join(f"{number} {reason}" for reason, number in removed.items())
        raise UserError(
            f"no text in {len(plan.sources)} input file(s) read as "
            f"{', '.join(sorted({s.format for s in plan.sources}))} (removed: {gone}); --format says how "
            f"to read them"
        )
    duplicates = near = assemble.NO_DUPLICATES
    if settings["deduplicate"]:
        duplicates = assemble.find_duplicates(
            folder, count, lambda done: progress("deduplicate", done, documents)
        )
    if threshold := settings["near_duplicates"]:
        write_bytes(exact := work / "exact_duplicates.npy", array_bytes(duplicates))
        near = find_near_duplicates(
            folder, count, str(exact), threshold, run, partial(progress, "near-duplicates")
        )
    removed |= {"duplicates": len(duplicates), "near_duplicates": len(near)}
    duplicates = np.concatenate([duplicates, near])
    duplicates = duplicates[np.lexsort(duplicates.T[::-1])]
    tokens = _split_tokens(folder, count, settings["valid_fraction"], duplicates)
    write_json(out / "prepare.json", settings)  # from here on those of the packing are settled, too
    write_bytes(work / "duplicates.npy", array_bytes(duplicates))
    item = ids_dtype(tokenizer.vocab_size).itemsize
    shard_counts = {split: -(-tokens[split] * item // settings["shard_bytes"]) for split in SPLITS}
    tasks = [
        ShardTask(
            split,
            shard,
            total,
            count,
            folder,
            str(work),
            str(out),
            shards_sha256,
            settings["sequence_length"],
            settings["packing"],
            settings["valid_fraction"],
            settings["seed"],
            settings["block_rows"],
            tokenizer.vocab_size,
            tokenizer.special_ids,
        )
        for split, total in shard_counts.items()
        for shard in range(total)
    ]
    markers = run(
        assemble.assemble_shard, tasks, lambda done: progress("pack", done, sum(tokens.values()))
    )
    _finish(plan, units_sha256, tokenizer, tasks, markers, removed, bad)


def _claim(path: Path, asked: dict[str, Any], settled: dict[str, Any]) -> None:
    """Mark a new folder with the settings `settled` so far; refuse one that is marked with others than `asked`."""
    if not path.exists():
        if others := sorted(p.name for p in path.parent.glob("[!.]*")):
            raise UserError(
                f"{path.parent}: holds {others[0]} but no {path.name}, so `prepare` did not make it; give "
                f"a new or empty folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settled)
        return
    found, asked = (
        read_json(path, "the settings of an earlier `prepare`"),
        json.loads(json.dumps(asked)),
    )
    differences = [
        f"{key}: {_differing(found.get(key), asked.get(key))}"
        for key in sorted({*found, *settled})
        if found.get(key) != asked.get(key)
    ]
    if differences:
        raise UserError(
            f"{path.parent} holds other data ({'; '.join(differences)}); give another folder or remove it"
        )


def _differing(found: Any, asked: Any) -> str:
    """Two values, or the first entries that differ of two lists, which may be long."""
    if isinstance(found, list) and isinstance(asked, list):
        found, asked = next(pair for pair in zip_longest(found, asked) if pair[0] != pair[1])
    texts = [
        text if len(text) < 100 else f"{text[:90]}..." for text in map(json.dumps, (found, asked))
    ]
    return f"{texts[0]} there, {texts[1]} asked for"


def _check_bad_lines(markers: list[dict], max_bad_fraction: float) -> dict[str, int]:
    """Bad lines by class over all units; UserError when there are too many."""
    bad = sum((Counter(m["bad_lines"]) for m in markers), Counter())
    lines = sum(m["lines"] for m in markers)
    if bad.total() > max_bad_fraction * lines:
        places = [place for m in markers for place in m["places"]][:PLACES]
        counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(bad.items()))
        raise UserError(
            f"{bad.total()} of {lines} lines are bad ({counts}), more than max_bad_fraction = "
            f"{max_bad_fraction}; the first: {'; '.join(places)}"
        )
    return dict(sorted(bad.items()))


def _split_tokens(
    folder: str, units: int, valid_fraction: float, duplicates: np.ndarray
) -> dict[str, int]:
    """Tokens of each split, duplicates left out. UserError when a split would be empty."""
    tokens = dict.fromkeys(SPLITS, 0)
    for unit in range(units):
        table = assemble.read_table(folder, unit)
        table = table[~assemble.is_duplicate(duplicates, unit, table)]
        for split in SPLITS:
            inside = assemble.in_split(table, split, valid_fraction)
            tokens[split] += int(table["tokens"][inside].sum(dtype=np.int64))
    if not tokens["train"] or (valid_fraction and not tokens["valid"]):
        raise UserError(
            f"of {sum(tokens.values())} tokens, valid_fraction = {valid_fraction} leaves "
            f"{tokens['train']} to train on and {tokens['valid']} held out; give more text, "
            f"or another --valid-fraction (0: none held out)"
        )
    return tokens


def _finish(
    plan: Plan,
    plan_sha256: str,
    tokenizer: Tokenizer,
    tasks: list[ShardTask],
    markers: list[dict],
    removed: dict[str, int],
    bad: dict[str, int],
) -> None:
    """Indexes, unigram counts, then the manifest."""
    first, out, splits = tasks[0], Path(tasks[0].out), {}
    for split in SPLITS:
        own = [marker for task, marker in zip(tasks, markers, strict=True) if task.split == split]
        files = [
            assemble.marker_path(task).with_suffix(".index")
            for task in tasks
            if task.split == split
        ]
        if own:
            blocks = np.concatenate([np.fromfile(file, INDEX_DTYPE) for file in files])
            digest = shard_format.write_index(out / shard_format.index_file(split), blocks)
            counts = {
                key: sum(m[key] for m in own) for key in ("documents", "pieces", "tokens", "pad")
            }
            splits[split] = SplitInfo(
                **counts,
                rows=int(blocks["rows"].sum()),
                index_sha256=digest,
                shards=[marker["shard"] for marker in own],
            )
    unigrams = sum(
        np.load(assemble.marker_path(task).with_suffix(".npy"))
        for task in tasks
        if task.split == "train"
    )
    write_bytes(out / "unigrams.npy", array_bytes(unigrams))
    unknowns = sum_unknowns(unit_paths(first.units_folder, unit)[4] for unit in range(first.units))
    shard_format.write_manifest(
        out,
        Manifest(
            sequence_length=first.sequence_length,
            dtype=ids_dtype(tokenizer.vocab_size).name,
            seed=first.seed,
            block_rows=first.block_rows,
            packing="google" if first.packing == "as_rows" else first.packing,
            splits=splits,
            removed=removed,
            bad_lines=bad,
            unknowns=unknowns,
            tokenizer=TokenizerInfo(
                kind=tokenizer.kind,
                sha256=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                special_ids=tokenizer.special_ids,
            ),
            source=SourcePlan(
                sha256=plan_sha256, files=tuple(s.name for s in plan.sources), units=plan.units
            ),
        ),
    )


if __name__ == "__main__":  # `python -m data_tools.prepare ...` is `electra-ds prepare ...`
    sys.argv.insert(1, "prepare")
    runpy.run_module("electra_ds", run_name="__main__", alter_sys=True)
