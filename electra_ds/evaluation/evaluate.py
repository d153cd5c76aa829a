"""Held-out metrics of a checkpoint: the verb `evaluate`."""

from pathlib import Path

import torch

from electra_ds.common.errors import UserError
from electra_ds.data.dataset import open_data
from electra_ds.data.masking import masking_recipe
from electra_ds.interop.load_model import load_module
from electra_ds.training.checkpoint import find_checkpoint
from electra_ds.training.held_out import evaluate_sources


def evaluate_checkpoint(
    path: Path, data: str | Path, max_rows: int | None, trust_code: bool = False
) -> dict[str, float]:
    """The verb: figures of one checkpoint on the held-out split of `data`, in fp32, on CUDA where it is at hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, config = load_module(find_checkpoint(path), device, trust_code)
    source = open_data(data)
    manifest = source.manifest
    if not (held_out := source.held_out()):
        raise UserError(f"{data}: no rows are held out; prepare it with a --valid-fraction above 0")
    config.with_data(
        manifest.tokenizer.vocab_size, manifest.tokenizer.special_ids, manifest.sequence_length
    )
    recipe = masking_recipe(manifest, config.objective, config.train.seed)
    with torch.no_grad():
        return evaluate_sources(module, held_out, recipe, device, batch_rows=64, max_rows=max_rows)
