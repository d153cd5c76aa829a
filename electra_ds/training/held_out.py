"""How good is a checkpoint? Held-out rows, the same places and random numbers for every checkpoint of a data folder."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.batch import Batch, fixed_corruption
from electra_ds.data.dataset import HeldOut
from electra_ds.data.loader import evaluation_batches
from electra_ds.data.masking import MaskingRecipe
from electra_ds.model.kernels.attention import document_cu_seqlens
from electra_ds.model.losses import BINS, Counts, histogram
from electra_ds.training.metrics import auc, metrics_of_kind, rates, share


def evaluate(
    module: nn.Module,
    batches: Iterable[tuple[Batch, np.ndarray]],
    unigrams: np.ndarray,
    special_ids: SpecialIds,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, float]:
    """Held-out losses and rates, against the run's own generator and against a fixed corruption.

    module: an `Objective` in eval mode, under no_grad. unigrams: [V] training counts, behind the fixed
    corruption and behind `unigram_loss`, the cross-entropy a model without context would have.
    Losses are in nats per masked position (mlm) and per token that the kind's main loss counts (disc); the figures of the
    own generator are over the same tokens, those of the fixed corruption over all. What a kind has not is left out.
    """
    smoothed = np.log((unigrams + 1.0) / (unigrams.sum() + len(unigrams)))
    log_unigram = torch.from_numpy(smoothed).to(device)
    sums = torch.zeros(
        3 + 8 + 2 * BINS, dtype=torch.float64, device=device
    )  # mlm, disc, unigram, counts
    fixed = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    for rows_of, rows in batches:
        batch = rows_of._replace(cu_seqlens=document_cu_seqlens(rows_of.document_ids)).map(
            lambda tensor: tensor.to(device)
        )
        losses = module(batch, 1.0, 1.0, with_counts=True)
        targets = batch.input_ids.gather(1, batch.masked_positions)
        unigram = -(log_unigram[targets] * batch.masked_weights).sum()
        scalars = torch.stack(
            [losses.mlm_loss.double(), losses.disc_loss.double(), unigram, *losses.counts[:8]]
        )
        sums += torch.cat([scalars, losses.counts.histogram.flatten()])
        if module.objective.detects:
            corrupted, is_replaced = fixed_corruption(rows_of, rows, unigrams, special_ids)
            logits = module(batch._replace(input_ids=corrupted.to(device)), task="discriminate")
            fixed += histogram(logits, is_replaced.to(device), (batch.document_ids > 0).double())
    figures = _metrics(
        sum_over_ranks(sums.cpu()), sum_over_ranks(fixed.cpu()), module.objective.counts_all_tokens
    )
    return metrics_of_kind(figures, module.objective)


def evaluate_sources(
    module: nn.Module,
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
    """`evaluate` on at most `max_rows` rows of each source, as source/figure; plain figures are those of the mixture.

    That is the mean over the sources by their shares in training, so that it compares with the training's own figures
    and does not depend on how many rows a source holds out; tokens and chosen are sums.
    """
    figures, place = (
        {},
        {"batch_rows": batch_rows, "rank": rank, "world_size": world_size, "max_rows": max_rows},
    )
    for name, (rows, unigrams, _) in held_out.items():
        batches = evaluation_batches(rows, recipe, **place)
        figures[name] = evaluate(
            module, batches, unigrams, recipe.special_ids, device, sum_over_ranks
        )
    whole = sum(source.share for source in held_out.values())
    weights = {name: source.share / whole for name, source in held_out.items()}
    found = {
        key: sum(
            own[key] * (1.0 if key in ("tokens", "chosen") else weights[name])
            for name, own in figures.items()
        )
        for key in next(iter(figures.values()))
    }
    return found | {
        f"{name}/{key}": value
        for name, own in figures.items()
        if name
        for key, value in own.items()
    }


def _metrics(sums: Tensor, fixed: Tensor, counts_all_tokens: bool) -> dict[str, float]:
    mlm, disc, unigram, chosen, tokens = sums[:5].tolist()
    if not tokens:
        raise UserError(
            "the held-out split has no rows: prepare the data with a larger --valid-fraction"
        )
    found = rates(Counts(*sums[3:11], sums[11:].view(2, BINS)))
    half = BINS // 2  # logits above 0 say replaced
    hits, alarms, misses = (
        fixed[1, half:].sum().item(),
        fixed[0, half:].sum().item(),
        fixed[1, :half].sum().item(),
    )
    return {
        "mlm_loss": mlm / chosen,
        "unigram_loss": unigram / chosen,
        "disc_loss": disc / (tokens if counts_all_tokens else chosen),
        "base_rate_loss": _entropy(found["replaced_fraction"]),
        **found,
        "fixed_auc": auc(fixed),
        "fixed_precision": share(hits, hits + alarms),
        "fixed_recall": share(hits, hits + misses),
        "tokens": tokens,
        "chosen": chosen,
    }


def _entropy(share: float) -> float:
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
