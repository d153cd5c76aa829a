"""Metrics of a checkpoint on held-out rows: the verb `evaluate`."""

from pathlib import Path

import torch

from electra_ds.common.errors import UserError
from electra_ds.data.dataset import open_data
from electra_ds.data.masking import masking_recipe
from electra_ds.interop.load_model import load_objective
from electra_ds.training.checkpoint import find_checkpoint
from electra_ds.training.held_out import evaluate_sources

BATCH_ROWS = 64


def evaluate_checkpoint(
    path: Path, data: str | Path, max_rows: int | None, trust_code: bool = False
) -> dict[str, float]:
    """Metrics of a checkpoint on the held-out split of `data`, in fp32, on CUDA if available.

    path: a run folder or a checkpoint. data: a data folder, its URL, or a MIX.json.
    max_rows: most rows of each source; None for all. trust_code: run the code that model.factory of
    the checkpoint names. Returns the metrics of `held_out.evaluate_sources` by name. Raises
    UserError when there is no checkpoint or no data, when no rows are held out, for a model.factory
    without trust_code, and when vocabulary or sequence length of data and model differ.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, config = load_objective(find_checkpoint(Path(path)), device, trust_code)
    dataset = open_data(data)
    manifest = dataset.manifest
    held_out = dataset.held_out()
    if not held_out:
        raise UserError(f"{data}: no held-out rows; prepare the data with --valid-fraction above 0")
    tokenizer = manifest.tokenizer
    config.with_data(tokenizer.vocab_size, tokenizer.special_ids, manifest.sequence_length)
    recipe = masking_recipe(manifest, config.objective, config.train.seed)
    with torch.no_grad():
        return evaluate_sources(
            module, held_out, recipe, device, batch_rows=BATCH_ROWS, max_rows=max_rows
        )
