"""Metrics of a checkpoint on held-out rows: the verb `evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from electra_ds.common.errors import UserError
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import open_data
from electra_ds.data.masking import masking_recipe
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.load_model import load_objective
from electra_ds.interop.vocabularies import check_same_vocabulary
from electra_ds.training.checkpoint import find_checkpoint, read_meta, tokenizer_of
from electra_ds.training.held_out import evaluate_sources

BATCH_ROWS = 64


def evaluate_checkpoint(
    path: Path,
    data: str | Path,
    max_rows: int | None,
    trust_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Metrics of a checkpoint on the held-out split of `data`, in fp32, on CUDA if available.

    path: a run folder or a checkpoint. data: a data folder, its URL, or a MIX.json.
    max_rows: most rows of each source; None for all. trust_code: run the code that model.factory of
    the checkpoint names. progress: called with the number of rows that are done and of all.
    Returns the metrics of `held_out.evaluate_sources` by name. Raises UserError when there is no
    checkpoint or no data, when no rows are held out, for a model.factory without trust_code, and
    when vocabulary or sequence length of data and model differ; after phases rows may have any
    length up to max_positions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = find_checkpoint(Path(path))
    module, config = load_objective(folder, device, trust_code)
    dataset = open_data(data)
    _check_vocabulary(folder, dataset.tokenizer, data)
    manifest = dataset.manifest
    held_out = dataset.held_out()
    if not held_out:
        raise UserError(f"{data}: no held-out rows; prepare the data with --valid-fraction above 0")
    tokenizer = manifest.tokenizer
    if read_meta(folder).config.get("phases"):
        config = _with_length(config, manifest.sequence_length, data)
    config.with_data(tokenizer.vocab_size, tokenizer.special_ids, manifest.sequence_length)
    recipe = masking_recipe(manifest, config.objective, config.train.seed)
    if progress is not None:
        sizes = [source.rows.rows for source in held_out.values()]
        total = sum(size if max_rows is None else min(size, max_rows) for size in sizes)
        _report_rows(module, progress, total)
    with torch.no_grad():
        return evaluate_sources(
            module, held_out, recipe, device, batch_rows=BATCH_ROWS, max_rows=max_rows
        )


def _with_length(config: RunConfig, length: int, data: str | Path) -> RunConfig:
    """The config with rows of another length: those of any phase, and of other data."""
    most = getattr(config.model, "max_positions", length)
    if length > most:
        raise UserError(
            f"{data}: rows of {length} tokens, but model.max_positions = {most}; expected data with "
            "shorter rows"
        )
    rows = config.data.model_copy(update={"sequence_length": length})
    return config.model_copy(update={"data": rows})


def _check_vocabulary(folder: Path, data_tokenizer: Path, data: str | Path) -> None:
    """Raise UserError when the tokenizer of the data is not that of the checkpoint."""
    own = tokenizer_of(folder)
    if own.is_dir() and data_tokenizer.is_dir():
        found = load_tokenizer(data_tokenizer)
        check_same_vocabulary(found, data, load_tokenizer(own), own)


def _report_rows(module: nn.Module, progress: Callable[[int, int], None], total: int) -> None:
    """Call `progress` with the rows of all batches so far and `total`, before each batch."""
    done = 0

    def count(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal done
        if "with_counts" in options:  # the other call has the same rows with a fixed corruption
            done += len(arguments[0].input_ids)
            progress(done, total)

    module.register_forward_pre_hook(count, with_kwargs=True)
