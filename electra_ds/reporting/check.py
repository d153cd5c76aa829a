"""Check of a run before it starts: derived numbers, parameters, values, and errors in the config.

The memory table is in `memory`.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from electra_ds.common.printable import printable
from electra_ds.common.section import Section
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import OptimizerConfig, RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import VOCAB_SIZE, ParameterCount, meta_model, parameter_count
from electra_ds.model.encoder import hidden_matrices
from electra_ds.training.muon import newton_schulz_flops
from electra_ds.training.run_plan import check_optimizer, check_schedule, plan, plan_warnings
from electra_ds.training.schedule import learning_rate


class Line(NamedTuple):
    """One value with its meaning; scope is science, machine or derived."""

    key: str
    value: str
    scope: str
    meaning: str


class Report(NamedTuple):
    """What `check` returns.

    derived: numbers that follow from the config, the ranks and the data.
    changed: the values that differ from the baseline.
    fields: every value of the config.
    config: the config, with the values that the data determines filled in.
    total_steps: optimizer steps of the run; None with train.epochs and no data.
    warnings: lines that `pretrain` prints as well.
    """

    derived: list[Line]
    changed: list[Line]
    fields: list[Line]
    config: RunConfig
    total_steps: int | None
    warnings: list[str]


def check(
    config: RunConfig,
    world_size: int,
    data: Data | None = None,
    baseline: RunConfig | None = None,
) -> Report:
    """Report on a run of `world_size` ranks.

    data: for epochs, the vocabulary and the shares of a mixture.
    baseline: the preset with which values are compared; None: the defaults of the schema.
    Raises UserError for an engine that cannot be loaded, for data that does not fit the model, for
    a global batch that cannot be split over the ranks, for a decay that is longer than the run, and
    for an optimizer that does not work with the engine.
    """
    check_optimizer(config.optimizer, load_engine(config.engine))
    total_steps = config.train.total_steps
    if data is not None:
        planned = plan(config, data, world_size)
        config = planned.config.model_copy(update={"engine": config.engine})
        total_steps = planned.total_steps
    elif total_steps is not None:
        check_schedule(config.optimizer, total_steps)
    notes = [] if total_steps is None else plan_warnings(config, total_steps)
    derived = [
        *_step_lines(config, world_size),
        *_length_lines(config, data),
        *_rate_lines(config.optimizer, total_steps),
        *_parameter_lines(config, parameter_count(config)),
        *_muon_lines(config),
    ]
    fields = list(_fields(config))
    known = {line.key: line.value for line in _fields(baseline)} if baseline else _defaults(config)
    changed = [line for line in fields if known.get(line.key) != line.value]
    return Report(derived, changed, fields, config, total_steps, notes)


def _fields(section: BaseModel, prefix: str = "") -> Iterator[Line]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _fields(value, f"{prefix}{name}.")
        elif info.description and isinstance(info.json_schema_extra, dict):
            scope = str(info.json_schema_extra["scope"])
            yield Line(f"{prefix}{name}", printable(str(value)), scope, _meaning(info))


def _meaning(info: FieldInfo) -> str:
    """The description of a field, with the choices of a Literal."""
    if get_origin(info.annotation) is Literal:
        return f"{info.description} ({', '.join(map(str, get_args(info.annotation)))})"
    return str(info.description)


def _defaults(section: BaseModel, prefix: str = "") -> dict[str, str]:
    """Key -> default value, as text; fields without a default are not in it."""
    defaults: dict[str, str] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            defaults |= _defaults(value, f"{prefix}{name}.")
        elif not info.is_required():
            defaults[f"{prefix}{name}"] = str(info.get_default(call_default_factory=True))
    return defaults


def _derived(key: str, value: Any, meaning: str) -> Line:
    return Line(key, value if isinstance(value, str) else f"{value:,}", "derived", meaning)


def _step_lines(config: RunConfig, world_size: int) -> Iterator[Line]:
    train, length = config.train, config.data.sequence_length
    slots = max_masked_positions(config.objective.mask_prob, length)
    yield _derived(
        "accumulation", config.accumulation(world_size), "micro-batches per step and rank"
    )
    yield _derived("chosen", slots, "masked positions of a full row")
    yield _derived("tokens_per_step", train.global_batch_size * length, "padding included")


def _length_lines(config: RunConfig, data: Data | None) -> Iterator[Line]:
    train, length = config.train, config.data.sequence_length
    rows = data.manifest.splits["train"].rows if data is not None else None
    if not train.total_steps and not rows:
        return
    steps = config.total_steps(rows)
    seen_rows = steps * train.global_batch_size
    warmup = f"{config.optimizer.warmup_steps / steps:.1%}"
    yield _derived("warmup", warmup, "share of the steps; from 100% on, the warmup never ends")
    yield _derived("total_steps", steps, "optimizer steps")
    yield _derived("tokens", seen_rows * length, "of the whole run, padding included")
    if rows:
        yield _derived("epochs", f"{seen_rows / rows:.3f}", f"over {rows:,} rows")
    for name, source in (data.shares if data is not None else {}).items():
        yield _derived(
            printable(f"source {name}"),
            f"{source.epochs(seen_rows):.2f} epochs",
            f"{source.share:.2%} (weight {source.weight:.6f}); has {source.rows:,} rows, "
            f"{source.tokens:,} tokens",
        )


def _rate_lines(options: OptimizerConfig, total_steps: int | None) -> Iterator[Line]:
    """The learning rate at the steps where the schedule changes; none without a known length."""
    if total_steps is None:
        return
    meanings = {0: ["first step"]}
    if 0 < options.warmup_steps < total_steps:
        meanings.setdefault(options.warmup_steps, []).append("end of the warmup")
    meanings.setdefault(total_steps // 2, []).append("middle of the run")
    if options.decay_steps is not None:
        meanings.setdefault(total_steps - options.decay_steps, []).append("start of the decay")
    meanings.setdefault(total_steps - 1, []).append("last step")
    for step, names in sorted(meanings.items()):
        rate = learning_rate(options, step, total_steps)
        meaning = f"learning rate after {step:,} steps ({options.schedule}): {', '.join(names)}"
        yield _derived(f"lr({step:,})", f"{rate:.6g}", meaning)


def _parameter_lines(config: RunConfig, parameters: ParameterCount) -> Iterator[Line]:
    vocab_size = config.model.vocab_size or VOCAB_SIZE
    yield _derived(
        "vocab_size", vocab_size, "entries of the data's vocabulary; 30,522 without --data"
    )
    yield _derived(
        "discriminator", parameters.discriminator, "parameters of the main encoder and head"
    )
    yield _derived("trained", parameters.trained, "trained parameters in all")
    if parameters.frozen:
        yield _derived("frozen", parameters.frozen, "parameters of the generator, not trained")


def _muon_lines(config: RunConfig) -> Iterator[Line]:
    """The parameters that Muon updates, and the cost of its updates; none for another optimizer."""
    if config.optimizer.kind != "muon":
        return
    module = meta_model(config)
    stacked = hidden_matrices(module)
    matrices = [
        (count, parameter.shape[0] // count, parameter.shape[1])
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (count := stacked.get(name, 0))
    ]
    elements = sum(count * rows * columns for count, rows, columns in matrices)
    steps = config.optimizer.muon.ns_steps
    flops = sum(
        count * newton_schulz_flops(rows, columns, steps) for count, rows, columns in matrices
    )
    yield _derived("muon", elements, "parameters that Muon updates; Adam updates the others")
    meaning = "floating-point operations of the Newton-Schulz steps of one update"
    yield _derived("newton_schulz", f"{flops / 1e9:,.1f} GFLOP", meaning)
