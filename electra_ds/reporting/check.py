"""Would this run start, and what would it need? Derived numbers, parameters and memory, before a GPU is spent."""

from typing import NamedTuple

from electra_ds.common.section import Section
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import VOCAB_SIZE, parameter_count


class Line(NamedTuple):
    """One value with its meaning; scope is science, machine or derived."""

    key: str
    value: str
    scope: str
    meaning: str


class Report(NamedTuple):
    """What `check` found: the config's values, derived ones, and the config with what the data decides."""

    fields: list[Line]
    derived: list[Line]
    config: RunConfig  # `cost.memory` says what it needs


def check(config: RunConfig, world_size: int, data: Data | None = None) -> Report:
    """Refuse (UserError) what would fail later, else report. With data also epochs and the vocabulary's size."""
    load_engine(config.engine)
    rows, portions = None, {}
    if data is not None:
        info, rows, portions = (
            data.manifest.tokenizer,
            data.manifest.splits["train"].rows,
            data.shares,
        )
        config = config.with_data(info.vocab_size, info.special_ids, data.manifest.sequence_length)
    parameters = parameter_count(config)
    return Report(
        list(_fields(config)),
        list(
            _derived(
                config,
                world_size,
                rows,
                portions,
                config.model.vocab_size or VOCAB_SIZE,
                parameters,
            )
        ),
        config,
    )


def _fields(section, prefix: str = ""):
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _fields(value, f"{prefix}{name}.")
        elif info.description:
            yield Line(
                f"{prefix}{name}", str(value), info.json_schema_extra["scope"], info.description
            )


def _derived(
    config: RunConfig, world_size: int, rows: int | None, portions, vocab_size: int, parameters
):
    train, length = config.train, config.data.sequence_length
    accumulation = config.accumulation(world_size)
    slots = max_masked_positions(config.objective.mask_prob, length)
    yield Line("accumulation", str(accumulation), "derived", "micro-batches per step and rank")
    yield Line("chosen", str(slots), "derived", "places of a full row that the generator predicts")
    yield Line(
        "tokens_per_step", f"{train.global_batch_size * length:,}", "derived", "padding included"
    )
    if train.total_steps or rows:
        steps = config.total_steps(rows)
        yield Line(
            "warmup",
            f"{config.optimizer.warmup_steps / steps:.1%}",
            "derived",
            "of the steps; 100% never ends",
        )
        yield Line("total_steps", f"{steps:,}", "derived", "optimizer steps")
        yield Line(
            "tokens",
            f"{steps * train.global_batch_size * length:,}",
            "derived",
            "seen in the whole run",
        )
        if rows:
            yield Line(
                "epochs",
                f"{steps * train.global_batch_size / rows:.3f}",
                "derived",
                f"over {rows:,} rows",
            )
        for name, part in portions.items():
            epochs = f"{part.epochs(steps * train.global_batch_size):.2f} epochs"
            has = f"{part.rows:,} rows, {part.tokens:,} tokens"
            yield Line(
                f"source {name}",
                epochs,
                "derived",
                f"{part.share:.2%} (weight {part.weight:.6f}); has {has}",
            )
    yield Line(
        "vocab_size", f"{vocab_size:,}", "derived", "the data's; 30,522 is assumed without --data"
    )
    yield Line(
        "discriminator",
        f"{parameters.discriminator:,}",
        "derived",
        "parameters of the main encoder and head",
    )
    yield Line("trained", f"{parameters.joint:,}", "derived", "parameters in all")
