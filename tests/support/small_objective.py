"""A small ELECTRA objective and a batch of random rows for it."""

import torch

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    DebertaV2GeneratorConfig,
    DebertaV2ModelConfig,
    ElectraGeneratorConfig,
    ElectraModelConfig,
    ModernBertGeneratorConfig,
    ModernBertModelConfig,
)
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.batch import Batch
from electra_ds.model.losses import Totals
from electra_ds.model.objective import ElectraObjective

IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
VOCAB = 101


def build(
    dropout: float = 0.0,
    vocab_size: int = VOCAB,
    architecture: str = "electra",
    sharing: str = "shared",
    **objective,
) -> ElectraObjective:
    """An objective with small encoders; `objective`: its config."""
    model, generator = CONFIGS[architecture](dropout, vocab_size, sharing)
    return ElectraObjective(model, generator, ObjectiveConfig(**objective), IDS, seed=1)


def electra_configs(dropout: float = 0.0, vocab_size: int = VOCAB, sharing: str = "shared"):
    """Encoders of two layers, 48 and 24 wide."""
    sizes = dict(
        num_layers=2, num_heads=2, ffn_size=64, hidden_dropout=dropout, attention_dropout=dropout
    )
    model = ElectraModelConfig(
        hidden_size=48,
        embedding_size=32,
        max_positions=40,
        vocab_size=vocab_size,
        init="fan_in",
        embedding_init_std=0.5,
        sharing=sharing,
        **sizes,
    )
    generator = ElectraGeneratorConfig(hidden_size=48 if sharing == "all" else 24, **sizes)
    return model, generator


def modernbert_configs(dropout: float = 0.0, vocab_size: int = VOCAB, sharing: str = "shared"):
    """Encoders of four and two layers, with a local window smaller than a row of 20 tokens.

    48 wide; with sharing = untied the generator is 24 wide.
    """
    sizes = dict(
        num_heads=2,
        ffn_size=40,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
    )
    model = ModernBertModelConfig(
        hidden_size=48,
        num_layers=4,
        max_positions=40,
        local_attention=8,
        global_theta=500.0,
        local_theta=100.0,
        vocab_size=vocab_size,
        init="fan_in",
        embedding_init_std=0.5,
        sharing=sharing,
        **sizes,
    )
    generator = ModernBertGeneratorConfig(
        hidden_size=24 if sharing == "untied" else 48,
        num_layers=4 if sharing == "all" else 2,
        **sizes,
    )
    return model, generator


def deberta_configs(dropout: float = 0.0, vocab_size: int = VOCAB, sharing: str = "shared"):
    """Encoders of three and two layers, with more distances in a row of 20 tokens than buckets.

    48 wide; with sharing = untied the generator is 24 wide.
    """
    sizes = dict(num_heads=2, ffn_size=64, hidden_dropout=dropout, attention_dropout=dropout)
    model = DebertaV2ModelConfig(
        hidden_size=48,
        num_layers=3,
        max_positions=40,
        position_buckets=8,
        vocab_size=vocab_size,
        init="fan_in",
        embedding_init_std=0.5,
        sharing=sharing,
        **sizes,
    )
    generator = DebertaV2GeneratorConfig(
        hidden_size=24 if sharing == "untied" else 48,
        num_layers=3 if sharing == "all" else 2,
        **sizes,
    )
    return model, generator


CONFIGS = {
    "electra": electra_configs,
    "modernbert": modernbert_configs,
    "deberta_v2": deberta_configs,
}


def make_batch(
    rows: int = 4, length: int = 20, masked: int = 4, seed: int = 0, vocab_size: int = VOCAB
) -> Batch:
    """A batch of random tokens.

    Row 0 is full, row 1 holds two documents, row 2 ends in padding and uses one masked position
    less, row 3 has no masked position.
    """
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size, (rows, length), generator=random)
    ids[:, 0] = IDS.cls
    document_ids = torch.ones(rows, length, dtype=torch.long)
    position_ids = torch.arange(length).repeat(rows, 1)
    document_ids[1, 9:] = 2
    position_ids[1, 9:] -= 9
    document_ids[2, 12:] = 0
    ids[2, 12:] = IDS.pad
    masked_positions = torch.rand(rows, 11, generator=random).argsort(1)[:, :masked] + 1
    masked_weights = torch.ones(rows, masked)
    masked_weights[2, -1] = 0
    masked_positions[2, -1] = 0
    masked_weights[3] = 0
    masked_positions[3] = 0
    keep_original = torch.rand(rows, masked, generator=random) > 0.6
    uniforms = torch.rand(rows, masked, generator=random)
    return Batch(
        ids,
        torch.zeros_like(ids),
        document_ids,
        position_ids,
        masked_positions,
        masked_weights,
        keep_original,
        uniforms,
    )


def counts_of(batch: Batch) -> Totals:
    """The numbers of masked positions and of tokens, which the losses are divided by."""
    return Totals(batch.masked_weights.sum(), (batch.document_ids > 0).sum())
