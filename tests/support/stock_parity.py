"""Rows of documents, and the logits of both encoders, for comparisons with stock classes."""

from collections.abc import Callable
from typing import Any

import small_objective
import torch
from small_objective import IDS

from electra_ds.config.architectures import EncoderConfig, ModelConfig
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.batch import Batch
from electra_ds.model.encoder import encode
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.objective import ElectraObjective

BOUND = 1e-5  # relative to the largest value, fp32
LENGTH = 20
# Lengths of the documents of each row; the rest of a row is padding.
ROWS = {
    "full": [[20], [20], [20]],
    "padded": [[20], [12], [3]],
    "packed": [[9, 11], [1, 5, 14], [7, 8]],
}


def noisy_pair(
    model: ModelConfig, generator: EncoderConfig, **changes: Any
) -> tuple[ModelConfig, EncoderConfig, ElectraObjective]:
    """(model, generator, objective with noise on every parameter). changes: fields of the model."""
    model = type(model).model_validate(model.model_dump() | changes)
    objective = ElectraObjective(model, generator, ObjectiveConfig(), IDS, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model, generator, objective


def batch_of(documents: list[list[int]], length: int = LENGTH) -> Batch:
    """A batch of rows that hold documents of these lengths."""
    ids = torch.randint(5, small_objective.VOCAB, (len(documents), length))
    document_ids, position_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, 1):
            document_ids[row, start : start + size] = number
            position_ids[row, start : start + size] = torch.arange(size)
            start += size
        ids[row, start:] = IDS.pad
    none, zeros = torch.zeros(len(documents), 1), torch.zeros_like(ids)
    batch = Batch(ids, zeros, document_ids, position_ids, none.long(), none, none > 0, none)
    return with_cu_seqlens(batch)


def our_logits(objective: ElectraObjective, batch: Batch, part: str) -> torch.Tensor:
    if part == "discriminator":
        return objective.discriminate(batch.input_ids, batch)[..., None]
    embeddings, encoder, head = objective._generator_parts()
    return head(encode(embeddings, encoder, batch.input_ids, batch), embeddings.word)


def by_document(batch: Batch, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The logits of each document alone, in the places of the rows; 0 at padding.

    logits_of: ids [1, S] -> logits [1, S, ...].
    """
    rows = []
    for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True):
        sizes = torch.bincount(documents)[1:].tolist()
        logits = [logits_of(part[None])[0] for part in ids[: sum(sizes)].split(sizes)]
        logits.append(torch.zeros(len(ids) - sum(sizes), logits[0].shape[-1]))
        rows.append(torch.cat(logits))
    return torch.stack(rows)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
