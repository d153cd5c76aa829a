"""What is a run? One frozen JSON config: every number has one owner, a unit and a scope.

Scope `science`: a resume with another value is refused. Scope `machine`: said, then gone on with (seams: Config).
"""

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from electra_ds.errors import UserError
from electra_ds.files import read_json

Config = TypeVar("Config", bound=BaseModel)


def science(default: Any, meaning: str, **limits: Any) -> Any:
    """A field that decides what is learned."""
    return Field(default, description=meaning, json_schema_extra={"scope": "science"}, **limits)


def machine(default: Any, meaning: str, **limits: Any) -> Any:
    """A field that decides where and how fast it is learned, or what is watched."""
    return Field(default, description=meaning, json_schema_extra={"scope": "machine"}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class SpecialIds(Section):
    """Token ids with a meaning of their own; the tokenizer's, never a choice of the run."""

    pad: int = science(..., "id of [PAD]")
    unk: int = science(..., "id of [UNK]")
    cls: int = science(..., "id of [CLS]")
    sep: int = science(..., "id of [SEP]")
    mask: int = science(..., "id of [MASK]")


class EncoderConfig(Section):
    """The sizes that each of the two encoders owns."""

    hidden_size: int = science(..., "width of the encoder", ge=1)
    num_layers: int = science(..., "transformer layers", ge=1)
    num_heads: int = science(..., "attention heads, must divide hidden_size", ge=1)
    ffn_size: int = science(..., "width of the feed-forward layer", ge=1)
    hidden_dropout: float = science(0.1, "dropout after embeddings and sublayers", ge=0, lt=1)
    attention_dropout: float = science(0.1, "dropout on attention probabilities", ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "EncoderConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self


class GeneratorConfig(EncoderConfig):
    """The generator's encoder: integers of its own, not fractions of the discriminator's."""


class ModelConfig(EncoderConfig):
    """The discriminator's encoder and what both encoders share."""

    embedding_size: int = science(..., "width of the word, position and token-type tables", ge=1)
    max_positions: int = science(512, "rows of the position table", ge=1)
    type_vocab_size: int = science(2, "rows of the token-type table", ge=1)
    layer_norm_eps: float = science(1e-12, "epsilon of every LayerNorm", gt=0)
    init: Literal["normal", "fan_in"] = science(
        "normal", "matrices: truncated normal of init_std, or plain normal of 1/sqrt(inputs)"
    )
    init_std: float = science(0.02, "standard deviation of `normal`", gt=0)
    embedding_init_std: float = science(0.02, "standard deviation of the embedding tables", gt=0)
    sharing: Literal["shared", "untied", "all"] = science(
        "shared",
        "embeddings of generator and discriminator are one, two, or the whole encoder is one",
    )
    vocab_size: int | None = science(None, "word table rows; filled from the data", ge=6)


class FactoryConfig(Section):
    """Encoders of the user's own instead of the built-in ones."""

    factory: str = science(
        ..., "package.module:build; build(config) -> (generator, discriminator), any torch modules"
    )
    options: dict[str, Any] = science({}, "for build, which finds it in config.model.options")
    discr_dim: int = science(
        -1, "width of the discriminator's hidden layer to put a head on; -1: it returns logits"
    )
    discr_layer: str | int = science(
        -1, "that layer, by name or by index among the discriminator's children"
    )
    vocab_size: int | None = science(None, "filled from the data", ge=6)


class ObjectiveConfig(Section):
    """Replaced token detection (ELECTRA, section 2) and the objectives it is compared with (section 3.4)."""

    kind: Literal["electra", "electra_15", "mlm", "replace_mlm", "all_tokens_mlm"] = science(
        "electra",
        "what the main encoder learns: to tell replaced tokens (_15: at the chosen places), or to predict",
    )
    generator: Literal["model", "uniform"] = science(
        "model", "replacements: a network's, or any token alike"
    )
    disallow_correct: bool = science(False, "a replacement never equals the original")
    mask_prob: float = science(0.15, "share of the real tokens that is chosen per row", gt=0, lt=1)
    masking: Literal["token", "whole_word", "span"] = science(
        "token",
        "what is drawn until so many are chosen: tokens, words, or spans of 1 to 10 words (SpanBERT)",
    )
    mask_token_prob: float = science(
        0.85, "share of the chosen places that becomes [MASK]; the rest keeps its token", ge=0, le=1
    )
    gen_weight: float = science(1.0, "weight of mlm_loss in the total", ge=0)
    disc_weight: float = science(50.0, "weight of the binary disc_loss in the total", ge=0)
    temperature: float = science(1.0, "of the softmax the generator's tokens are drawn from", gt=0)

    @model_validator(mode="after")
    def _mlm_replaces_nothing(self) -> "ObjectiveConfig":
        if self.kind == "mlm" and (self.generator != "model" or self.disallow_correct):
            raise ValueError(
                "kind mlm replaces nothing: generator and disallow_correct have no meaning with it"
            )
        return self

    @property
    def detects(self) -> bool:
        """Whether the main encoder tells replaced tokens; else it predicts tokens."""
        return self.kind in ("electra", "electra_15")

    @property
    def has_generator(self) -> bool:
        """Whether a generator network trains beside the main encoder."""
        return self.kind != "mlm" and self.generator == "model"

    @property
    def counts_all_tokens(self) -> bool:
        """Whether the main encoder's loss is over all real tokens, not the chosen places alone."""
        return self.kind in ("electra", "all_tokens_mlm")

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Factors of mlm_loss and disc_loss in the total; a main encoder that predicts tokens has 1."""
        return (
            1.0 if self.kind == "mlm" else self.gen_weight,
            self.disc_weight if self.detects else 1.0,
        )


class DataConfig(Section):
    """The rows; everything but the length is the data folder's own."""

    sequence_length: int = science(
        ..., "tokens per row; the data must have been prepared with it", ge=8
    )
    special_ids: SpecialIds | None = science(None, "filled from the data")


class TrainConfig(Section):
    """How long, how much at once, from which seed."""

    total_steps: int | None = science(
        None, "optimizer steps of the whole schedule; or give epochs", ge=1
    )
    epochs: float | None = science(
        None, "passes over the training rows, instead of total_steps", gt=0
    )
    global_batch_size: int = science(..., "rows per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = machine(..., "rows per forward and backward on one rank", ge=1)
    seed: int = science(0, "of initialisation, order, masking, sampling, dropout", ge=0, lt=2**32)
    eval_every: int = machine(0, "steps between held-out evaluations; 0: at the end only", ge=0)
    eval_rows: int = machine(
        2048, "held-out rows of each source per evaluation during training", ge=1
    )
    # Machine, although rows are left out: a run that stopped over a bad loss could not go on otherwise.
    on_bad_loss: Literal["stop", "skip"] = machine(
        "stop", "a loss that is not finite, or a spike: end the run, or leave out the step"
    )
    spike_factor: float = machine(
        0.0, "a spike is a loss above this times the mean of the last 32; 0: none is", ge=0
    )
    max_skipped_steps: int = machine(
        20, "skipped steps in a row (fp16 overflow, bad losses) that end the run", ge=1
    )
    max_restarts: int = machine(
        10, "failures in a row that gain no checkpoint before a run is refused; 0: any", ge=0
    )
    activation_checkpointing: bool = machine(
        False, "recompute each layer in backward: less memory, same numbers"
    )
    timeout_minutes: float = machine(10.0, "longest wait for another rank in any collective", gt=0)
    silence_seconds: float = machine(
        15.0, "without a word of a rank, until the others end the run", ge=1
    )
    compile: bool = machine(False, "torch.compile each layer (worth it on GPUs)")
    deterministic: bool = machine(
        False, "on GPUs, too, the same bits from the same run again; slower"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> "TrainConfig":
        if (self.total_steps is None) == (self.epochs is None):
            raise ValueError("give total_steps or epochs, exactly one (the other one null)")
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor = {self.spike_factor} calls every step a spike; expected 0 or above 1"
            )
        return self


class AdamConfig(Section):
    """Adam with decoupled weight decay and linear decay after warmup (ELECTRA, appendix A)."""

    peak_lr: float = science(..., "learning rate that warmup aims at", gt=0)
    beta1: float = science(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = science(
        0.999, "decay of the second moment", ge=0, le=0.9999
    )  # above, 1 - beta2**2**20 < 1
    eps: float = science(1e-6, "added to the root of the second moment", gt=0)
    weight_decay: float = science(0.01, "decoupled, on everything but biases and LayerNorm", ge=0)
    bias_correction: bool = science(False, "of Adam's moments; the authors' code has none")
    gradient_clipping: float = science(1.0, "limit of the global gradient norm; 0: none", ge=0)


class OptimizerConfig(AdamConfig):
    """Adam with the schedule of pretraining: linear decay times linear warmup."""

    warmup_steps: int = science(..., "steps of the linear warmup", ge=0)


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: int = machine(1000, "steps between checkpoints", ge=1)
    asynchronous: bool = machine(
        True, "train on while a checkpoint is written; it costs host memory of its size"
    )
    keep_last: int = machine(2, "newest checkpoints kept (never fewer than two)", ge=2)
    keep_every: int = machine(
        0, "keep each step that is a multiple of this for good; 0: none", ge=0
    )
    keep_steps: list[int] = machine([], "steps kept for good")


class LoggingConfig(Section):
    """What is written while running."""

    every: int = machine(100, "steps between log lines", ge=1)
    tensorboard: bool = machine(True, "write OUT/tensorboard")


class RunConfig(Section):
    """A run: science and machine. `engine` names a DeepSpeed file (name, path) or holds it."""

    model: ModelConfig
    generator: GeneratorConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    engine: str | dict[str, Any] = machine(
        "zero1", "DeepSpeed file: a name in ds_configs/engine, a path, or an object"
    )
    provenance: Any = machine(None, "what wrote a resolved config; ignored as input")

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        length, most = self.data.sequence_length, self.model.max_positions
        if length > most:
            raise ValueError(f"data.sequence_length {length} exceeds max_positions {most}")
        sizes = EncoderConfig.model_fields
        if self.model.sharing == "all" and any(
            getattr(self.model, f) != getattr(self.generator, f) for f in sizes
        ):
            raise ValueError(
                "model.sharing = 'all' is one encoder: every field of generator must equal that of model"
            )
        return self

    def accumulation(self, world_size: int) -> int:
        """`accumulation` of this run."""
        return accumulation(self.train, world_size)

    def total_steps(self, rows: int | None) -> int:
        """Steps of the schedule; `rows` of the training split are needed when the length is given in epochs."""
        if self.train.total_steps is not None:
            return self.train.total_steps
        if rows is None:
            raise UserError("train.epochs needs the data to know the number of steps: give --data")
        return max(1, round(self.train.epochs * rows / self.train.global_batch_size))

    def with_data(
        self, vocab_size: int, special_ids: SpecialIds, sequence_length: int
    ) -> "RunConfig":
        """The config with what the data decides filled in. UserError when a value is there and differs."""
        if sequence_length != self.data.sequence_length:
            raise UserError(
                f"data.sequence_length = {self.data.sequence_length}, but the data has rows of {sequence_length}: "
                f"prepare with --sequence-length {self.data.sequence_length}, or --set "
                f"data.sequence_length={sequence_length}"
            )
        for key, mine, theirs in (
            ("model.vocab_size", self.model.vocab_size, vocab_size),
            ("data.special_ids", self.data.special_ids, special_ids),
        ):
            if mine is not None and mine != theirs:
                raise UserError(
                    f"{key} = {mine}, but the data has {theirs}: leave it out, or use the data of that tokenizer"
                )
        model = self.model.model_copy(update={"vocab_size": vocab_size})
        data = self.data.model_copy(update={"special_ids": special_ids})
        return self.model_copy(update={"model": model, "data": data})


class FactoryRun(RunConfig):
    """A run with encoders of the user's own."""

    model: FactoryConfig
    generator: None = science(None, "the factory makes it")

    @model_validator(mode="after")
    def _sections_agree(self) -> "FactoryRun":
        if not self.objective.detects:
            raise ValueError(
                f"objective.kind {self.objective.kind} needs the built-in model; a factory's discriminator tells "
                "replaced tokens: electra or electra_15"
            )
        if self.train.compile or self.train.activation_checkpointing:
            raise ValueError(
                "train.compile and train.activation_checkpointing are for the built-in layers: leave them"
            )
        return self


def accumulation(train: Any, world_size: int) -> int:
    """Micro-batches per step and rank of a section with global_batch_size and micro_batch_size.

    UserError when the global batch cannot be split so.
    """
    per_micro = world_size * train.micro_batch_size
    if train.global_batch_size % per_micro == 0:
        return train.global_batch_size // per_micro
    if train.global_batch_size % world_size:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size} rows cannot be split over {world_size} ranks; "
            "choose a number of ranks that divides it"
        )
    share = train.global_batch_size // world_size
    fits = max(m for m in range(1, min(share, train.micro_batch_size) + 1) if share % m == 0)
    raise UserError(
        f"train.global_batch_size = {train.global_batch_size} rows cannot be split over {world_size} ranks x "
        f"micro_batch_size {train.micro_batch_size}; the largest micro_batch_size that fits is {fits} "
        f"(--set train.micro_batch_size={fits})"
    )


# ---------------------------------------------------------------------------------------------------------- loading


def config_folder(kind: str) -> Path:
    """The folder of shipped files, `pretrain`, `engine` or `glue`: beside the package, or inside an installed one."""
    package = Path(__file__).resolve().parent
    inside = package / "ds_configs" / kind
    return inside if inside.is_dir() else package.parent / "ds_configs" / kind


def find_config(name: str, kind: str) -> Path:
    """The file of a shipped name, or the path itself. UserError lists the names and the nearest one."""
    if name.endswith(".json") or "/" in name:
        return Path(name)
    folder = config_folder(kind)
    names = sorted(path.stem for path in folder.glob("*.json"))
    if name in names:
        return folder / f"{name}.json"
    raise UserError(
        f"no {kind} config named {name!r}{nearest(name, names)}; there are {', '.join(names)}; or give a path (x.json)"
    )


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no word is near."""
    found = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def load_run(name: str, sets: list[str] = (), engine: str | None = None) -> RunConfig:
    """`load_config` of a RUN.json."""
    return load_config(name, "pretrain", RunConfig, sets, engine)


def load_config(
    name: str, kind: str, root: type[Config], sets: list[str] = (), engine: str | None = None
) -> Config:
    """Read a config file (shipped name of that kind, or path), apply `section.field=value` settings, check everything.

    Raises UserError naming the file, the key, what was found and what was expected.
    """
    path = find_config(name, kind)
    values = read_json(path, f"a {kind} config")
    for setting in sets:
        _apply(values, setting)
    if engine is not None:
        values["engine"] = engine
    return parse_config(values, str(path), root)


def parse_run(values: dict, where: str) -> RunConfig:
    """`parse_config` of a run."""
    return parse_config(values, where, RunConfig)


def parse_config(values: dict, where: str, root: type[Config]) -> Config:
    """Check a config object; `where` is named in the error. A run whose model has a factory becomes a FactoryRun."""
    model = values.get("model")
    root = (
        FactoryRun if root is RunConfig and isinstance(model, dict) and "factory" in model else root
    )
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise UserError(_readable(error, where, root)) from None


def _apply(values: dict, setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {setting!r}: expected section.field=value, such as train.seed=1")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {setting!r}: {part} is a value, not a section")
    values[parts[-1]] = value


def _readable(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key, found = ".".join(location), problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            lines.append(
                f"{key}: unknown key{nearest(location[-1], known)}; known here: {', '.join(known)}"
            )
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing; it has no default")
        elif problem["type"] == "value_error":
            lines.append(
                f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
            )
        else:
            hint = _fraction_hint(root, location, found)
            lines.append(
                f"{key} = {json.dumps(found, default=str)}: {problem['msg'].lower()}{hint}"
            )
    return f"{where}: " + "\n  ".join(lines)


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part not in root.model_fields:  # a name in a table of sections
            continue
        kind = root.model_fields[part].annotation
        root = next(
            k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)
        )
    return sorted(root.model_fields)


def _fraction_hint(root: type[BaseModel], location: list[str], found: Any) -> str:
    if location[:1] == ["generator"] and isinstance(found, (str, float)):
        return (
            f"; the generator has sizes of its own: write the integer, such as {location[-1]}: 64"
        )
    return ""


# ------------------------------------------------------------------------------------------------------ engine files

# What a DeepSpeed file may hold. DeepSpeed ignores an unknown top-level key silently, so a misspelled one stops here.
ENGINE_KEYS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
    "aio",
    "data_types",
    "disable_allgather",
    "timers",
    "steps_per_print",
}
PRECISIONS = ("fp16", "bf16", "torch_autocast")
# Numbers the run owns: the same key in both files would have two owners.
ENGINE_OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "derived from train.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "section optimizer",
    "scheduler": "section optimizer",
    "activation_checkpointing": "train.activation_checkpointing",
}


def load_engine(engine: str | dict) -> dict:
    """The DeepSpeed config of a name, path or object, checked, not yet merged with what the run owns.

    Raises UserError for unknown keys, keys the run owns, and blocks that DeepSpeed 0.19 removed.
    """
    if isinstance(engine, str):
        path = find_config(engine, "engine")
        where, values = str(path), read_json(path, "a DeepSpeed config")
    else:
        where, values = "engine", engine
    for key in values:
        if key in ENGINE_OWNERS:
            raise UserError(
                f"{where}: {key} belongs to the run config ({ENGINE_OWNERS[key]}): remove it here"
            )
        if key not in ENGINE_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, sorted(ENGINE_KEYS))}")
    for key in ("zero_optimization", *PRECISIONS):
        if not isinstance(values.get(key, {}), dict):
            raise UserError(f"{where}: {key} = {values[key]!r}; expected a JSON object")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage = {stage!r}; expected 0, 1, 2 or 3")
    if values.get("torch_autocast", {}).get("dtype", "bfloat16") not in (
        "bfloat16",
        "torch.bfloat16",
    ):
        raise UserError(
            f'{where}: torch_autocast.dtype must be "bfloat16"; for fp16 use the fp16 block'
        )
    for block, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if values.get(block, {}).get(key) is False:
            raise UserError(
                f"{where}: {block}.{key} must stay true, or weights are reached by what is not finite"
            )
    switches = {kind: values.get(kind, {}).get("enabled", False) for kind in PRECISIONS}
    for kind, enabled in switches.items():
        if not (isinstance(enabled, bool) or (enabled == "auto" and kind != "torch_autocast")):
            raise UserError(
                f'{where}: {kind}.enabled = {enabled!r}; expected true, false or (bf16, fp16) "auto"'
            )
    chosen = [kind for kind, enabled in switches.items() if enabled]
    if len(chosen) > 1 and any(
        enabled is True for enabled in switches.values()
    ):  # two "auto" are one choice
        raise UserError(f"{where}: {' and '.join(chosen)} are both enabled; choose one precision")
    return values


def load_function(setting: str, name: str) -> Callable:
    """The function of "package.module:function", looked for as Python does and in the current folder. Runs its code."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{setting} = {name!r}: {error}; expected package.module:function, found from the current folder or by "
            "PYTHONPATH"
        ) from error


def differences(old: RunConfig, new: RunConfig) -> tuple[list[str], list[str]]:
    """(science, machine) fields that differ, as `section.field: old -> new`."""
    found: dict[str, list[str]] = {"science": [], "machine": []}

    def compare(a: BaseModel, b: BaseModel, prefix: str) -> None:
        for name, info in type(a).model_fields.items():
            x, y = getattr(a, name), getattr(b, name)
            names = x | y if isinstance(x, dict) and isinstance(y, dict) else {}
            if isinstance(x, Section) and type(x) is type(y):
                compare(x, y, f"{prefix}{name}.")
            elif any(isinstance(section, Section) for section in names.values()):
                for key, section in names.items():  # one that is not named has the defaults
                    compare(
                        x.get(key, type(section)()),
                        y.get(key, type(section)()),
                        f"{prefix}{name}.{key}.",
                    )
            elif x != y and name != "provenance":
                x, y = (
                    value.model_dump() if isinstance(value, Section) else value for value in (x, y)
                )
                found[(info.json_schema_extra or {}).get("scope", "science")].append(
                    f"{prefix}{name}: {x} -> {y}"
                )

    compare(old, new, "")
    return found["science"], found["machine"]
