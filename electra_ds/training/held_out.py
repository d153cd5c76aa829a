"""Evaluation of held-out rows: losses, rates, and detection of a fixed corruption."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.batch import Batch, fixed_corruption
from electra_ds.data.dataset import HeldOut
from electra_ds.data.loader import evaluation_batches
from electra_ds.data.masking import MaskingRecipe
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.losses import BINS, COUNTS_SIZE, Counts, histogram
from electra_ds.training.entropy import entropy
from electra_ds.training.metrics import (
    auc,
    average_precision,
    metrics_of_kind,
    rates,
    share,
)

SUMMED_KEYS = ("tokens", "chosen")  # metrics that are sums, not means


def evaluate(
    module: Any,
    batches: Iterable[tuple[Batch, np.ndarray]],
    unigrams: np.ndarray,
    special_ids: SpecialIds,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, float]:
    """Return losses and rates of held-out rows, with the model's generator and a fixed corruption.

    module: an `Objective` in eval mode; the caller disables gradients.
    batches: (batch, row numbers), as `evaluation_batches` yields them.
    unigrams: [V] token counts of the training rows, for the fixed corruption and for
    `unigram_loss`, the cross-entropy of a model without context.
    device: where the module is.
    sum_over_ranks: returns the sum of a CPU fp64 tensor over the ranks; by default one process.
    Losses are in nats per masked position (mlm) and per token of the main loss (disc). Rates with
    the model's generator are over the tokens of the main loss, rates with the fixed corruption over
    all real tokens. The result has only the metrics that exist for the kind of objective.
    Raises UserError when there are no rows.
    """
    log_unigrams = _log_unigrams(unigrams).to(device)
    losses_sum = torch.zeros(3, dtype=torch.float64, device=device)  # mlm, disc, unigram
    counts_sum = torch.zeros(COUNTS_SIZE, dtype=torch.float64, device=device)
    fixed = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    for cpu_batch, rows in batches:
        batch = with_cu_seqlens(cpu_batch).map(lambda tensor: tensor.to(device))
        losses = module(batch, with_counts=True)
        targets = batch.input_ids.gather(1, batch.masked_positions)
        unigram = -(log_unigrams[targets] * batch.masked_weights).sum()
        losses_sum += torch.stack([losses.mlm_loss.double(), losses.disc_loss.double(), unigram])
        counts_sum += losses.counts.to_vector()
        if module.objective.detects:
            corrupted, is_replaced = fixed_corruption(cpu_batch, rows, unigrams, special_ids)
            logits = module(batch._replace(input_ids=corrupted.to(device)), task="discriminate")
            real = (batch.document_ids > 0).double()
            fixed += histogram(logits, is_replaced.to(device), real)
    metrics = _metrics(
        sum_over_ranks(losses_sum.cpu()),
        Counts.from_vector(sum_over_ranks(counts_sum.cpu())),
        sum_over_ranks(fixed.cpu()),
        module.objective.counts_all_tokens,
    )
    return metrics_of_kind(metrics, module.objective)


def _log_unigrams(unigrams: np.ndarray) -> Tensor:
    """Log probabilities [V] fp64 of the training tokens, with one added to each count."""
    smoothed = (unigrams + 1.0) / (unigrams.sum() + len(unigrams))
    return torch.from_numpy(np.log(smoothed))


def evaluate_sources(
    module: Any,
    held_out: dict[str, HeldOut],
    recipe: MaskingRecipe,
    device: torch.device,
    *,
    batch_rows: int,
    max_rows: int | None,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, float]:
    """Return the metrics of `evaluate` for each source and for the mixture.

    Keys of a source are source/metric. Keys without a source are the means over the sources,
    weighted by their shares in training, so that they are comparable with the metrics of training.
    `tokens` and `chosen` (masked positions) are sums.

    batch_rows: rows per batch on each rank.
    max_rows: largest number of rows of each source; None for all.
    Raises UserError when a source has no rows.
    """
    by_source: dict[str, dict[str, float]] = {}
    for name, source in held_out.items():
        batches = evaluation_batches(
            source.rows,
            recipe,
            batch_rows=batch_rows,
            rank=rank,
            world_size=world_size,
            max_rows=max_rows,
        )
        by_source[name] = evaluate(
            module, batches, source.unigrams, recipe.special_ids, device, sum_over_ranks
        )
    total_share = sum(source.share for source in held_out.values())
    weights = {name: source.share / total_share for name, source in held_out.items()}
    mixture = {
        key: sum(
            metrics[key] * (1.0 if key in SUMMED_KEYS else weights[name])
            for name, metrics in by_source.items()
        )
        for key in next(iter(by_source.values()))
    }
    named = {
        f"{name}/{key}": value
        for name, metrics in by_source.items()
        if name
        for key, value in metrics.items()
    }
    return mixture | named


def _metrics(
    losses: Tensor, counts: Counts, fixed: Tensor, counts_all_tokens: bool
) -> dict[str, float]:
    """Metrics of summed losses [3] (mlm, disc, unigram), counts, and the histogram `fixed`."""
    mlm, disc, unigram = losses.tolist()
    masked, tokens = float(counts.masked), float(counts.tokens)
    if not tokens:
        raise UserError(
            "the held-out split has no rows: prepare the data with a larger --valid-fraction"
        )
    own = rates(counts)
    half = BINS // 2  # a logit above 0 predicts replaced
    hits = float(fixed[1, half:].sum())
    false_alarms = float(fixed[0, half:].sum())
    misses = float(fixed[1, :half].sum())
    disc_loss = disc / (tokens if counts_all_tokens else masked)
    base_rate_loss = entropy(own["replaced_fraction"])
    return {
        "mlm_loss": mlm / masked,
        "unigram_loss": unigram / masked,
        "mlm_gain": (unigram - mlm) / masked,
        "disc_loss": disc_loss,
        "base_rate_loss": base_rate_loss,
        "disc_gain": base_rate_loss - disc_loss,
        **own,
        "fixed_auc": auc(fixed),
        "fixed_ap": average_precision(fixed),
        "fixed_precision": share(hits, hits + false_alarms),
        "fixed_recall": share(hits, hits + misses),
        "tokens": tokens,
        "chosen": masked,
    }
