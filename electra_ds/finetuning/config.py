"""What is a fine-tuning? One frozen JSON config for a suite of tasks, with what single tasks do otherwise."""

from typing import Any, Literal

from pydantic import Field

from electra_ds.common.section import Section, machine, science
from electra_ds.config.loading import load_config
from electra_ds.config.schema import AdamConfig, accumulation


class FinetuneTrain(Section):
    """How long, how much at once, from which seed."""

    epochs: float = science(3.0, "passes over the training examples", gt=0)
    max_length: int = science(
        128, "tokens of an example, [CLS] and [SEP] included; longer ones are cut", ge=8
    )
    global_batch_size: int = science(32, "examples per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = machine(
        16, "most examples per forward and backward; never above a rank's share", ge=1
    )
    batching: Literal["padded", "packed"] = machine(
        "padded",
        "a micro-batch: a row per example, padded to its longest, or one row without padding",
    )
    dropout: float = science(
        0.1, "in the encoder and before the head, whatever pretraining had", ge=0, lt=1
    )
    seed: int = science(
        0,
        "first seed: of the head, the order and dropout; --seeds counts on from it",
        ge=0,
        lt=2**31,
    )
    select: Literal["last", "best"] = science(
        "last",
        "weights that are scored: after the last epoch, or the best epoch on the dev set (said in the report)",
    )
    keep: Literal["best", "all", "none"] = machine(
        "best", "models kept: of the best seed on dev, of all, of none"
    )
    max_skipped_steps: int = machine(
        20, "skipped steps in a row before a seed counts as diverged", ge=1
    )
    timeout_minutes: float = machine(10.0, "longest wait for another rank in any collective", gt=0)
    silence_seconds: float = machine(
        15.0, "without a word of a rank, until the others end the run", ge=1
    )


class FinetuneOptimizer(AdamConfig):
    """Adam with warmup as a share of the steps and a rate that falls from the head to the embeddings."""

    weight_decay: float = science(0.0, "decoupled, on everything but biases and LayerNorm", ge=0)
    warmup_fraction: float = science(
        0.1, "share of the steps in which the rate warms up", ge=0, lt=1
    )
    layerwise_lr_decay: float = science(
        0.8,
        "factor of the rate from one layer to the next below: the head has 1, the top layer this",
        gt=0,
        le=1,
    )


class TaskOverrides(Section):
    """What one task does otherwise; null: as the sections say."""

    epochs: float | None = science(None, "see train.epochs", gt=0)
    max_length: int | None = science(None, "see train.max_length", ge=8)
    global_batch_size: int | None = science(None, "see train.global_batch_size", ge=1)
    peak_lr: float | None = science(None, "see optimizer.peak_lr", gt=0)


class FinetuneConfig(Section):
    """A suite: the recipe of ELECTRA, section 3.1 and appendix B, with the engine it runs on."""

    train: FinetuneTrain = FinetuneTrain()
    optimizer: FinetuneOptimizer
    tasks: dict[str, TaskOverrides] = Field({}, description="by task name")
    engine: str | dict[str, Any] = machine(
        "zero0", "DeepSpeed file: a name in ds_configs/engine, a path, or an object"
    )
    provenance: Any = machine(None, "what wrote a resolved config; ignored as input")

    def accumulation(self, world_size: int) -> int:
        """`config.accumulation` of this suite."""
        return accumulation(self.train, world_size)

    def of(
        self, task: str, own_epochs: float | None, seed: int, world_size: int = 1
    ) -> "FinetuneConfig":
        """The config of one task and seed. own_epochs: what the description of a user's own task asks for.

        micro_batch_size is at most a rank's share of the global batch.
        """
        found = self.tasks.get(task, TaskOverrides()).model_dump(exclude_none=True)
        optimizer = {"peak_lr": found.pop("peak_lr", self.optimizer.peak_lr)}
        train = self.train.model_copy(
            update={"epochs": own_epochs or self.train.epochs} | found | {"seed": seed}
        )
        share = max(1, train.global_batch_size // world_size)
        train = train.model_copy(update={"micro_batch_size": min(train.micro_batch_size, share)})
        sections = {"train": train, "tasks": {}}
        return self.model_copy(
            update=sections | {"optimizer": self.optimizer.model_copy(update=optimizer)}
        )


def load_finetune(name: str, sets: list[str] = (), engine: str | None = None) -> FinetuneConfig:
    """`load_config` of a suite. What --set says of all tasks holds for all, over the file's own word on single ones."""
    config, said = (
        load_config(name, "glue", FinetuneConfig, sets, engine),
        [s.partition("=")[0].strip() for s in sets],
    )
    for_all = TaskOverrides.model_fields.keys() & {
        key.partition(".")[2] for key in said if "tasks" not in key
    }
    tasks = {
        task: own.model_copy(
            update={key: None for key in for_all if f"tasks.{task}.{key}" not in said}
        )
        for task, own in config.tasks.items()
        if "tasks" not in said
    }
    return config.model_copy(update={"tasks": config.tasks | tasks})
