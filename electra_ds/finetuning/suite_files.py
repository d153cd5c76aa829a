"""Files of a suite that later calls are compared with: DIR/config.json, DIR/TASK/task.json."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from electra_ds.cluster.provenance import provenance
from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import Record, parse_record, read_json, write_json
from electra_ds.common.own_folder import own_folder
from electra_ds.common.printable import printable
from electra_ds.config.loading import differences, parse_config
from electra_ds.finetuning.config import FinetuneConfig, TaskOverrides
from electra_ds.finetuning.seed import Suite
from electra_ds.training.collectives import on_rank0


def check_out(out: Path) -> None:
    """Raise UserError when `out` holds a run, a model or prepared data."""
    found = found_at(out)
    if found.kind in ("data", "hugging face", "checkpoint", "run"):
        raise UserError(
            f"--out {printable(out)}: {found.phrase}; give the suite a folder of its own"
        )


def open_suite(suite: Suite, names: list[str]) -> Suite:
    """Write DIR/config.json, or compare with it, because a folder contains one suite. Collective.

    names: tasks of this call. Later calls may add tasks: the overrides of tasks without a trained
    seed are not compared, and those of earlier tasks are kept in the file.
    Returns the suite with the overrides of all tasks. Raises UserError when weights, tokenizer or
    science fields differ from those of seeds that were trained, and for a folder that is not one of
    finetune.
    """
    digest = hashlib.sha256(suite.pretrained.model.model_dump_json().encode())
    weights = {} if suite.random_init else suite.pretrained.state
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    facts = {
        "weights": digest.hexdigest(),
        "model": suite.pretrained.origin,
        "random_init": suite.random_init,
        "tokenizer": suite.pretrained.tokenizer.fingerprint,
    }
    earlier = on_rank0(partial(_earlier_tasks, suite.out))
    kept = {name: TaskOverrides(**found) for name, found in earlier.items() if name not in names}
    suite = suite._replace(
        config=suite.config.model_copy(update={"tasks": suite.config.tasks | kept})
    )

    def differs(found: dict[str, Any]) -> list[str]:
        before = _before(found, suite.out)
        config = parse_config(found, f"{suite.out}/config.json", FinetuneConfig)
        # A task without a trained seed may get overrides now.
        trained = [n for n in suite.config.tasks | config.tasks if _is_trained(suite.out / n)]
        old, now = (
            each.model_copy(
                update={"tasks": {n: each.tasks.get(n, TaskOverrides()) for n in trained}}
            )
            for each in (config, suite.config)
        )
        science, _ = differences(old, now)
        if before.tokenizer not in (None, facts["tokenizer"]):
            science.insert(0, "tokenizer: another vocabulary")
        if before.weights != facts["weights"]:
            science.insert(0, f"weights: {before.model} -> {facts['model']}")
        return science

    settings = suite.config.model_dump(mode="json") | {"provenance": provenance("") | facts}
    write_or_compare(suite, "config.json", settings, differs)
    return suite


class Before(Record):
    """The provenance in config.json of a suite. Earlier versions did not write the tokenizer.

    weights, tokenizer: fingerprints. model: description of the source of the weights.
    """

    model_config = ConfigDict(extra="ignore")

    weights: str
    model: str = "unknown"
    tokenizer: str | None = None


def _before(found: dict[str, Any], out: Path) -> Before:
    before = found.get("provenance")
    if not isinstance(before, dict) or "weights" not in before:
        raise UserError(
            f"--out {out}: its config.json was not written by finetune; choose another folder"
        )
    return parse_record(before, f"{out}/config.json: provenance", Before)


def _earlier_tasks(out: Path) -> dict[str, dict[str, Any]]:
    """Return the overrides of tasks in DIR/config.json, as JSON values."""
    path = out / "config.json"
    if not path.exists():
        return {}
    found = read_json(path, "the settings of an earlier attempt")
    _before(found, out)
    tasks = parse_config(found, str(path), FinetuneConfig).tasks
    return {name: overrides.model_dump(mode="json") for name, overrides in tasks.items()}


def _is_trained(folder: Path) -> bool:
    """Return whether a folder of a task or suite has a seed with a checkpoint or a result."""
    return any(
        next(folder.rglob(pattern), None) for pattern in ("seed-*/ckpt", "seed-*/result.json")
    )


class TaskFile(Record):
    """The content of task.json. examples: fingerprint of train and dev. notes: for the report."""

    task: dict[str, Any]
    examples: str
    notes: list[str] = Field(default_factory=list)


def write_or_compare(
    suite: Suite,
    name: str,
    settings: dict[str, Any],
    differs: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Write settings to the JSON file DIR/name. Collective.

    differs: function from the settings in an existing file to a list of differences, as text.
    Raises UserError when there are differences and a seed was trained with the earlier settings.
    """
    path = suite.out / name

    def compare_and_write() -> None:
        if path.exists():
            listed = "; ".join(differs(read_json(path, "the settings of an earlier attempt")))
            if listed and _is_trained(path.parent):
                raise UserError(
                    f"{path}: earlier seeds were trained with other settings: {listed}; use "
                    "those, or choose another --out"
                )
        own_folder(suite.out, *Path(name).parts[:-1])
        write_json(path, settings)

    on_rank0(compare_and_write)
