"""Checks of --init-from, the weights of another run with which a new run starts.

They come before the engine is built and before the run folder is made.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.printable import printable
from electra_ds.config.architectures import ModelConfig
from electra_ds.config.loading import parse_run
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.weights import Shapes, shapes_of
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import Meta, find_checkpoint, tokenizer_of
from electra_ds.training.collectives import fail_on_all_ranks, on_rank0

# The parameters of a generator that shares nothing, which --generator-from gives.
GENERATOR_PARTS = ("generator_embeddings.", "generator.", "generator_head.")


def find_source(
    given: Path,
    config: RunConfig,
    data_tokenizer: Path,
    all_gather_object: Callable[[Any], list[Any]],
    *,
    needs_generator: bool,
) -> Path:
    """Return the checkpoint that `given` stands for, on every rank. Collective.

    given: a run or a checkpoint. config: of the new run, with the values of its data.
    data_tokenizer: folder of the tokenizer of the data.
    needs_generator: whether its generator is used; with --generator-from it is not compared.
    Raises UserError on every rank when a rank does not find the checkpoint, and when its weights or
    its vocabulary do not fit. The weights of a model.factory are compared when they are loaded.
    """
    source = Path(
        on_rank0(lambda: str(_checked_source(given, config, data_tokenizer, needs_generator)))
    )
    with fail_on_all_ranks(all_gather_object, f"--init-from {printable(given)}"):
        checkpoint.read_meta(source)
    return source


def _checked_source(
    given: Path, config: RunConfig, data_tokenizer: Path, needs_generator: bool
) -> Path:
    """The checkpoint of `given`, after it was compared with the new run."""
    name = f"--init-from {printable(given)}"
    source, meta, theirs = read_source(name, given)
    check_architecture(name, theirs, config)
    check_vocabulary(name, source, data_tokenizer)
    if not isinstance(config.model, FactoryConfig):
        expected = shapes_of(partial(build_objective, config), "the config of this run")
        found = checkpoint.shapes(source, meta)
        if not needs_generator:
            expected, found = _without_generator(expected), _without_generator(found)
        if isinstance(theirs.model, ModelConfig) and expected.keys() != found.keys():
            _check_sharing(name, given, theirs, config.model, needs_generator)
        check_shapes(name, found, expected)
    return source


def read_source(name: str, given: Path) -> tuple[Path, Meta, RunConfig]:
    """Return the checkpoint that `given` stands for, its description and its config.

    name: the option with its value, for messages. given: a run or a checkpoint.
    Raises UserError when there is no checkpoint of a pretraining run.
    """
    try:
        source = find_checkpoint(given)
        meta = checkpoint.read_meta(source)
        if "task" in meta.config:
            raise UserError(
                f"{printable(source)}{found_at(source).clause}; expected a pretraining run"
            )
        return source, meta, parse_run(meta.config, f"{source}/meta.json")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _without_generator(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(GENERATOR_PARTS)}


def _check_sharing(
    name: str, given: Path, theirs: RunConfig, own: ModelConfig, needs_generator: bool
) -> None:
    """Raise UserError for another sharing, with the commands that convert the weights."""
    assert isinstance(theirs.model, ModelConfig)
    found, sharing = theirs.model.sharing, own.sharing
    if found == sharing or not theirs.objective.has_generator:
        return  # the objectives or the sizes differ
    way = f"use a run of model.sharing = {sharing}, or set model.sharing = {found}"
    if imported := _sharing_of_import(theirs, theirs.model, sharing, needs_generator):
        way = (
            f"to convert them, run `electra-ds export {printable(given)} --out H` and `electra-ds "
            f"import H --out I --set model.sharing={imported}`, then give --init-from I"
        )
    raise UserError(
        f"{name}: model.sharing = {found}, but {sharing} in this run: its weights do not fit; {way}"
    )


def _sharing_of_import(
    theirs: RunConfig, model: ModelConfig, sharing: str, needs_generator: bool
) -> str | None:
    """The model.sharing with which an import of the exported run gives weights that fit `sharing`.

    model: that of `theirs`. None if there is no such import.
    """
    is_as_wide = theirs.generator.hidden_size == model.word_width  # as an import needs for untied
    if sharing == "untied" and not (is_as_wide or needs_generator):
        sharing = "shared"  # the main encoder's tensors are the same
    both = (model.sharing, sharing)
    return None if "all" in both or ("untied" in both and not is_as_wide) else sharing


def check_architecture(name: str, theirs: RunConfig, config: RunConfig) -> None:
    """Raise UserError when both models are built in and of different architectures."""
    if not (isinstance(theirs.model, ModelConfig) and isinstance(config.model, ModelConfig)):
        return
    found, own = theirs.model.architecture, config.model.architecture
    if found != own:
        raise UserError(
            f"{name}: model.architecture = {found}, but {own} in this run: its weights do not "
            f"fit; expected a run of {own}, or start from a config of {found}"
        )


def check_vocabulary(name: str, source: Path, data_tokenizer: Path) -> None:
    """Raise UserError when the vocabularies of checkpoint and data differ, also at equal size."""
    tokenizer = tokenizer_of(source)
    if not tokenizer.is_dir() or not data_tokenizer.is_dir():
        return
    if load_tokenizer(tokenizer).names != load_tokenizer(data_tokenizer).names:
        raise UserError(
            f"{name}: its vocabulary ({printable(tokenizer)}) is not that of the data "
            f"({printable(data_tokenizer)}); prepare the data with {printable(tokenizer)}"
        )


def check_shapes(
    name: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raise UserError when the tensors of a checkpoint are not those of this run's model."""
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            raise UserError(
                f"{name}: {printable(key)} has shape {found[key]}, this run's model has {shape}; "
                "use the sizes of its config"
            )
    for keys, what in ((expected.keys() - found, "has no"), (found.keys() - expected, "has")):
        if keys:
            first = ", ".join(map(printable, sorted(keys)[:3]))
            both = "this run's model has them" if what == "has no" else "this run's model has not"
            raise UserError(
                f"{name}: {what} {first} ({len(keys)} tensors), but {both}; use the objective, the "
                "sharing and the sizes of its config"
            )
