"""Rows of a dataset of the Hugging Face hub, or of a folder that `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.common.dataset_cards import check_folder_cards, check_hub_cards
from electra_ds.common.dataset_features import check_not_decoded
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import nearest
from electra_ds.finetuning.dataset_files import load_limited

if TYPE_CHECKING:
    from electra_ds.finetuning.rows import Row
    from electra_ds.finetuning.tasks import Task


def dataset_rows(task: Task, dataset: str, split: str) -> Iterator[Row]:
    """Yield the rows of one split, with the columns that the task reads.

    dataset: a folder below that of the task, or a name on the hub. Class numbers become the
    names of the dataset's ClassLabel; -1 and -100 become None. Raises UserError when the dataset
    cannot be read, when its card names files outside the dataset, and when a file would become too
    large.
    """
    try:
        import datasets  # noqa: F401 (its absence is an error of the user)
    except ImportError:
        raise UserError(
            f"task {task.name} reads a dataset: pip install 'electra_ds[hf]', or give files"
        ) from None
    local = Path(task.folder, dataset)
    source = f"dataset {dataset}, split {task.splits[split]}"
    is_local = local.exists()
    name = str(local) if is_local else dataset
    if not is_local and Path(dataset).exists():
        raise UserError(
            f"{source}: the current directory has a folder of this name, which would be read in the "
            "place of the dataset on the hub; run the command in another directory"
        )
    try:
        # Before `datasets` reads any file or URL that the card names.
        if is_local:
            check_folder_cards(local)
        revision = None if is_local else check_hub_cards(dataset)
        builder = load_limited(name, task.dataset_config, revision)
        table = builder.as_dataset(split=task.splits[split])
    except UserError:
        raise
    except Exception as error:  # from datasets, pyarrow, huggingface_hub or the file system
        raise UserError(f"{source}: {_reason(error)}") from None
    table = _needed_columns(task, table, source)
    feature = table.features.get(task.label)
    # Names of a ClassLabel, or of the ClassLabel inside a sequence.
    names = getattr(getattr(feature, "feature", feature), "names", None)
    for number, row in enumerate(table):
        where = f"{source}, row {number}"
        label = row.get(task.label)
        if names and label is not None:
            row = row | {task.label: _label_names(names, label, where)}
        yield where, row


def _reason(error: Exception) -> str:
    """Return the first line of a library's message, but no advice to run code of the dataset."""
    text = str(error)
    if "trust_remote_code" in text or "Dataset scripts" in text:
        return "it needs its own loading code, which is not run; convert it to Parquet or JSONL"
    return (text.strip().splitlines() or [type(error).__name__])[0]


def _needed_columns(task: Task, table: Any, source: str) -> Any:
    """Return the table with the columns that the task reads.

    Raises UserError if it has none of them, before a row is read, and for a needed column of images
    or files, because `datasets` opens their URLs.
    """
    read = {task.text_a, task.text_b, task.label, task.index, *task.choice_columns}
    by_number = any(isinstance(name, int) for name in read)
    names = [name for name in table.column_names if by_number or name in read]
    check_not_decoded(table.features, names, source)
    if not names:
        found = [printable(name) for name in table.column_names]
        raise UserError(
            f"{source}: no column {task.text_a!r}{nearest(str(task.text_a), found)}; found "
            f"{', '.join(found)}; name the columns in the task"
        )
    return table.select_columns(names)


def _label_names(names: list[str], label: Any, where: str) -> str | list[str] | None:
    """Return class names for class numbers; None if all numbers are -1 or -100 (no label)."""
    numbers = label if isinstance(label, list) else [label]
    if all(number == -1 or number == -100 for number in numbers):
        return None
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise UserError(
                f"{where}: label {shortened(number)}; expected a class number from 0 to "
                f"{len(names) - 1}"
            )
    found = [names[number] for number in numbers]
    return found if isinstance(label, list) else found[0]
