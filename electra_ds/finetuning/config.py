"""Config of fine-tuning: one JSON file for a suite of tasks, with overrides for single tasks."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from electra_ds.common.section import Section, machine, science
from electra_ds.config.architectures import MAX_DROPOUT
from electra_ds.config.loading import load_config
from electra_ds.config.schema import AdamConfig, accumulation


class FinetuneTrain(Section):
    """Section train: length, batch sizes, dropout, seed, and which models are scored and kept."""

    epochs: float = science(3.0, "passes over the training examples", gt=0)
    max_length: int = science(
        128, "tokens of an example, [CLS] and [SEP] included; longer ones are cut", ge=8
    )
    global_batch_size: int = science(32, "examples per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = machine(
        16, "most examples per forward and backward; at most a rank's share of the batch", ge=1
    )
    batching: Literal["padded", "packed"] = machine(
        "padded",
        "layout of a micro-batch: one padded row per example, or one row without padding",
    )
    dropout: float = science(
        0.1,
        "dropout in the encoder and before the head, instead of pretraining's",
        ge=0,
        le=MAX_DROPOUT,
    )
    seed: int = science(
        0,
        "first seed, for the head, the order and dropout; --seeds N uses N consecutive seeds",
        ge=0,
        lt=2**31,
    )
    select: Literal["last", "best"] = science(
        "last",
        "weights that are scored: of the last epoch, or of the best epoch on the dev set",
    )
    keep: Literal["best", "all", "none"] = machine(
        "best", "models to keep: of the best seed on dev, of all seeds, or none"
    )
    max_skipped_steps: int = machine(
        20, "most skipped steps in a row; after more, a seed counts as diverged", ge=1
    )
    timeout_minutes: float = machine(10.0, "longest wait for another rank in a collective", gt=0)
    silence_seconds: float = machine(
        15.0, "seconds without a heartbeat from a rank before the run is stopped", ge=1
    )


class FinetuneOptimizer(AdamConfig):
    """Section optimizer: Adam, warmup as a share of the steps, and layer-wise learning rates."""

    weight_decay: float = science(
        0.0, "decoupled, for all parameters except biases and LayerNorms", ge=0
    )
    warmup_fraction: float = science(0.1, "share of the steps that are warmup", ge=0, lt=1)
    layerwise_lr_decay: float = science(
        0.8,
        "factor of the learning rate from each layer to the one below; the head has factor 1",
        gt=0,
        le=1,
    )


class TaskOverrides(Section):
    """Values of one task, which replace those of the sections train and optimizer unless null."""

    epochs: float | None = science(None, "see train.epochs", gt=0)
    max_length: int | None = science(None, "see train.max_length", ge=8)
    global_batch_size: int | None = science(None, "see train.global_batch_size", ge=1)
    peak_lr: float | None = science(None, "see optimizer.peak_lr", gt=0)


class FinetuneConfig(Section):
    """Config of a suite: training recipe (ELECTRA, section 3.1 and appendix B) and engine."""

    train: FinetuneTrain = FinetuneTrain()
    optimizer: FinetuneOptimizer
    tasks: dict[str, TaskOverrides] = Field({}, description="by task name")
    engine: str | dict[str, Any] = machine(
        "zero0", "DeepSpeed file: a name in ds_configs/engine, a path, or an object"
    )
    provenance: Any = machine(
        None, "what wrote a resolved config (versions, commit, weights); ignored as input"
    )

    def accumulation(self, world_size: int) -> int:
        """Return the micro-batches per step and rank. UserError if the batch cannot be split."""
        return accumulation(self.train, world_size)

    def of(
        self, task: str, task_epochs: float | None, seed: int, world_size: int = 1
    ) -> "FinetuneConfig":
        """Return the config of one task and seed, with the overrides of the task applied.

        task_epochs: epochs in the description of a user's task, or None. Overrides in the config
        replace them. micro_batch_size is reduced to a rank's share of the global batch.
        """
        overrides = self.tasks.get(task, TaskOverrides()).model_dump(exclude_none=True)
        peak_lr = overrides.pop("peak_lr", self.optimizer.peak_lr)
        values = {"epochs": task_epochs or self.train.epochs} | overrides | {"seed": seed}
        train = self.train.model_copy(update=values)
        share = max(1, train.global_batch_size // world_size)
        micro_batch_size = min(train.micro_batch_size, share)
        return self.model_copy(
            update={
                "train": train.model_copy(update={"micro_batch_size": micro_batch_size}),
                "optimizer": self.optimizer.model_copy(update={"peak_lr": peak_lr}),
                "tasks": {},
            }
        )


def load_finetune(name: str, sets: Sequence[str] = (), engine: str | None = None) -> FinetuneConfig:
    """Load the config of a suite with `load_config`, which raises UserError for mistakes.

    A value that --set gives for all tasks (train.epochs=2) replaces the overrides in the file. An
    override on the command line (tasks.NAME.epochs=3) takes precedence over it.
    name: `tiny`, `small`, `base`, `large` or a path. sets, engine: as in `load_config`.
    """
    config = load_config(name, "glue", FinetuneConfig, list(sets), engine)
    keys = [setting.partition("=")[0].strip() for setting in sets]
    if "tasks" in keys:  # --set tasks=... replaces all overrides of the file
        return config
    set_for_all = {key.partition(".")[2] for key in keys if "tasks" not in key}
    fields = TaskOverrides.model_fields.keys() & set_for_all
    tasks = {}
    for task, overrides in config.tasks.items():
        replaced = {field: None for field in fields if f"tasks.{task}.{field}" not in keys}
        tasks[task] = overrides.model_copy(update=replaced)
    return config.model_copy(update={"tasks": tasks})
