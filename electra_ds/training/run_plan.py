"""Plan of a pretraining run: completed config, engine, training rows, number of steps.

`pretrain` and `check` both call `plan`, so both raise the same errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.config.engine_files import load_engine, offloads_optimizer
from electra_ds.config.loading import phase_runs
from electra_ds.config.phases import PhaseConfig
from electra_ds.config.schema import MAX_STEPS, OptimizerConfig, RunConfig
from electra_ds.data.dataset import Data
from electra_ds.data.masking import masking_recipe
from electra_ds.data.named_data import data_names
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.training.phases import Phase, Span, TrainingData, naming, spans


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    config: with the engine as an object, and with vocab_size and special_ids of the data.
    engine: the checked DeepSpeed config. phases: at least one. total_steps: optimizer steps.
    """

    config: RunConfig
    engine: dict[str, Any]
    phases: list[Phase]
    total_steps: int

    @property
    def data(self) -> TrainingData:
        """The training rows of the first phase."""
        return self.phases[0].data


def plan(config: RunConfig, source: Data | Mapping[str, Data], world_size: int) -> Plan:
    """Return the plan of a run.

    source: the data behind --data; of a run with phases by name (`named_data.open_named`), or one
    for all phases. world_size: number of ranks.
    Raises UserError when config, data and number of ranks are incompatible.
    """
    named = dict(source) if isinstance(source, Mapping) else {"": source}
    names = data_names(named, config.phases)
    _check_tokenizers(named)
    engine = load_engine(config.engine)
    check_optimizer(config.optimizer, engine)
    parts: list[PhaseConfig | None] = [*config.phases] or [None]
    runs, rows = [], []
    for part, run, name in zip(parts, phase_runs(config), names, strict=True):
        with naming(part.name if part else ""):
            run = _with_data(run, named[name]).model_copy(update={"engine": engine})
            run.accumulation(world_size)
            runs.append(run)
            rows.append(_training_data(run, named[name]))
    steps = [run.total_steps(data.reader.rows) for run, data in zip(runs, rows, strict=True)]
    if sum(steps) > MAX_STEPS:
        raise UserError(f"phases: {sum(steps):,} steps; expected at most {MAX_STEPS:,}")
    of_phases = spans(runs, config.phases, steps)
    check_schedules(of_phases, [phase.name for phase in config.phases])
    phases = []
    for index, part in enumerate(parts):
        first_step = sum(steps[:index])
        phases.append(
            Phase(
                index,
                part.name if part else "",
                names[index],
                runs[index],
                rows[index],
                of_phases[index],
                first_step,
                first_step + steps[index],
                part is not None and part.moments == "reset",
            )
        )
    return Plan(_whole_config(config, runs[0]), engine, phases, sum(steps))


def _with_data(run: RunConfig, source: Data) -> RunConfig:
    """The config of a phase with the values of its data. UserError when they do not fit."""
    manifest = source.manifest
    tokenizer = manifest.tokenizer
    return run.with_data(
        tokenizer.vocab_size, tokenizer.special_ids, manifest.sequence_length, manifest.segments
    )


def _whole_config(config: RunConfig, first: RunConfig) -> RunConfig:
    """The config of the run with the values that its first phase has from the data."""
    if not config.phases:
        return first
    model = config.model.model_copy(update={"vocab_size": first.model.vocab_size})
    data = config.data.model_copy(update={"special_ids": first.data.special_ids})
    return config.model_copy(update={"model": model, "data": data, "engine": first.engine})


def _check_tokenizers(named: Mapping[str, Data]) -> None:
    """Raise UserError when the data of phases were prepared with different tokenizers."""
    found = {name: source.manifest.tokenizer.sha256 for name, source in named.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}: tokenizer {sha256[:12]}" for name, sha256 in found.items())
        raise UserError(
            f"--data: the data of the phases have different tokenizers ({listed}); prepare them "
            "with one --tokenizer"
        )


def check_schedules(of_phases: Sequence[Span], names: Sequence[str]) -> None:
    """Raise UserError for a schedule of which the decay is longer than its steps.

    of_phases: the schedule of each phase. names: of the phases; [] for a run without phases.
    """
    for index, span in enumerate(of_phases):
        if index == 0 or span.first_step != of_phases[index - 1].first_step:
            with naming(names[index] if names else ""):
                check_schedule(span.options, span.steps)


def check_optimizer(options: OptimizerConfig, engine: dict[str, Any]) -> None:
    """Raise UserError for an optimizer that does not work with the engine.

    engine: the DeepSpeed config.
    """
    if options.kind != "adam" and offloads_optimizer(engine):
        raise UserError(
            f"optimizer.kind = {options.kind}, but the engine has offload_optimizer, which works "
            "with adam only: use an engine without offload (zero0 to zero3), or optimizer.kind = adam"
        )


def check_schedule(options: OptimizerConfig, total_steps: int) -> None:
    """Raise UserError when the decay of a schedule is longer than the run after the warmup.

    total_steps: of the run, or of the phases with this schedule; with epochs it is known only with
    the data.
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
            f"optimizer.decay_steps = {decay:,}, but the schedule has {total_steps:,} steps, "
            f"{warmup:,} of them warmup (optimizer.warmup_steps); expected {fits}: lower "
            "decay_steps or warmup_steps, or train for more steps"
        )


def plan_warnings(
    schedules: Sequence[Span],
    names: Sequence[str] = (),
    batch_schedule: Sequence[Sequence[int]] = (),
) -> list[str]:
    """Return one warning line for each setting that does not have the intended effect.

    schedules: of each phase; empty if its steps are not known. names: of the phases; empty for a run without phases.
    batch_schedule: train.batch_schedule of a run without phases.
    """
    lines = []
    for index, span in enumerate(schedules):
        warmup, steps = span.options.warmup_steps, span.steps
        is_new = index == 0 or span.first_step != schedules[index - 1].first_step
        if is_new and warmup >= steps:
            of_phase = f"phase {names[index]}: " if names else ""
            longer = "the steps of the phase" if names else "train.total_steps"
            lines.append(
                f"WARNING: {of_phase}optimizer.warmup_steps = {warmup:,} of {steps:,} steps: the "
                f"learning rate does not reach optimizer.peak_lr = {span.options.peak_lr:g}; lower "
                f"warmup_steps or raise {longer}"
            )
    total_steps = sum(span.steps for span in {span.first_step: span for span in schedules}.values())
    unused = [entry for entry in batch_schedule if schedules and entry[0] >= total_steps]
    if unused:
        lines.append(
            f"WARNING: {unused[0]} of train.batch_schedule has no effect, because the run has "
            f"{total_steps:,} steps"
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
