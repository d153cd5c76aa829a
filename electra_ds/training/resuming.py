"""How a run begins: from a checkpoint of its own, from that of another run, or anew."""

from dataclasses import replace
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.config.loading import differences, parse_run
from electra_ds.config.phases import is_extension
from electra_ds.config.schema import RunConfig
from electra_ds.model.weights import true_rows
from electra_ds.training import checkpoint, generator_from
from electra_ds.training.attempt import Attempt
from electra_ds.training.branch import find_branch, fixed_differences
from electra_ds.training.checkpointer import rename_final
from electra_ds.training.collectives import ControlGroup
from electra_ds.training.engine import Engine
from electra_ds.training.init_from import GENERATOR_PARTS, find_source
from electra_ds.training.phases import check_resume
from electra_ds.training.state import TrainingState


def with_sources(attempt: Attempt) -> Attempt:
    """The attempt with what the options with the suffix `-from` stand for. Collective."""
    options, source, branch = attempt.options, attempt.init_from, None
    reads = options.init_from or options.read_generator or options.branch_from
    if not (reads or attempt.config.objective.is_frozen):
        return attempt
    is_new = checkpoint.latest_on_rank0(attempt.out / "ckpt") is None
    if options.branch_from and is_new:
        control = ControlGroup(attempt.ranks)
        branch = find_branch(options.branch_from, attempt.config, attempt.phases, control)
    if options.init_from and is_new:
        source = _find_source(attempt)
    generator = generator_from.read_weights(
        options.read_generator,
        attempt.config,
        attempt.data.source.tokenizer,
        ControlGroup(attempt.ranks).all_gather_object,
        needs_weights=is_new and source is None and branch is None,
    )
    return replace(attempt, init_from=source, branch=branch, generator=generator)


def resume(attempt: Attempt, engine: Engine) -> TrainingState | None:
    """Load the latest checkpoint of OUT and return its state; None for a new run. Collective.

    With --init-from a new run loads the weights of another run, with --branch-from its state as
    well. Raises UserError when the config or the data of the checkpoint differ from those of this
    run.
    """
    options, config = attempt.options, attempt.config
    rows = true_rows(engine.module)
    found = checkpoint.latest_on_rank0(attempt.out / "ckpt")
    if found is None:
        if options.branch_from is not None:
            return _begin_branch(attempt, engine)
        if options.init_from is not None:
            source = attempt.init_from or _find_source(attempt)
            skipped = () if attempt.generator is None else GENERATOR_PARTS
            checkpoint.load(engine, source, rows, weights_only=True, skipped=skipped)
            attempt.print(
                f"weights of {source}; the schedule and the position in the data start at 0"
            )
        return None
    meta = checkpoint.read_meta(found)
    old = parse_run(meta.config, f"{found}/meta.json")
    science, machine = differences(old, config)
    if options.extend:
        lengths = ("train.total_steps:", "train.epochs:")
        science = [
            line
            for line in science
            if not (line.startswith(lengths) or is_extension(line, old.phases))
        ]
    if science:
        raise UserError(
            f"{found} was trained with another config: {'; '.join(science)}. Use the old values"
            + other_ways(old, config, science)
        )
    check_resume(meta.state, attempt.phases, f"{found}/meta.json", extends=options.extend)
    checkpoint.load(engine, found, rows)
    if options.extend and found.name == checkpoint.FINAL:
        rename_final(engine, found, meta.state.step)
    changed = f"; now {', '.join(machine)}" if machine else ""
    attempt.print(f"resuming {found} at step {meta.state.step}{changed}")
    return meta.state


def other_ways(old: RunConfig, config: RunConfig, science: list[str]) -> str:
    """Return what is possible after a change, beside the old values.

    old: of the checkpoint. science: the differences of scope science.
    """
    if type(old) is not type(config):  # the class of a config is that of its architecture
        return " or choose another --out; its weights fit its own architecture only"
    if fixed_differences(science):  # a branch is refused as well
        return ", or choose another --out and start from its weights with --init-from"
    return (
        ", choose another --out and continue it with --branch-from, or start from its weights "
        "with --init-from"
    )


def _begin_branch(attempt: Attempt, engine: Engine) -> TrainingState:
    """Load the checkpoint of --branch-from and return the first state of the branch. Collective."""
    branch = attempt.branch
    if branch is None:
        raise UserError(
            f"{printable(attempt.out)}/ckpt: its checkpoint was removed during the start; repeat "
            "the command"
        )
    checkpoint.load(engine, branch.source, true_rows(engine.module))
    for line in branch.lines:
        attempt.print(line)
    return branch.state


def _find_source(attempt: Attempt) -> Path:
    assert attempt.options.init_from is not None
    return find_source(
        attempt.options.init_from,
        attempt.config,
        attempt.data.source.tokenizer,
        ControlGroup(attempt.ranks).all_gather_object,
        needs_generator=attempt.options.read_generator is None,
    )
