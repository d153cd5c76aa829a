"""Rows of a dataset of the Hugging Face hub, or of a folder that `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.common.dataset_cards import check_folder_cards, check_hub_cards
from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened

if TYPE_CHECKING:
    from electra_ds.finetuning.rows import Row
    from electra_ds.finetuning.tasks import Task


def dataset_rows(task: Task, dataset: str, split: str) -> Iterator[Row]:
    """The rows of one split, with the columns that the task reads.

    dataset: a folder, relative to that of the task, or a name on the hub. Class numbers become the
    names of the dataset's ClassLabel; -1 becomes None. UserError when the dataset cannot be read,
    and for a card that names files elsewhere.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"task {task.name} reads a dataset: pip install 'electra_ds[hf]', or give files"
        ) from None
    local = Path(task.folder, dataset)
    source = f"dataset {dataset}, split {task.splits[split]}"
    is_local = local.exists()
    name = str(local) if is_local else dataset
    try:
        # Before `datasets` reads any file or URL that the card names.
        if is_local:
            check_folder_cards(local)
        revision = None if is_local else check_hub_cards(dataset)
        table = datasets.load_dataset(
            name, task.dataset_config, split=task.splits[split], revision=revision
        )
    except UserError:
        raise
    except Exception as error:  # of datasets, pyarrow, the hub and the file system
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
    """The first line of a library's message, without its advice to run code of the dataset."""
    text = str(error)
    if "trust_remote_code" in text or "Dataset scripts" in text:
        return "it needs code of its own, which is not run; convert it to Parquet or JSONL"
    return (text.strip().splitlines() or [type(error).__name__])[0]


def _needed_columns(task: Task, table: Any, source: str) -> Any:
    """The table without columns that the task does not read: an image could name a URL."""
    by_number = any(
        isinstance(name, int) for name in (task.text_a, task.text_b, task.label, task.index)
    )
    read = {task.text_a, task.text_b, task.label, task.index}
    names = [name for name in table.column_names if by_number or name in read]
    for name in names:
        if _is_decoded(table.features[name]):
            raise UserError(
                f"{source}: column {name!r} has images, sounds or documents; expected text, "
                "numbers, or lists of them"
            )
    # Without a needed column all are kept, so that the message of a row can name them.
    return table.select_columns(names) if names else table.remove_columns([])


def _is_decoded(feature: Any) -> bool:
    """Whether `datasets` opens files or URLs to read a column of this type."""
    if isinstance(feature, dict):
        return any(map(_is_decoded, feature.values()))
    if isinstance(feature, list):
        return any(map(_is_decoded, feature))
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "decode_example") or (inner is not None and _is_decoded(inner))


def _label_names(names: list[str], label: Any, where: str) -> str | list[str] | None:
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
