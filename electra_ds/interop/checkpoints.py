"""Reading of checkpoints of the built-in encoders. The weights are compared with the config."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import reading
from electra_ds.common.json_files import Record, parse_record
from electra_ds.common.printable import printable
from electra_ds.config.architectures import ModelConfig
from electra_ds.config.loading import parse_config
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.parts import encoder_with_task_head
from electra_ds.interop.vocabularies import tokenizer_of_model
from electra_ds.model.build import build_objective
from electra_ds.model.gdes import with_sums
from electra_ds.model.weights import (
    Shapes,
    check_layers,
    check_shapes,
    check_state,
    check_values,
    shapes_of,
)
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint_config import config_of_weights

CHECKPOINTS = (
    "a run folder (OUT), OUT/ckpt, OUT/ckpt/STEP, a fine-tuned model (DIR/TASK, DIR/TASK/seed-N) "
    "or, where a pretrained encoder is expected, a Hugging Face folder"
)


def resolve_checkpoint(path: Path, expected: str = CHECKPOINTS) -> Path:
    """Return the folder with meta.json of a run, a checkpoint or a fine-tuned model.

    path: one of the folders in CHECKPOINTS, except a Hugging Face folder. expected: description of
    the accepted folders, for the error message.
    Raises UserError when there is none, and when `path` contains the models of several seeds.
    """
    with reading(path, expected):
        models = sorted(
            meta.parent
            for pattern in ("model/meta.json", "seed-*/model/meta.json")
            for meta in path.glob(pattern)
        )
    if len(models) > 1:
        raise UserError(
            f"{path}: contains the models of {len(models)} seeds; give one, such as "
            f"{models[0].parent}"
        )
    return models[0] if models else checkpoint.find_checkpoint(path, expected)


class FineTunedTrain(Record):
    """The values of train in the config of a fine-tuned model that predictions depend on."""

    model_config = ConfigDict(extra="ignore")

    max_length: int | None = Field(None, ge=8)


class FineTunedTask(Record):
    """The values of task in the config of a fine-tuned model that its head depends on."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field("task", min_length=1, max_length=255)
    kind: Literal[
        "classification",
        "regression",
        "token_classification",
        "multiple_choice",
        "question_answering",
    ]
    labels: list[str] | None = Field(None, min_length=1)
    label_range: tuple[float, float] | None = None
    text_b: str | int | None = None
    choices: list[str | int] | str | int | None = None
    dataset: str | None = None
    splits: dict[str, str] = Field(default_factory=dict)


class FineTunedConfig(Record):
    """The config in meta.json of a fine-tuned model.

    scores: split -> metric -> score. tokenizer: fingerprint of the tokenizer. trained_length:
    tokens of a row in pretraining. Earlier versions did not write tokenizer and trained_length.
    """

    model_config = ConfigDict(extra="ignore")

    model: dict[str, Any]
    task: FineTunedTask
    train: FineTunedTrain = Field(default_factory=lambda: FineTunedTrain(max_length=None))
    scores: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    tokenizer: str | None = None
    trained_length: int | None = None

    @field_validator("scores", mode="before")
    @classmethod
    def _by_split(cls, scores: Any) -> Any:
        """Add the split `valid` to the scores of a best epoch: earlier versions wrote no split."""
        is_flat = isinstance(scores, dict) and any(
            isinstance(value, (int, float)) for value in scores.values()
        )
        return {"valid": scores} if is_flat else scores


class Checkpoint(NamedTuple):
    """A checkpoint of the built-in encoders with all its weights.

    model: sizes of the main encoder. weights: canonical name -> fp32 tensor on the CPU, without
    padded rows; names and shapes agree with the config. Deltas of model.sharing = "gdes" are
    replaced by sums (embeddings.*). run: the config of a pretraining run, of its phase;
    fine_tuned: the config of a fine-tuned model; one of the two is None.
    """

    folder: Path
    meta: checkpoint.Meta
    model: ModelConfig
    weights: dict[str, Tensor]
    run: RunConfig | None
    fine_tuned: FineTunedConfig | None

    def tokenizer(self, given: Path | None = None) -> Tokenizer:
        """Load the tokenizer of the checkpoint. Arguments and errors as in `tokenizer_of_model`."""
        special_ids = self.run.data.special_ids if self.run else None
        fingerprint = self.fine_tuned.tokenizer if self.fine_tuned else None
        return tokenizer_of_model(
            self.folder, given, self.model.vocab_size, special_ids, fingerprint
        )

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a row: that of the training, at most max_positions."""
        length = self.fine_tuned.train.max_length if self.fine_tuned else None
        length = self.run.data.sequence_length if self.run else length
        return min(length or self.model.max_positions, self.model.max_positions)

    def trained_segments(self) -> int | None:
        """Return 1 if the run trained token type 0 alone, else the number of token types.

        Rows with one segment give the other token types no gradient, so their second moments are 0.
        None if it is not known: a model without token types or moments, or a fine-tuned model.
        """
        if self.run is None or self.model.segments is None or self.model.segments < 2:
            return None
        tables = "embedding_deltas" if self.run.model.sharing == "gdes" else "embeddings"
        name = f"exp_avg_sq/{tables}.token_type.weight"
        for _, moment in checkpoint.tensors(self.folder, self.meta, "optim", only={name}):
            first, *others = moment.any(dim=-1).tolist()
            return (self.model.segments if any(others) else 1) if first else None
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the metadata and all weights of a run, a checkpoint or a fine-tuned model.

    path: see `resolve_checkpoint`. Sizes and sha256 of the files are checked.
    Raises UserError for damaged files, for weights that do not fit the config or are not finite,
    and for a run with modules from model.factory.
    """
    folder = resolve_checkpoint(path)
    meta = checkpoint.read_meta(folder)
    weights = checkpoint.weights(folder)
    if not {"embeddings.word.weight", "embedding_deltas.word.weight"} & weights.keys():
        raise UserError(
            f"{folder}: expected the built-in encoder (embeddings.*, discriminator.*), found "
            f"{', '.join(map(printable, sorted(weights)[:2]))}, ...; for modules of your own use "
            "electra_ds.load"
        )
    where = f"{folder}/meta.json"
    if "task" not in meta.config:
        config = config_of_weights(meta, where)
        check_run(config, weights, folder)
        return Checkpoint(folder, meta, config.model, with_sums(weights), config, None)
    tuned = parse_record(meta.config, f"{where}: config", FineTunedConfig)
    model = parse_config(tuned.model, where, ModelConfig)
    check_layers(weights, "discriminator.layers.", model.num_layers, str(folder))
    outputs = len(tuned.task.labels or [""])
    shapes = shapes_of(lambda: encoder_with_task_head(model, outputs), where)
    check_state(weights, shapes, str(folder))
    return Checkpoint(folder, meta, model, weights, None, tuned)


def check_run(config: RunConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Compare the weights of a run of the built-in encoders with its config.

    weights: canonical name -> tensor. folder: the checkpoint, for messages.
    Raises UserError as `check_run_shapes`, and for values that are not finite.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    check_run_shapes(config, shapes, folder)
    check_values(weights, str(folder))


def check_run_shapes(config: RunConfig, shapes: Shapes, folder: Path) -> None:
    """Compare the shapes of the weights of a run of the built-in encoders with its config.

    shapes: of the weights by canonical name. folder: the checkpoint, for messages.
    Raises UserError for a config without the values of its data, and for weights that do not fit.
    """
    where = f"{folder}/meta.json"
    if isinstance(config.model, FactoryConfig):
        raise UserError(
            f"{where}: model.factory is set, but the weights are those of the built-in encoder; "
            "expected a config that fits them; for modules of your own use electra_ds.load"
        )
    for key, value in (
        ("model.vocab_size", config.model.vocab_size),
        ("data.special_ids", config.data.special_ids),
    ):
        if value is None:
            raise UserError(f"{where}: {key} is missing; expected the config of a checkpoint")
    check_layers(shapes, "discriminator.layers.", config.model.num_layers, str(folder))
    if config.objective.has_generator and config.model.sharing != "all":
        check_layers(shapes, "generator.layers.", config.generator.num_layers, str(folder))
    check_shapes(shapes, shapes_of(lambda: build_objective(config), where), str(folder))
