"""Preparation of a data folder from text: plan, tokenized units, duplicates, shards, manifest.

Each stage is a function of files that exist before it, so an interrupted run resumes. Finished
units and shards have markers with hashes, and the manifest is written last. The bytes written are
the same for any number of workers.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.source import Tally, check_bad_lines, check_share
from data_tools.inputs.plan import Plan, make_plan, plan_hash, unit_size
from data_tools.pipeline.assemble import SPLITS, ShardTask, assemble_shard, in_split, marker_path
from data_tools.pipeline.dedup import (
    NO_DUPLICATES,
    find_duplicates,
    find_near_duplicates,
    is_duplicate,
    sort_pairs,
)
from data_tools.pipeline.markers import claim_folder
from data_tools.pipeline.settings import Settings
from data_tools.pipeline.units import (
    REMOVED,
    UnitTask,
    npy_bytes,
    read_table,
    tokenize_unit,
    tokenizers,
    unit_files,
)
from data_tools.pipeline.unknowns import sum_unknowns
from data_tools.workers import Progress, Rank, Run, Task, ignore_progress, pool
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.folder_lock import Lock
from electra_ds.common.json_files import write_json
from electra_ds.common.outputs import check_output_folder
from electra_ds.common.own_folder import own_path, remove_temporary_files
from electra_ds.common.printable import counted, printable
from electra_ds.common.redaction import redacted
from electra_ds.data import shard_format
from electra_ds.data.shard_format import (
    INDEX_DTYPE,
    Manifest,
    ShardInfo,
    SourcePlan,
    SplitInfo,
    TokenizerInfo,
    ids_dtype,
)
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

MOST_WORKERS = 1024


@dataclass(frozen=True)
class Job:
    """Input, settings and output folders of one call of `prepare`."""

    plan: Plan
    tokenizer: Tokenizer
    settings: Settings
    out: Path
    units: Path  # folder of the tokenized units
    unit_record: dict[str, Any]  # everything that decides the units, as JSON values
    record: dict[str, Any]  # everything that decides the data folder: prepare.json

    @property
    def work(self) -> Path:
        """Folder of files that are removed at the end."""
        return self.out / "work"

    @cached_property
    def units_sha256(self) -> str:
        """Fingerprint of everything that decides the units."""
        return plan_hash(self.unit_record)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of everything that decides the data folder."""
        return plan_hash(self.record)


def prepare(
    inputs: Sequence[str],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    workers: int = 1,
    ranks: Sequence[Rank] = (),
    units: str | Path | None = None,
    max_bad_fraction: float = 0.001,
    read_unit: Task = tokenize_unit,
    progress: Progress = ignore_progress,
    **settings: Any,
) -> Manifest:
    """Prepare a data folder and return its manifest.

    If `out` is incomplete, the work resumes; if it is complete, its manifest is returned.

    inputs:    files, folders, globs, brace patterns, URLs, "dataset:NAME", "builtin:docs"
    tokenizer: a Tokenizer, or a path for load_tokenizer
    workers, ranks: as for `pool`
    units:     folder in which the tokenized units are kept, for other lengths and packings; by
               default they are removed at the end
    max_bad_fraction: share of unreadable lines above which UserError is raised
    read_unit: task that writes the files of a unit; another one is needed if the input is not text
    progress:  receives (stage, done, total) of the stages plan, tokenize (bytes), deduplicate
               (documents), near-duplicates (parts) and pack (tokens)
    settings:  fields of `Settings`
    Raises UserError for settings or inputs that cannot be used, for another data set in `out`, for
    too many unreadable lines, and while another `prepare` runs in `out` or `units`; RunFailure
    when a file cannot be read or written.
    """
    if not 1 <= workers <= MOST_WORKERS or (workers > 1 and ranks):
        raise UserError(
            f"workers = {workers}; expected at least 1 and at most {MOST_WORKERS:,}, and exactly 1 "
            "if MPI ranks are the workers"
        )
    check_share(max_bad_fraction)
    job = _plan_job(inputs, tokenizer, Path(out), units, Settings(**settings), progress)
    _check_folders(job, units is not None)
    if not (job.out / "manifest.json").exists():
        check_output_folder(job.out, "--out")
        if units is not None:
            check_output_folder(job.units, "--units")
    try:
        _claim_folders(job)
        if not (job.out / "manifest.json").exists():
            with Lock(job.work), Lock(job.units), pool(workers, ranks) as run:
                _claim_folders(job, locked=True)
                _make_folders(job)
                _run_stages(job, run, read_unit, max_bad_fraction, progress)
        shutil.rmtree(job.work, ignore_errors=True)
    except OSError as error:
        raise RunFailure(
            f"{printable(out)}: {printable(redacted(str(error)))}; the same command resumes from "
            "what is finished"
        ) from error
    return shard_format.read_manifest(job.out)


def _plan_job(
    inputs: Sequence[str],
    tokenizer: str | Path | Tokenizer,
    out: Path,
    units: str | Path | None,
    settings: Settings,
    progress: Progress,
) -> Job:
    """Check the settings, load the tokenizer and plan the input. Writes nothing."""
    settings.check()
    outputs = [out, *([units] if units is not None else [])]
    vocabulary = None
    if not isinstance(tokenizer, Tokenizer):
        vocabulary = Path(tokenizer)
        tokenizer = load_tokenizer(tokenizer)
    tokenizers.clear()  # those of earlier calls
    tokenizers[tokenizer.fingerprint] = tokenizer  # for `tokenize_unit` in this process
    progress("plan", 0, 1)
    plan = make_plan(
        inputs,
        format=settings.format,
        text_field=settings.text_field,
        unit_bytes=settings.unit_bytes,
        outputs=outputs,
        vocabulary=vocabulary,
    )
    progress("plan", 1, 1)
    unit_record = settings.unit_record(tokenizer.fingerprint, plan.identity())
    return Job(
        plan=plan,
        tokenizer=tokenizer,
        settings=settings,
        out=out,
        units=Path(units) if units is not None else out / "work" / "units",
        unit_record=unit_record,
        record=unit_record | settings.packing_record(),
    )


def _check_folders(job: Job, has_units: bool) -> None:
    """Raise UserError, before anything is written, for folders that would be mixed.

    These are --units and --out inside each other, and links in --out that lead out of it.
    """
    try:
        # Path.resolve raises RuntimeError for a loop of links.
        out, units = (Path(os.path.realpath(folder)) for folder in (job.out, job.units))
    except ValueError as error:
        raise UserError(
            f"--out {printable(job.out)}, --units {printable(job.units)}: {error}; expected folders"
        ) from None
    if has_units and (units.is_relative_to(out) or out.is_relative_to(units)):
        raise UserError(
            f"--units {printable(job.units)} and --out {printable(job.out)}: one is inside the "
            "other; choose separate folders"
        )
    for name in ("work", "work/units", "shards", "tokenizer"):
        own_path(job.out, name)


def _claim_folders(job: Job, *, locked: bool = False) -> None:
    """Mark the folders with the settings; UserError when they hold data of other settings.

    locked: whether the locks are held
    """
    claim_folder(job.out / "prepare.json", job.record, job.unit_record, job.units, locked)
    if not (job.out / "manifest.json").exists():
        claim_folder(job.units / "plan.json", job.unit_record, job.unit_record, job.units, locked)


def _make_folders(job: Job) -> None:
    """Make the folders, remove temporary files of an earlier run, and save the tokenizer."""
    for folder in (job.out, job.work, job.units, job.out / "shards"):
        folder.mkdir(exist_ok=True)
        remove_temporary_files(folder)
    job.tokenizer.save(job.out / "tokenizer")


def _run_stages(
    job: Job, run: Run, read_unit: Task, max_bad_fraction: float, progress: Progress
) -> None:
    """Run the stages from units to manifest."""
    unit_markers = _tokenize_units(job, run, read_unit, progress)
    bad_lines = _check_bad_lines(unit_markers, max_bad_fraction)
    removed = {
        key: sum(marker["removed"].get(key, 0) for marker in unit_markers) for key in REMOVED
    }
    documents = sum(marker["documents"] for marker in unit_markers)
    _check_documents(job, documents, removed)

    exact = _find_exact_duplicates(job, documents, progress)
    near = _find_near_duplicates(job, exact, run, progress)
    removed |= {"duplicates": len(exact), "near_duplicates": len(near)}
    duplicates = sort_pairs(np.concatenate([exact, near]))
    split_tokens = _count_split_tokens(job, duplicates)

    _check_blocks(job.settings, split_tokens)
    # From here on, the settings of the packing are fixed as well.
    write_json(job.out / "prepare.json", job.record)
    write_bytes(job.work / "duplicates.npy", npy_bytes(duplicates))
    tasks = _shard_tasks(job, split_tokens)
    total = sum(split_tokens.values())
    markers = run(assemble_shard, tasks, lambda done: progress("pack", done, total))
    splits = _write_indexes(job, tasks, markers)
    unigrams_sha256 = _write_unigrams(job, tasks)
    tokens = sum(marker["tokens"] for marker in unit_markers)
    _write_manifest(job, splits, removed, bad_lines, tokens, unigrams_sha256)


def _tokenize_units(job: Job, run: Run, read_unit: Task, progress: Progress) -> list[dict]:
    """Write the tokenized units; return their markers."""
    tasks = [
        UnitTask(
            number=number,
            unit=unit,
            sources=tuple(job.plan.sources[file] for file, _, _ in unit),
            folder=str(job.units),
            tokenizer=str(job.out / "tokenizer"),
            fingerprint=job.tokenizer.fingerprint,
            plan_sha256=job.units_sha256,
            settings=job.settings,
        )
        for number, unit in enumerate(job.plan.units)
    ]
    total = sum(map(unit_size, job.plan.units))
    return run(read_unit, tasks, lambda done: progress("tokenize", done, total))


def _check_bad_lines(markers: list[dict], max_bad_fraction: float) -> dict[str, int]:
    """Return the unreadable lines of all units by class; UserError when there are too many."""
    tally = Tally()
    for marker in markers:
        tally.lines += marker["lines"]
        tally.bad.update(marker["bad_lines"])
        tally.locations += marker["places"]
    check_bad_lines(tally, max_bad_fraction)
    return dict(sorted(tally.bad.items()))


def _check_documents(job: Job, documents: int, removed: dict[str, int]) -> None:
    """Raise UserError when there is no document."""
    if documents:
        return
    sources = job.plan.sources
    formats = ", ".join(sorted({source.format for source in sources}))
    counts = ", ".join(f"{number} {reason}" for reason, number in removed.items())
    raise UserError(
        f"no text in {len(sources)} input file(s) read as {formats} (removed: {counts}); set "
        "--format if they have another format"
    )


def _find_exact_duplicates(job: Job, documents: int, progress: Progress) -> np.ndarray:
    """Return the documents that repeat an earlier one: [n, 2] int64 (unit, document)."""
    if not job.settings.deduplicate:
        return NO_DUPLICATES
    return find_duplicates(
        str(job.units),
        len(job.plan.units),
        lambda done: progress("deduplicate", done, documents),
    )


def _find_near_duplicates(job: Job, exact: np.ndarray, run: Run, progress: Progress) -> np.ndarray:
    """Return the documents that nearly repeat an earlier one: [n, 2] int64 (unit, document).

    exact: exact duplicates, which are not considered
    """
    threshold = job.settings.near_duplicates
    if threshold is None:
        return NO_DUPLICATES
    excluded = job.work / "exact_duplicates.npy"
    write_bytes(excluded, npy_bytes(exact))
    return find_near_duplicates(
        str(job.units),
        len(job.plan.units),
        str(excluded),
        threshold,
        run,
        partial(progress, "near-duplicates"),
    )


def _count_split_tokens(job: Job, duplicates: np.ndarray) -> dict[str, int]:
    """Return the tokens of each split, without duplicates; UserError when a split has none."""
    valid_fraction = job.settings.valid_fraction
    tokens = dict.fromkeys(SPLITS, 0)
    documents = 0
    for unit in range(len(job.plan.units)):
        table = read_table(job.units, unit)
        table = table[~is_duplicate(duplicates, unit, table)]
        documents += len(table)
        for split in SPLITS:
            selected = in_split(table, split, valid_fraction)
            tokens[split] += int(table["tokens"][selected].sum(dtype=np.int64))
    if not tokens["train"] or (valid_fraction and not tokens["valid"]):
        raise UserError(
            f"valid_fraction = {valid_fraction} of {counted(documents, 'document')} gives "
            f"{tokens['train']:,} training tokens and {tokens['valid']:,} held-out tokens; "
            "expected some of both; give more documents (in plain text a blank line separates "
            "them; carriage returns alone end no line) or another --valid-fraction (0: none held "
            "out)"
        )
    return tokens


def _check_blocks(settings: Settings, split_tokens: dict[str, int]) -> None:
    """Raise UserError when a split would have more blocks than a reader accepts.

    A part of the limit is left free for padding.
    """
    for split, tokens in split_tokens.items():
        blocks = tokens // (settings.sequence_length * settings.block_rows)
        if blocks > shard_format.MAX_BLOCKS // 2:
            raise UserError(
                f"block_rows = {settings.block_rows}: about {blocks:,} blocks in {split}; expected at "
                f"most {shard_format.MAX_BLOCKS // 2:,}; set more rows in a block"
            )


def _shard_tasks(job: Job, split_tokens: dict[str, int]) -> list[ShardTask]:
    """Return the tasks of all shards; a shard has about `shard_bytes` bytes."""
    id_bytes = ids_dtype(job.tokenizer.vocab_size).itemsize
    shards = {
        split: -(-split_tokens[split] * id_bytes // job.settings.shard_bytes) for split in SPLITS
    }
    return [
        ShardTask(
            split=split,
            shard=shard,
            shards=shards[split],
            units=len(job.plan.units),
            units_folder=str(job.units),
            work=str(job.work),
            out=str(job.out),
            plan_sha256=job.sha256,
            settings=job.settings,
            vocab_size=job.tokenizer.vocab_size,
            special_ids=job.tokenizer.special_ids,
        )
        for split in SPLITS
        for shard in range(shards[split])
    ]


def _write_indexes(job: Job, tasks: list[ShardTask], markers: list[dict]) -> dict[str, SplitInfo]:
    """Write the index of each split; return the splits' entries of the manifest."""
    splits = {}
    for split in SPLITS:
        done = [
            (task, marker)
            for task, marker in zip(tasks, markers, strict=True)
            if task.split == split
        ]
        if not done:
            continue
        parts = [marker_path(task).with_suffix(".index") for task, _ in done]
        blocks = np.concatenate([np.fromfile(part, INDEX_DTYPE) for part in parts])
        digest = shard_format.write_index(job.out / shard_format.index_file(split), blocks)
        splits[split] = SplitInfo(
            documents=sum(marker["documents"] for _, marker in done),
            pieces=sum(marker["pieces"] for _, marker in done),
            tokens=sum(marker["tokens"] for _, marker in done),
            pad=sum(marker["pad"] for _, marker in done),
            rows=int(blocks["rows"].sum()),
            index_sha256=digest,
            shards=tuple(ShardInfo(**marker["shard"]) for _, marker in done),
        )
    return splits


def _write_unigrams(job: Job, tasks: list[ShardTask]) -> str:
    """Write the token counts of the training rows; return the sha256 of the file."""
    counts = [
        np.load(marker_path(task).with_suffix(".npy")) for task in tasks if task.split == "train"
    ]
    content = npy_bytes(np.sum(counts, axis=0))
    write_bytes(job.out / "unigrams.npy", content)
    return sha256(content).hexdigest()


def _write_manifest(
    job: Job,
    splits: dict[str, SplitInfo],
    removed: dict[str, int],
    bad_lines: dict[str, int],
    tokens: int,
    unigrams_sha256: str,
) -> None:
    """Write the manifest, the last file of a data folder. tokens: of all units"""
    tokenizer = job.tokenizer
    settings = job.settings
    units = range(len(job.plan.units))
    manifest = Manifest.model_validate(
        {
            "sequence_length": settings.sequence_length,
            "dtype": ids_dtype(tokenizer.vocab_size).name,
            "seed": settings.seed,
            "block_rows": settings.block_rows,
            "packing": "google" if settings.packing == "as_rows" else settings.packing,
            "splits": splits,
            "removed": removed,
            "bad_lines": bad_lines,
            "unigrams_sha256": unigrams_sha256,
            "unknowns": sum_unknowns(
                (unit_files(job.units, unit).unknowns for unit in units), tokens
            ),
            "tokenizer": TokenizerInfo.model_validate(
                {
                    "kind": tokenizer.kind,
                    "sha256": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                    "special_ids": tokenizer.special_ids,
                }
            ),
            "source": SourcePlan(
                sha256=job.units_sha256,
                files=tuple(source.name for source in job.plan.sources),
                units=job.plan.units,
            ),
        }
    )
    shard_format.write_manifest(job.out, manifest)


if __name__ == "__main__":  # `python -m data_tools.prepare ...` is `electra-ds prepare ...`
    sys.argv.insert(1, "prepare")
    runpy.run_module("electra_ds", run_name="__main__", alter_sys=True)
