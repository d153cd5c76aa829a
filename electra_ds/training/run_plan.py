"""Plan of a pretraining run: completed config, engine, training rows, number of steps.

`pretrain` and `check` both call `plan`, so both raise the same errors.
"""

from dataclasses import dataclass
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import OptimizerConfig, RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.masking import MaskingRecipe, masking_recipe
from electra_ds.data.rows import RowOrder, RowReader
from electra_ds.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TrainingData:
    """Training rows of a run: source, reader, order and masking recipe."""

    source: Data
    reader: RowReader
    row_order: RowOrder
    recipe: MaskingRecipe


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    config: with the engine as an object, and with vocab_size and special_ids of the data.
    engine: the checked DeepSpeed config. data: the training rows. total_steps: optimizer steps.
    """

    config: RunConfig
    engine: dict[str, Any]
    data: TrainingData
    total_steps: int


def plan(config: RunConfig, source: Data, world_size: int) -> Plan:
    """Return the plan of a run.

    source: the data behind --data. world_size: number of ranks.
    Raises UserError when config, data and number of ranks are incompatible.
    """
    manifest = source.manifest
    tokenizer = manifest.tokenizer
    config = config.with_data(
        tokenizer.vocab_size, tokenizer.special_ids, manifest.sequence_length, manifest.segments
    )
    engine = load_engine(config.engine)
    check_optimizer(config.optimizer, engine)
    config = config.model_copy(update={"engine": engine})
    config.accumulation(world_size)
    data = _training_data(config, source)
    total_steps = config.total_steps(data.reader.rows)
    check_schedule(config.optimizer, total_steps)
    return Plan(config, engine, data, total_steps)


def check_optimizer(options: OptimizerConfig, engine: dict[str, Any]) -> None:
    """Raise UserError for an optimizer that does not work with the engine.

    engine: the DeepSpeed config.
    """
    offload = engine.get("zero_optimization", {}).get("offload_optimizer") or {}
    if options.kind != "adam" and offload.get("device", "none") != "none":
        raise UserError(
            f"optimizer.kind = {options.kind}, but the engine has offload_optimizer, which works "
            "with adam only: use an engine without offload (zero0 to zero3), or optimizer.kind = adam"
        )


def check_schedule(options: OptimizerConfig, total_steps: int) -> None:
    """Raise UserError when the decay of a schedule is longer than the run after the warmup.

    total_steps: of the run; with train.epochs it is known only with the data.
    """
    decay, warmup = options.decay_steps, options.warmup_steps
    if decay is not None and decay + warmup > total_steps:
        left = total_steps - warmup
        fits = (
            f"at most {left:,}, the steps after the warmup"
            if left > 0
            else "a warmup that is shorter than the run"
        )
        raise UserError(
            f"optimizer.decay_steps = {decay:,}, but the run has {total_steps:,} steps, "
            f"{warmup:,} of them warmup (optimizer.warmup_steps); expected {fits}: lower "
            "decay_steps or warmup_steps, or make the run longer"
        )


def plan_warnings(config: RunConfig, total_steps: int) -> list[str]:
    """Return one warning line for each setting that does not have the intended effect."""
    lines = []
    warmup = config.optimizer.warmup_steps
    if warmup >= total_steps:
        lines.append(
            f"WARNING: optimizer.warmup_steps = {warmup:,} of {total_steps:,} steps: the learning "
            f"rate does not reach optimizer.peak_lr = {config.optimizer.peak_lr:g}; lower "
            "warmup_steps or raise train.total_steps"
        )
    return lines


def _training_data(config: RunConfig, source: Data) -> TrainingData:
    train, objective = config.train, config.objective
    reader, row_order = source.training(train.seed, train.global_batch_size)
    begins_word = edge_classes = None
    if objective.masking != "token":
        tokenizer = load_tokenizer(source.tokenizer)
        begins_word, edge_classes = tokenizer.begins_word(), tokenizer.edge_classes()
    recipe = masking_recipe(source.manifest, objective, train.seed, begins_word, edge_classes)
    return TrainingData(source, reader, row_order, recipe)
