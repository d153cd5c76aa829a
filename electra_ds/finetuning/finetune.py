"""The verb `finetune`: train a model for each task and seed, score, predict, report.

DIR/config.json                     config of the suite, with a fingerprint of the weights
DIR/TASK/task.json                  the task, and a fingerprint of its examples
DIR/TASK/seed-N/                    results of a seed, see seed.py
DIR/report.json, report.md          report on all seeds, see report.py
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from electra_ds.cluster.launchers import Ranks, single_rank_world
from electra_ds.cluster.stop_signals import DONE, stop_exit_code
from electra_ds.cluster.watchdog import Watchdog
from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.common.json_files import parse_record
from electra_ds.common.outputs import check_output_folder, check_outside
from electra_ds.common.printable import printable
from electra_ds.common.suggestions import nearest
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import differences, parse_config
from electra_ds.finetuning.batches import encode, swapped
from electra_ds.finetuning.config import FinetuneConfig
from electra_ds.finetuning.conll_tasks import CONLL
from electra_ds.finetuning.examples import Example, read_examples
from electra_ds.finetuning.notes import length_note, segments_note, split_notes
from electra_ds.finetuning.report import write_report
from electra_ds.finetuning.seed import (
    SeedRun,
    Splits,
    Stopped,
    Suite,
    check_seed_folder,
    seed_folder,
)
from electra_ds.finetuning.squad import SQUAD
from electra_ds.finetuning.suite_files import TaskFile, check_out, open_suite, write_or_compare
from electra_ds.finetuning.superglue_tasks import SUPERGLUE
from electra_ds.finetuning.tasks import GLUE, Task, glue_name, load_task
from electra_ds.interop.load_model import load_pretrained
from electra_ds.training.checkpoint import folder_of_model
from electra_ds.training.collectives import destroy_process_groups, is_collective, on_rank0
from electra_ds.training.engine import start


def finetune(
    config: FinetuneConfig,
    model: Path,
    names: list[str],
    seeds: int,
    data: Path | None,
    out: Path,
    ranks: Ranks,
    *,
    spread: bool = False,
    random_init: bool = False,
) -> int:
    """Train every (task, seed) pair without a result in `out`, and write a report on all seeds.

    model: path of the pretrained model, for `load_pretrained`.
    names: tasks, for `load_task`. data: the GLUE root, or a task's own folder.
    seeds: number of seeds, starting at train.seed.
    out: folder of the suite (DIR).
    spread: each rank trains its share of all (task, seed) pairs alone.
    random_init: start from random weights instead of the pretrained ones, for comparison.
    Returns the exit code: 0 done, 85 saved and stopped by a signal (0 under torchrun). Raises
    UserError for invalid data, settings that do not fit, an `out` of another suite, or a seed that
    another process runs.
    """
    share = slice(ranks.rank, None, ranks.world_size) if spread else slice(None)
    ranks = single_rank_world(ranks) if spread else ranks
    train = config.train
    device = start(ranks, train.timeout_minutes)
    watchdog = Watchdog(
        ranks,
        train.silence_seconds,
        train.timeout_minutes,
        on_rank0,
        is_collective=is_collective,
    )
    with watchdog:
        try:
            finetune_on_ranks(
                config,
                model,
                names,
                seeds,
                data,
                out,
                ranks,
                device,
                share=share,
                random_init=random_init,
            )
        except Stopped:
            return stop_exit_code()
    destroy_process_groups()
    return DONE


def finetune_on_ranks(
    config: FinetuneConfig,
    model: Path,
    names: list[str],
    seeds: int,
    data: Path | None,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    share: slice = slice(None),
    random_init: bool = False,
) -> None:
    """Run `finetune` in an initialized process group. Collective.

    ranks: the ranks that train each seed together. device: that of this rank. share: slice of the
    list of all (task, seed) pairs that these ranks run. Other arguments as in `finetune`.
    Raises Stopped after a stop signal, when the state is saved, and UserError as `finetune`.
    """
    if config.train.seed + seeds > 2**31:
        raise UserError(f"--seeds {seeds}: train.seed + seeds exceeds 2**31; choose smaller ones")
    config = config.model_copy(update={"engine": load_engine(config.engine)})
    on_rank0(partial(check_outside, out, "--out", {"MODEL": folder_of_model(model)}))
    on_rank0(partial(check_out, out))
    on_rank0(partial(check_output_folder, out, "--out"))
    suite = Suite(config, load_pretrained(model), random_init, out, ranks, device)
    tasks = [load_task(name, data) for name in names]
    _check(suite, tasks)
    suite = open_suite(suite, [task.name for task in tasks])
    jobs = [(task, config.train.seed + i) for task in tasks for i in range(seeds)][share]
    for task in tasks:
        own_seeds = [seed for job_task, seed in jobs if job_task is task]
        unfinished = on_rank0(partial(_unfinished, out, task, own_seeds))
        if not unfinished:
            continue
        splits = _read(suite, task)
        for seed in unfinished:
            # Locked per seed, because other ranks and jobs may run other seeds of this suite.
            on_rank0(partial(check_seed_folder, out, task, seed))
            with Lock(seed_folder(out, task, seed), on_rank0):
                SeedRun(suite, task, splits, seed).fit()
    if ranks.rank == 0 and any(out.glob("*/seed-*/result.json")):
        write_report(out)


def _unfinished(out: Path, task: Task, seeds: list[int]) -> list[int]:
    folders = {seed: seed_folder(out, task, seed) for seed in seeds}
    return [seed for seed, folder in folders.items() if not (folder / "result.json").exists()]


def _check(suite: Suite, tasks: list[Task]) -> None:
    """Raise UserError for settings that would cause an error later or have no effect."""
    config, model = suite.config, suite.pretrained.model
    names = [task.name for task in tasks]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(
            f"--tasks: two tasks are named {repeated[0]!r}; give one of them another name in its "
            "description"
        )
    known = [*GLUE, *SUPERGLUE, *SQUAD, *CONLL, *names]
    unknown = [name for name in config.tasks if name not in known]
    if unknown:
        suggestion = nearest(glue_name(unknown[0]), known)
        raise UserError(f"tasks.{unknown[0]}: no task of that name{suggestion}")
    for task in tasks:
        own = config.of(task.name, task.epochs, 0, suite.ranks.world_size)
        own.accumulation(suite.ranks.world_size)
        if own.train.max_length > model.max_positions:
            raise UserError(
                f"train.max_length = {own.train.max_length}, but the model has "
                f"{model.max_positions} positions: --set train.max_length={model.max_positions}"
            )
        if task.has_pairs and model.segments == 1:
            raise UserError(
                f"{task.name}: the task has pairs of texts, but the model has one segment "
                "(type_vocab_size = 1); use a model with at least 2"
            )
        if "train" not in task.splits:
            raise UserError(
                f"{task.name}: no split train; use this task only with predict (ax: with a model "
                "of mnli)"
            )


def _digest(splits: list[list[Example]]) -> str:
    """Return a fingerprint of examples. Earlier versions had no candidates: None does not count."""
    rows = [[x[:4] if x.candidate is None else x for x in split] for split in splits]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(suite: Suite, task: Task) -> Splits:
    """Return the examples of a task, as read and as encoded. Collective.

    Writes DIR/TASK/task.json. If the file exists, it is compared, so that all seeds use the same
    task and the same examples of train and dev.
    """
    max_length = suite.config.of(task.name, task.epochs, 0).train.max_length
    examples = {split: read_examples(task, split) for split in task.splits}
    encoded = {}
    notes = []
    for split, read in examples.items():
        both = read + swapped(read) if split == "train" and task.both_orders else read
        encoded[split] = encode(both, task, suite.pretrained.tokenizer, max_length)
        notes += split_notes(task, split, read, encoded[split], suite.pretrained.tokenizer)
    longest = {split: max(x.longest for x in rows) for split, rows in encoded.items()}
    trained = None if suite.random_init else suite.pretrained.trained_length
    notes += length_note(max_length, longest, trained)
    segments = None if suite.random_init else suite.pretrained.trained_segments
    notes += segments_note(task, segments)
    compared = [examples["train"], examples[task.valid_splits[0]]]
    digest = _digest(compared)

    def differs(found: dict[str, Any]) -> list[str]:
        where = f"{task.name}/task.json"
        before = parse_record(found, where, TaskFile)
        science, _ = differences(parse_config(before.task, where, Task), task)
        if not science and before.examples != digest:
            return ["the examples of train or dev have changed"]
        return science

    settings = {"task": task.model_dump(mode="json"), "examples": digest, "notes": notes}
    write_or_compare(suite, f"{task.name}/task.json", settings, differs)
    if suite.ranks.rank == 0:
        for note in notes:
            print(printable(f"{task.name}: WARNING: {note}"), flush=True)
    return Splits(examples, encoded)
