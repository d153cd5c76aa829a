"""Check of a run before it starts: derived numbers, parameters, values, and errors in the config.

The memory table is in `memory`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from electra_ds.common.printable import printable
from electra_ds.common.section import Section
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import phase_runs
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import VOCAB_SIZE, ParameterCount, meta_model, parameter_count
from electra_ds.model.encoder import hidden_matrices
from electra_ds.reporting.check_phases import PhaseLine, phase_lines, steps_of
from electra_ds.training.muon import newton_schulz_flops
from electra_ds.training.phases import Phase, Span, spans
from electra_ds.training.run_plan import check_optimizer, check_schedules, plan, plan_warnings


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
    total_steps: optimizer steps of the run; None with epochs and no data.
    warnings: lines that `pretrain` prints as well.
    runs: the config of each phase; one for a run without phases.
    spans: the schedule of each phase; empty if total_steps is None.
    phases: a line for each phase; empty for a run without phases.
    """

    derived: list[Line]
    changed: list[Line]
    fields: list[Line]
    config: RunConfig
    total_steps: int | None
    warnings: list[str]
    runs: list[RunConfig]
    spans: list[Span]
    phases: list[PhaseLine]


def check(
    config: RunConfig,
    world_size: int,
    data: Data | Mapping[str, Data] | None = None,
    baseline: RunConfig | None = None,
) -> Report:
    """Report on a run of `world_size` ranks.

    data: for epochs, the vocabulary and the shares of a mixture; see `plan`.
    baseline: the preset with which values are compared; None: the defaults of the schema.
    Raises UserError for an engine that cannot be loaded, for data that does not fit the model, for
    a global batch that cannot be split over the ranks, for a decay that is longer than the run, and
    for an optimizer that does not work with the engine.
    """
    check_optimizer(config.optimizer, load_engine(config.engine))
    runs, names = phase_runs(config), [phase.name for phase in config.phases]
    planned: list[Phase] = []
    if data is not None:
        whole = plan(config, data, world_size)
        planned = whole.phases
        config = whole.config.model_copy(update={"engine": config.engine})
        runs = [phase.config.model_copy(update={"engine": config.engine}) for phase in planned]
    steps = steps_of(runs, planned)
    schedules = spans(runs, config.phases, steps) if steps else []
    check_schedules(schedules, names)
    table = []
    if config.phases:
        table = list(phase_lines(config.phases, runs, schedules, planned, world_size))
        derived = list(_whole_length_lines(runs, steps))
    else:
        derived = [
            *_step_lines(config, world_size),
            *_length_lines(config, planned),
            *(_rate_lines(schedules[0]) if schedules else ()),
        ]
    derived += [*_parameter_lines(config, parameter_count(config)), *_muon_lines(config)]
    fields = list(_fields(config))
    known = {line.key: line.value for line in _fields(baseline)} if baseline else _defaults(config)
    changed = [line for line in fields if known.get(line.key) != line.value]
    notes = plan_warnings(schedules, names, config.train.batch_schedule)
    total_steps = sum(steps) if steps else None
    return Report(derived, changed, fields, config, total_steps, notes, runs, schedules, table)


def _fields(section: BaseModel, prefix: str = "") -> Iterator[Line]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if name == "phases":
            value = ", ".join(phase.name for phase in value)  # the table of phases shows the rest
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
        elif name == "phases":
            defaults[name] = ""
        elif not info.is_required():
            defaults[f"{prefix}{name}"] = str(info.get_default(call_default_factory=True))
    return defaults


def _derived(key: str, value: Any, meaning: str) -> Line:
    return Line(key, value if isinstance(value, str) else f"{value:,}", "derived", meaning)


def _step_lines(config: RunConfig, world_size: int) -> Iterator[Line]:
    train, length = config.train, config.data.sequence_length
    slots = max_masked_positions(config.objective.mask_prob, length)
    config.accumulation(world_size)  # UserError for a batch that the ranks cannot split
    per_micro = train.micro_batch_size * world_size
    yield _derived(
        "accumulation", train.global_batch_size // per_micro, "micro-batches per step and rank"
    )
    yield _derived("chosen", slots, "masked positions of a full row")
    yield _derived("tokens_per_step", train.global_batch_size * length, "padding included")
    for step, rows in train.batch_schedule:
        yield _derived(
            f"batch({step:,})",
            f"{rows:,} rows",
            f"rows per step after {step:,} steps: {config.batch_sizes.rows_before(step) * length:,} "
            f"tokens before, {rows * length:,} tokens per step, accumulation {rows // per_micro}",
        )


def _length_lines(config: RunConfig, phases: list[Phase]) -> Iterator[Line]:
    """Lines of a run without phases. phases: with data the only one, else empty."""
    train, length = config.train, config.data.sequence_length
    rows = phases[0].data.reader.rows if phases else None
    if not train.total_steps and not rows:
        return
    steps = config.total_steps(rows)
    seen_rows = config.batch_sizes.rows_before(steps)
    warmup = f"{config.optimizer.warmup_steps / steps:.1%}"
    yield _derived("warmup", warmup, "share of the steps; from 100% on, the warmup never ends")
    yield _derived("total_steps", steps, "optimizer steps")
    yield _derived("tokens", seen_rows * length, "of the whole run, padding included")
    if rows:
        yield _derived("epochs", f"{seen_rows / rows:.3f}", f"over {rows:,} rows")
    for name, source in (phases[0].data.source.shares if phases else {}).items():
        yield _derived(
            printable(f"source {name}"),
            f"{source.epochs(seen_rows):.2f} epochs",
            f"{source.share:.2%} (weight {source.weight:.6f}); has {source.rows:,} rows, "
            f"{source.tokens:,} tokens",
        )


def _whole_length_lines(runs: list[RunConfig], steps: list[int]) -> Iterator[Line]:
    """Lines of a run with phases. steps: of each phase; empty if they are not known."""
    if steps:
        tokens = sum(
            count * run.train.global_batch_size * run.data.sequence_length
            for run, count in zip(runs, steps, strict=True)
        )
        yield _derived("total_steps", sum(steps), "optimizer steps of all phases")
        yield _derived("tokens", tokens, "of the whole run, padding included")


def _rate_lines(schedule: Span) -> Iterator[Line]:
    """The learning rate at the steps where the schedule changes, in a run without phases."""
    options, total_steps = schedule.options, schedule.steps
    meanings = {0: ["first step"]}
    if 0 < options.warmup_steps < total_steps:
        meanings.setdefault(options.warmup_steps, []).append("end of the warmup")
    meanings.setdefault(total_steps // 2, []).append("middle of the run")
    if options.decay_steps is not None:
        meanings.setdefault(total_steps - options.decay_steps, []).append("start of the decay")
    meanings.setdefault(total_steps - 1, []).append("last step")
    for step, names in sorted(meanings.items()):
        meaning = f"learning rate after {step:,} steps ({options.schedule}): {', '.join(names)}"
        yield _derived(f"lr({step:,})", f"{schedule.rate(step):.6g}", meaning)


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
