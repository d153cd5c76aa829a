"""Schema of run configs: every field with its meaning, unit, limits and scope.

Scope `science`: the field changes what the model learns. A resume with another value is refused.
Scope `machine`: all other fields. A resume with another value is allowed and reported.
"""

import math
from typing import Any, Literal, NamedTuple

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from electra_ds.common.errors import UserError
from electra_ds.common.section import Section, machine, science
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    MAX_ROWS,
    MAX_WIDTH,
    DebertaV2GeneratorConfig,
    DebertaV2ModelConfig,
    ElectraGeneratorConfig,
    ElectraModelConfig,
    EncoderConfig,
    ModelConfig,
    ModernBertGeneratorConfig,
    ModernBertModelConfig,
)
from electra_ds.config.batch_sizes import BatchSizes, accumulations, check_schedule
from electra_ds.config.phases import MAX_PHASES, THETAS, PhaseConfig, check_names

MAX_STEPS = 10**9
MAX_SIZES = 1000  # of the global batch
MAX_SECONDS = 10**7  # 116 days


class FactoryConfig(Section):
    """User-defined encoders instead of the built-in ones."""

    factory: str = science(
        ...,
        "package.module:build; build(config) returns (generator, discriminator), any torch modules",
    )
    options: dict[str, Any] = science({}, "passed to build as config.model.options")
    discr_dim: int = science(
        -1, "width of the discriminator's layer before a linear head; -1: it returns logits itself"
    )
    discr_layer: str | int = science(
        -1, "name of the layer for discr_dim, or its index among the discriminator's children"
    )
    vocab_size: int | None = science(None, "filled from the data", ge=6, le=MAX_ROWS)


class ObjectiveConfig(Section):
    """Replaced token detection (ELECTRA, section 2), and other objectives (section 3.4)."""

    kind: Literal["electra", "electra_15", "mlm", "replace_mlm", "all_tokens_mlm"] = science(
        "electra",
        "task of the main encoder: detect replaced tokens (electra; electra_15: at masked "
        "positions only), or predict tokens",
    )
    generator: Literal["model", "frozen", "uniform"] = science(
        "model",
        "replacement tokens: sampled from the generator, which trains as well (model) or not "
        "(frozen), or uniformly from the vocabulary",
    )
    disallow_correct: bool = science(False, "a replacement never equals the original")
    mask_prob: float = science(0.15, "share of the real tokens of a row that is masked", gt=0, lt=1)
    masking: Literal["token", "whole_word", "span"] = science(
        "token",
        "unit that is masked: tokens, words, or spans of 1 to 10 words (SpanBERT)",
    )
    mask_token_prob: float = science(
        0.85,
        "share of the masked positions that becomes [MASK]; the others keep their token",
        ge=0,
        le=1,
    )
    gen_weight: float = science(1.0, "weight of mlm_loss in the total", ge=0, le=1e6)
    disc_weight: float = science(50.0, "weight of the binary disc_loss in the total", ge=0, le=1e6)
    temperature: float = science(
        1.0,
        "temperature of the softmax from which the generator's tokens are sampled",
        ge=1e-3,
        le=1e3,
    )
    temperature_decay: float | None = science(
        None,
        "share of the run in which temperature - 1 falls to 1/e (37 %); null: constant",
        gt=0,
        le=1e3,
    )

    @model_validator(mode="after")
    def _mlm_replaces_nothing(self) -> "ObjectiveConfig":
        if self.kind == "mlm" and (self.generator != "model" or self.disallow_correct):
            raise ValueError(
                "kind mlm replaces nothing: expected generator = model and disallow_correct = false"
            )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "ObjectiveConfig":
        if self.temperature_decay is not None:
            if not self.has_generator:
                raise ValueError(
                    f"temperature_decay = {self.temperature_decay}, but no tokens are sampled from "
                    f"a generator (kind = {self.kind}, generator = {self.generator}): leave it out"
                )
            if self.temperature == 1:
                raise ValueError(
                    f"temperature_decay = {self.temperature_decay} has no effect, because "
                    "temperature = 1 is its limit: set a temperature such as 2, or leave it out"
                )
        if self.is_frozen and self.gen_weight != 1:
            raise ValueError(
                f"gen_weight = {self.gen_weight} has no effect, because the generator is frozen: "
                "leave it out"
            )
        return self

    @property
    def detects(self) -> bool:
        """Whether the main encoder detects replaced tokens; otherwise it predicts tokens."""
        return self.kind in ("electra", "electra_15")

    @property
    def has_generator(self) -> bool:
        """Whether there is a generator network beside the main encoder."""
        return self.kind != "mlm" and self.generator in ("model", "frozen")

    @property
    def is_frozen(self) -> bool:
        """Whether the generator network does not train."""
        return self.has_generator and self.generator == "frozen"

    @property
    def counts_all_tokens(self) -> bool:
        """Whether the main loss is over all real tokens; otherwise over the masked positions."""
        return self.kind in ("electra", "all_tokens_mlm")

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Factors of mlm_loss and disc_loss in the total.

        1 for a main encoder that predicts tokens, 0 for a frozen generator.
        """
        gen_weight = 0.0 if self.is_frozen else self.gen_weight
        return (
            1.0 if self.kind == "mlm" else gen_weight,
            self.disc_weight if self.detects else 1.0,
        )

    def temperature_at(self, progress: float) -> float:
        """Return the temperature of sampling (Fast-ELECTRA, Dong et al. 2023, section 3.2).

        It is 1 + (T - 1) exp(-u / tau) with T = temperature and tau = temperature_decay.
        progress: u, the share of the run that is done, 0 to 1; math.inf gives the limit 1.
        """
        if self.temperature_decay is None:
            return self.temperature
        return 1 + (self.temperature - 1) * math.exp(-progress / self.temperature_decay)


class DataConfig(Section):
    """Format of the rows. Other properties of the data are read from the data folder."""

    sequence_length: int = science(
        ..., "tokens per row; the data must be prepared with the same length", ge=8, le=MAX_WIDTH
    )
    special_ids: SpecialIds | None = science(None, "filled from the data")


class TrainConfig(Section):
    """Length, batch sizes, seed, evaluation, faults, memory."""

    total_steps: int | None = science(
        None,
        "optimizer steps of the whole schedule; or give epochs, or phases",
        ge=1,
        le=MAX_STEPS,
    )
    epochs: float | None = science(
        None, "passes over the training rows, instead of total_steps", gt=0, le=1e6
    )
    global_batch_size: int = science(
        ..., "rows per optimizer step, over all ranks", ge=1, le=MAX_ROWS
    )
    batch_schedule: list[list[int]] = science(
        [],
        "[[step, rows], ...]: rows of the global batch after so many steps, skipped ones included; "
        "the first steps have global_batch_size rows",
        max_length=MAX_SIZES,
    )
    micro_batch_size: int = machine(
        ..., "rows per forward and backward on one rank", ge=1, le=MAX_ROWS
    )
    seed: int = science(
        0, "seed of initialization, data order, masking, sampling and dropout", ge=0, lt=2**32
    )
    eval_every: int = machine(
        0, "steps between held-out evaluations; 0: at the end only", ge=0, le=MAX_STEPS
    )
    eval_rows: int = machine(
        2048, "held-out rows of each source per evaluation during training", ge=1, le=10**12
    )
    # Machine scope, although it changes which rows are used: otherwise a run that stopped at a bad
    # loss could not resume with "skip".
    on_bad_loss: Literal["stop", "skip"] = machine(
        "stop", "after a loss that is not finite, or a spike: end the run, or skip the step"
    )
    spike_factor: float = machine(
        0.0,
        "treat a loss above this multiple of the mean of the last 32 as a spike; 0 disables",
        ge=0,
        le=1e9,
    )
    on_collapse: Literal["say", "stop"] = machine(
        "say", "when the verdict becomes `collapsed`: print what helps, or end the run as well"
    )
    max_skipped_steps: int = machine(
        20, "skipped steps in a row (fp16 overflow, bad losses) that do not end the run", ge=1
    )
    max_restarts: int = machine(
        10,
        "failures in a row without a new checkpoint that do not end the run; 0: no limit",
        ge=0,
    )
    activation_checkpointing: bool = machine(
        False, "recompute each layer in backward: less memory, the same numbers"
    )
    timeout_minutes: float = machine(
        10.0, "longest wait for another rank in any collective", gt=0, le=MAX_SECONDS / 60
    )
    silence_seconds: float = machine(
        15.0,
        "seconds without a heartbeat from a rank before the run is stopped",
        ge=1,
        le=MAX_SECONDS,
    )
    compile: bool = machine(False, "torch.compile each layer (worth it on GPUs)")
    deterministic: bool = machine(
        False, "a repeated run gives the same bits on GPUs as well; slower"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> "TrainConfig":
        check_schedule(self.batch_schedule, MAX_STEPS, MAX_ROWS)
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor = {self.spike_factor} makes average losses spikes; "
                "expected 0 or a value above 1"
            )
        return self


class AdamConfig(Section):
    """Adam with decoupled weight decay (ELECTRA, appendix A)."""

    peak_lr: float = science(..., "learning rate at the end of warmup, before decay", gt=0, le=1e38)
    beta1: float = science(0.9, "decay of the first moment", ge=0, lt=1)
    # The limit: above it 1 - beta2**(2**20) is below 1 in fp32 (NO_BIAS_CORRECTION_STEP).
    beta2: float = science(0.999, "decay of the second moment", ge=0, le=0.9999)
    eps: float = science(1e-6, "added to the root of the second moment", gt=0, le=1)
    weight_decay: float = science(
        0.01, "decoupled weight decay of everything but biases and LayerNorm", ge=0, le=100
    )
    bias_correction: bool = science(
        False, "correct the bias of Adam's moments; the authors' code does not"
    )
    gradient_clipping: float = science(
        1.0, "largest global gradient norm; 0 disables", ge=0, le=1e9
    )


class MuonOptions(NamedTuple):
    """The fields muon_* of `OptimizerConfig`."""

    momentum: float
    ns_steps: int
    adjust: str
    lr_scale: float


class OptimizerConfig(AdamConfig):
    """The optimizer of pretraining, and its schedule (the formulas are in training/schedule.py).

    The formulas of the kinds are in training/optimizer.py, training/muon.py and
    training/per_tensor.py. beta1, beta2, eps and bias_correction apply to every kind; with muon, to
    the parameters that Adam updates.
    """

    kind: Literal["adam", "muon", "stable_adamw", "lamb"] = science(
        "adam",
        "optimizer; muon: orthogonalized momentum for the matrices in the encoder layers, Adam for "
        "the rest; stable_adamw: Adam with update clipping; lamb: Adam with a trust ratio",
    )
    muon_momentum: float | None = science(
        None, "momentum of muon; null: 0.95, or none for another kind", ge=0, lt=1
    )
    muon_ns_steps: int | None = science(
        None, "Newton-Schulz steps of muon; null: 5, or none for another kind", ge=1, le=20
    )
    muon_adjust: Literal["rms", "spectral"] | None = science(
        None,
        "factor of an update [n, m] of muon: 0.2 sqrt(max(n, m)) (rms: as large as Adam's) or "
        "sqrt(max(1, n / m)) (spectral); null: rms, or none for another kind",
    )
    muon_lr_scale: float | None = science(
        None,
        "rate of muon, as a multiple of that of Adam; null: 1, or none for another kind",
        gt=0,
        le=1e6,
    )
    warmup_steps: int = science(..., "steps of the linear warmup", ge=0, le=MAX_STEPS)
    schedule: Literal["linear", "cosine", "constant", "wsd", "inverse_sqrt"] = science(
        "linear",
        "learning rate after the warmup; linear: a decay over the whole run times the warmup; wsd: "
        "stable until the last decay_steps",
    )
    final_lr_ratio: float = science(
        0.0,
        "share of peak_lr that linear, cosine and wsd reach at the end of the run",
        ge=0,
        le=1,
    )
    decay_steps: int | None = science(
        None, "last steps of the run, in which wsd decays; null for the others", ge=1, le=MAX_STEPS
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = science(
        None, "shape of the decay of wsd; null: linear"
    )

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> "OptimizerConfig":
        for name in ("muon_momentum", "muon_ns_steps", "muon_adjust", "muon_lr_scale"):
            value = getattr(self, name)
            if self.kind != "muon" and value is not None:
                raise ValueError(
                    f"{name} = {value}, but kind = {self.kind} has no such option: set "
                    f"optimizer.kind = muon, or leave {name} out"
                )
        return self

    @property
    def muon(self) -> "MuonOptions":
        """The options of muon, with the defaults filled in."""
        return MuonOptions(
            momentum=0.95 if self.muon_momentum is None else self.muon_momentum,
            ns_steps=self.muon_ns_steps or 5,
            adjust=self.muon_adjust or "rms",
            lr_scale=self.muon_lr_scale or 1.0,
        )

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> "OptimizerConfig":
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ValueError(
                "schedule = wsd needs decay_steps, the number of steps of the decay at the end of "
                "the run: set optimizer.decay_steps"
            )
        for name in ("decay_steps", "decay_shape"):
            value = getattr(self, name)
            if self.schedule != "wsd" and value is not None:
                raise ValueError(
                    f"{name} = {value}, but schedule = {self.schedule}; only wsd has a decay at "
                    f"the end of the run: set optimizer.schedule = wsd, or leave {name} out"
                )
        if self.schedule in ("constant", "inverse_sqrt") and self.final_lr_ratio:
            raise ValueError(
                f"final_lr_ratio = {self.final_lr_ratio}, but schedule = {self.schedule} does not "
                "depend on the length of the run: leave final_lr_ratio out, or use linear, cosine "
                "or wsd"
            )
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "schedule = inverse_sqrt, but warmup_steps = 0; the rate is peak_lr x "
                "sqrt(warmup_steps / step): expected warmup_steps of at least 1"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved and which are kept."""

    every: int = machine(1000, "steps between checkpoints", ge=1, le=MAX_STEPS)
    asynchronous: bool = machine(
        True, "continue training while a checkpoint is written; needs host memory of its size"
    )
    keep_last: int = machine(
        2, "newest checkpoints kept (never fewer than two)", ge=2, le=MAX_STEPS
    )
    keep_every: int = machine(
        0, "never remove checkpoints at multiples of this step; 0: none", ge=0
    )
    keep_steps: list[int] = machine([], "steps of checkpoints that are never removed")


class LoggingConfig(Section):
    """Log lines and TensorBoard."""

    every: int = machine(100, "steps between log lines", ge=1, le=MAX_STEPS)
    tensorboard: bool = machine(True, "write OUT/tensorboard")


class VerdictConfig(Section):
    """Limits of the word about learning: warming up, on the plateau, learning, collapsed."""

    window: int = machine(10, "log lines over which the metrics are averaged", ge=1, le=10**6)
    learning_gain: float = machine(
        0.06,
        "learning: disc_gain is at least this share of the entropy of the base rate",
        gt=0,
        lt=1,
    )
    # Discriminators on the plateau reach .50 to .58 ([CLS] and [SEP] are never replaced), those that
    # learn .65 and more: docs/results.md.
    learning_auc: float = machine(
        0.6, "learning, in an evaluation: fixed_auc is also at least this; 0: not used", ge=0, le=1
    )
    collapsed_rms: float = machine(
        0.01, "collapsed: hidden_rms, the spread of the hidden states, is below this", ge=0, le=1e3
    )
    collapsed_std: float = machine(
        0.05, "collapsed: logit_std, the spread of the logits, is below this", ge=0, le=1e3
    )


class RunConfig(Section):
    """Config of a pretraining run (RUN.json), of any architecture.

    A file is read as the subclass of its architecture.

    engine: name or path of a DeepSpeed file, or its content as an object.
    """

    model: ModelConfig
    generator: EncoderConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    verdict: VerdictConfig = VerdictConfig()
    phases: list[PhaseConfig] = science(
        [],
        "parts of the run with their own length, data and values; [] for one part",
        max_length=MAX_PHASES,
    )
    engine: str | dict[str, Any] = machine(
        "zero1", "DeepSpeed file: a name in ds_configs/engine, a path, or an object"
    )
    provenance: Any = machine(
        None, "versions, commit, host and data of the run that wrote the file; ignored as input"
    )

    @model_validator(mode="after")
    def _length_is_given(self) -> "RunConfig":
        total_steps, epochs = self.train.total_steps, self.train.epochs
        check_names(self.phases)
        for phase in self.phases:
            theta = next((key for key in phase.set if key in THETAS), None)
            if theta and self.objective.is_frozen:
                raise ValueError(
                    f"phase {phase.name}: {theta}, but objective.generator = frozen: a generator "
                    f"that does not train needs the bases that it was trained with; leave {theta} "
                    "out, or set objective.generator = model"
                )
        if self.phases and (total_steps, epochs) != (None, None):
            raise ValueError(
                f"train.total_steps = {total_steps}, train.epochs = {epochs}, but the run has "
                "phases, and the sum of their steps is its length: set both to null"
            )
        if self.phases and self.train.batch_schedule:
            raise ValueError(
                f"train.batch_schedule = {self.train.batch_schedule}, but the run has phases, and "
                "each phase has one batch size: leave it out, and give each size a phase that sets "
                "train.global_batch_size"
            )
        if not self.phases and (total_steps is None) == (epochs is None):
            raise ValueError(
                f"train: total_steps = {total_steps}, epochs = {epochs}: give total_steps or "
                "epochs, exactly one, and set the other to null"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_no_phases(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as a dict; a run without phases is written as by versions without phases."""
        values = serialize(self)
        if not self.phases:
            values.pop("phases", None)
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        length, most = self.data.sequence_length, self.model.max_positions
        if length > most:
            raise ValueError(
                f"data.sequence_length {length} exceeds max_positions {most}: raise "
                "model.max_positions, or use shorter rows"
            )
        if self.model.sharing == "gdes":
            self._check_gdes()
        if self.objective.is_frozen and self.model.sharing != "untied":
            raise ValueError(
                f"model.sharing = {self.model.sharing}, but objective.generator = frozen: a "
                "generator that does not train shares nothing with the discriminator: set "
                "model.sharing = untied"
            )
        if self.objective.has_generator:
            self.model.check_generator(self.generator)
        return self

    def _check_gdes(self) -> None:
        """Raise ValueError for an objective in which `gdes` has no meaning."""
        objective = self.objective
        if not (objective.detects and objective.has_generator):
            reason = (
                f"objective.kind = {objective.kind} trains no discriminator"
                if not objective.detects
                else f"objective.generator = {objective.generator} has no embeddings"
            )
            raise ValueError(
                f"model.sharing = gdes, but {reason}; expected a discriminator that shares the "
                "embeddings of a generator: set model.sharing = shared, or objective.kind = electra "
                "and objective.generator = model"
            )

    @property
    def batch_sizes(self) -> BatchSizes:
        """The rows of the global batch of each attempt."""
        return BatchSizes(self.train.global_batch_size, self.train.batch_schedule)

    def accumulation(self, world_size: int) -> int:
        """Return the micro-batches per step and rank, those of the largest global batch.

        Raises UserError when a global batch is not divisible by world_size * micro_batch_size.
        """
        return max(accumulations(self.batch_sizes, self.train.micro_batch_size, world_size))

    def total_steps(self, rows: int | None) -> int:
        """Return the number of optimizer steps of the schedule.

        rows: rows of the training split, needed with train.epochs; not used with phases.
        Raises UserError when train.epochs is set and `rows` is None, and for phases with epochs:
        their steps are known with their data only (`run_plan`).
        """
        if self.phases:
            given = [phase.steps for phase in self.phases if phase.steps is not None]
            if len(given) < len(self.phases):
                raise UserError(
                    "phases with epochs need the data, because their steps depend on its rows: "
                    "give --data"
                )
            return sum(given)
        if self.train.total_steps is not None:
            return self.train.total_steps
        if rows is None:
            raise UserError(
                "train.epochs needs the data, because the number of steps depends on its rows: "
                "give --data"
            )
        assert self.train.epochs is not None  # one of both is given
        steps = self.batch_sizes.nearest_attempt(self.train.epochs * rows)
        if steps > MAX_STEPS:
            raise UserError(
                f"train.epochs = {self.train.epochs} over {rows:,} rows is {steps:,} steps; "
                f"expected at most {MAX_STEPS:,}"
            )
        return steps

    def with_data(
        self, vocab_size: int, special_ids: SpecialIds, sequence_length: int, segments: int = 1
    ) -> "RunConfig":
        """Return the config with vocab_size and special_ids of the data.

        segments: number of token types in a row: 2 for data packed as google, else 1.
        Raises UserError when the config has other values, another sequence_length, or fewer token
        types than `segments`.
        """
        self._check_segments(segments)
        if sequence_length != self.data.sequence_length:
            raise UserError(
                f"data.sequence_length = {self.data.sequence_length}, but the data has rows of "
                f"{sequence_length}: prepare with --sequence-length {self.data.sequence_length}, "
                f"or --set data.sequence_length={sequence_length}"
            )
        for key, value, value_of_data in (
            ("model.vocab_size", self.model.vocab_size, vocab_size),
            ("data.special_ids", self.data.special_ids, special_ids),
        ):
            if value is not None and value != value_of_data:
                raise UserError(
                    f"{key} = {value}, but the data has {value_of_data}: remove {key} from the "
                    "config, or use data that the same tokenizer made"
                )
        model = self.model.model_copy(update={"vocab_size": vocab_size})
        data = self.data.model_copy(update={"special_ids": special_ids})
        return self.model_copy(update={"model": model, "data": data})

    def _check_segments(self, segments: int) -> None:
        """Raise UserError when the model has fewer token types than the rows of the data."""
        own = self.model.segments
        if own is None and segments > 1:
            raise UserError(
                f"model.architecture = {self.model.architecture} has no token types, but the rows "
                f"of the data have {segments} segments (--packing google): prepare the data with "
                "another --packing, such as best_fit"
            )
        if own is not None and own < segments:
            raise UserError(
                f"model.type_vocab_size = {own}, but the rows of the data have {segments} segments "
                f"(--packing google): --set model.type_vocab_size={segments}, or prepare with "
                "another --packing"
            )


class ElectraRun(RunConfig):
    """Config of a run with the architecture `electra`."""

    model: ElectraModelConfig
    generator: ElectraGeneratorConfig


class ModernBertRun(RunConfig):
    """Config of a run with the architecture `modernbert`."""

    model: ModernBertModelConfig
    generator: ModernBertGeneratorConfig


class DebertaV2Run(RunConfig):
    """Config of a run with the architecture `deberta_v2`."""

    model: DebertaV2ModelConfig
    generator: DebertaV2GeneratorConfig


class FactoryRun(RunConfig):
    """Config of a run with user-defined encoders (model.factory)."""

    model: FactoryConfig  # type: ignore[assignment]
    generator: None = science(  # type: ignore[assignment]
        None, "made by the factory"
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> "FactoryRun":
        if not self.objective.detects:
            raise ValueError(
                f"objective.kind {self.objective.kind} needs the built-in model; a factory's "
                "discriminator detects replaced tokens: electra or electra_15"
            )
        if self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer.kind = muon works with the built-in encoders only, because it needs to "
                "know their layers: use adam, stable_adamw or lamb"
            )
        if self.objective.is_frozen:
            raise ValueError(
                "objective.generator = frozen works with the built-in encoders only: set it to "
                "model or uniform"
            )
        if self.train.compile or self.train.activation_checkpointing:
            raise ValueError(
                "train.compile and train.activation_checkpointing work with the built-in layers "
                "only: set them to false"
            )
        return self

    def _check_segments(self, segments: int) -> None:
        """Accept any number of segments."""


# model.architecture -> the schema of a run with built-in encoders.
RUNS: dict[str, type[RunConfig]] = {
    "electra": ElectraRun,
    "modernbert": ModernBertRun,
    "deberta_v2": DebertaV2Run,
}


def accumulation(train: Any, world_size: int) -> int:
    """Return the number of micro-batches per optimizer step and rank.

    train: a section with global_batch_size and micro_batch_size.
    Raises UserError when global_batch_size is not divisible by world_size * micro_batch_size.
    """
    sizes = BatchSizes(train.global_batch_size)
    return accumulations(sizes, train.micro_batch_size, world_size)[0]
