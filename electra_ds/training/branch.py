"""Checks of --branch-from, the checkpoint of another run that a new run continues.

A branch begins with the weights, the moments, the loss scaler and the step of the checkpoint, and
with its position in the same data. The checks come before the engine is built and before the run
folder is made. The folder of the parent is only read.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.printable import printable
from electra_ds.config.loading import differences
from electra_ds.config.phases import how_to_extend
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.loader import data_differences
from electra_ds.model.build import build_objective
from electra_ds.model.weights import shapes_of
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import Meta
from electra_ds.training.checkpoint_config import config_of_weights
from electra_ds.training.collectives import ControlGroup, fail_on_all_ranks, on_rank0
from electra_ds.training.init_from import (
    GENERATOR_PARTS,
    check_architecture,
    check_shapes,
    check_vocabulary,
    read_source,
)
from electra_ds.training.phases import Phase, Span, branched, current_index
from electra_ds.training.positions import check_position
from electra_ds.training.state import TrainingState

# Fields of the sections model and generator that a branch may change: they change no parameter and
# no connection of the encoders. The initialization has no effect on a branch.
FREE = re.compile(
    r"(model|generator)\.\w+_dropout|model\.(global_theta|local_theta|max_positions|init|init_std"
    r"|embedding_init_std)"
)
# Other fields that a branch may not change: the special tokens belong to the vocabulary, and the
# moments of one kind of optimizer have no meaning for another.
FIXED = re.compile(r"data\.special_ids|optimizer\.kind")


@dataclass(frozen=True)
class Branch:
    """What a new run continues.

    source: the checkpoint. state: of the new run before its first step. lines: for the console.
    facts: for the provenance in config.json, JSON values.
    """

    source: Path
    state: TrainingState
    lines: list[str]
    facts: dict[str, Any]


def find_branch(
    given: Path, config: RunConfig, phases: Sequence[Phase], control: ControlGroup
) -> Branch:
    """Return the branch that begins at the checkpoint `given`, on every rank. Collective.

    given: a run (its latest checkpoint) or a checkpoint. config, phases: of the new run, with the
    values of its data.
    Raises UserError on every rank when there is no complete checkpoint with moments, when the
    content of a file has changed, and when the new run cannot continue it.
    """
    found = on_rank0(lambda: _found(given, config, phases))
    source = Path(found["source"])
    ranks = control.ranks
    with fail_on_all_ranks(control.all_gather_object, f"--branch-from {printable(given)}"):
        checkpoint.check_content(source, checkpoint.read_meta(source), ranks.rank, ranks.world_size)
    return Branch(source, TrainingState(**found["state"]), found["lines"], found["facts"])


def _found(given: Path, config: RunConfig, phases: Sequence[Phase]) -> dict[str, Any]:
    """The fields of a Branch as JSON values, after the checkpoint was compared with the run."""
    name = f"--branch-from {printable(given)}"
    source, meta, theirs = read_source(name, given)
    science, machine = differences(theirs, config)
    check_architecture(name, theirs, config)
    check_vocabulary(name, source, phases[0].data.source.tokenizer)
    _check_fields(name, science)
    _check_tensors(name, source, meta, config)
    last = config_of_weights(meta, f"{source}/meta.json")  # of the phase of the checkpoint
    check_position(f"{name}: {source}/meta.json", meta.state, last.batch_sizes)
    _check_length(name, meta.state.step, config, phases[-1].end_step)
    state = _first_state(meta.state, last, phases, science)
    phase = phases[current_index(state, phases)]
    listed = [*science, *machine]
    if theirs.phases or config.phases:
        listed += _phase_lines(meta.state, last, phase, listed)
    lines = [
        f"branch of {source} at step {state.step:,} with its weights and moments; "
        + _rows_text(meta.state, state, phase, last),
        *(f"  {line}" for line in listed),
        *_decay_warning(state.step, phase.span),
    ]
    facts = {
        "checkpoint": str(source.resolve()),
        "meta_sha256": sha256_file(source / "meta.json"),
        "step": state.step,
        "dataset_id": meta.state.data.get("dataset_id"),
        "position": state.first_position,
        "differences": listed,
    }
    return {"source": str(source), "state": asdict(state), "lines": lines, "facts": facts}


def fixed_differences(science: Sequence[str]) -> list[str]:
    """Return the differences of fields that decide what the weights and moments mean.

    science: of scope science, as `differences` returns them. A branch may have all others.
    """
    keys = {line: line.partition(":")[0] for line in science}
    return [
        line
        for line, key in keys.items()
        if FIXED.fullmatch(key)
        or (key.split(".")[0] in ("model", "generator") and not FREE.fullmatch(key))
    ]


def _check_fields(name: str, science: list[str]) -> None:
    """Raise UserError when a field of `fixed_differences` differs."""
    if fixed := fixed_differences(science):
        raise UserError(
            f"{name}: a branch continues the same model with the same kind of optimizer, but "
            f"{'; '.join(fixed)}: use the values of the checkpoint"
        )


def _check_tensors(name: str, source: Path, meta: Meta, config: RunConfig) -> None:
    """Raise UserError when the weights are not those of this run, or their moments are missing."""
    found = checkpoint.shapes(source, meta)
    moments = {key.partition("/")[2] for key in checkpoint.shapes(source, meta, "optim")}
    if not moments:
        raise UserError(
            f"{name}: {printable(source)} has no moments of the optimizer, like every checkpoint "
            "that import or average wrote; expected one that pretrain wrote; to start from its "
            "weights use --init-from"
        )
    trained = set(found)
    if not isinstance(config.model, FactoryConfig):  # the modules of a user are the same code
        expected = shapes_of(partial(build_objective, config), "the config of this run")
        check_shapes(name, found, expected)
        is_frozen = config.objective.is_frozen
        trained = {key for key in found if not (is_frozen and key.startswith(GENERATOR_PARTS))}
    for keys, what in ((trained - moments, "no moments"), (moments - trained, "moments")):
        if keys:
            here = "trains it" if what == "no moments" else "does not train it"
            raise UserError(
                f"{name}: {printable(source)} has {what} of {printable(min(keys))} ({len(keys)} "
                f"tensors), but this run {here}; use the objective of its config"
            )


def _phase_lines(
    state: TrainingState, last: RunConfig, phase: Phase, listed: list[str]
) -> list[str]:
    """The differences between the last phase of a checkpoint and the first one of the branch.

    Those in `listed`, of the whole configs, do not show a value that only a phase has.
    last: the config of the checkpoint's phase.
    """
    before = state.data.get("phase", {}).get("name", "none")
    lengths = ("train.total_steps:", "train.epochs:")
    return [
        f"{line} (phase {printable(before)} -> {phase.name or 'none'})"
        for part in differences(last, phase.config)
        for line in part
        if line not in listed and not line.startswith(lengths)
    ]


def _check_length(name: str, step: int, config: RunConfig, total_steps: int) -> None:
    if total_steps > step:
        return
    epochs = config.train.epochs
    given = "" if epochs is None else f" (train.epochs = {epochs}, from step 0 on)"
    longer = how_to_extend(config.phases) if epochs is None else "raise train.epochs"
    raise UserError(
        f"{name}: is at step {step:,}, and the step counts on in a branch, but this run has "
        f"{total_steps:,} steps{given}; expected more than {step:,}: {longer}"
    )


def _first_state(
    state: TrainingState, theirs: RunConfig, phases: Sequence[Phase], science: list[str]
) -> TrainingState:
    """The state of a branch before its first step. state, theirs: of the checkpoint."""
    begun = branched(state, theirs, phases)
    # Losses of another objective or other rows do not tell which loss is a spike.
    is_other = any(line.startswith(("objective.", "phases")) for line in science)
    return replace(begun, recent_losses=[]) if is_other or not begun.consumed_rows else begun


def _rows_text(before: TrainingState, state: TrainingState, phase: Phase, theirs: RunConfig) -> str:
    """Where the rows of a branch begin, and why. before: of the checkpoint. state: of the branch."""
    of_phase = f" of the phase {phase.name}" if phase.name else ""
    if state.consumed_rows:
        return f"the rows{of_phase} continue at position {state.consumed_rows:,}"
    reasons = data_differences(before.data, phase.data.reader, phase.data.row_order)
    batch, own = theirs.train.global_batch_size, phase.config.train.global_batch_size
    if not reasons and batch != own:
        reasons.append(
            f"the order of streamed rows depends on train.global_batch_size ({batch} -> {own}); "
            "train.batch_schedule changes the batch and keeps the order"
        )
    return f"the rows{of_phase} start at position 0{': ' * bool(reasons)}{'; '.join(reasons)}"


def _decay_warning(step: int, schedule: Span) -> list[str]:
    decay = schedule.options.decay_steps
    if decay is None:
        return []
    begins = schedule.first_step + schedule.steps - decay
    if begins >= step:
        return []
    return [
        f"WARNING: the decay begins at step {begins:,} (optimizer.decay_steps before the end of "
        f"the schedule), before the branch at step {step:,}: the learning rate jumps"
    ]
