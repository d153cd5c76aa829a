"""The generator of another model, for objective.generator = frozen (`--generator-from`)."""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.config.architectures import EncoderConfig, ModelConfig, ModernBertModelConfig
from electra_ds.config.schema import RunConfig
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.interop.checkpoints import read_checkpoint
from electra_ds.interop.hf import format_of
from electra_ds.interop.hf_folder import read_folder
from electra_ds.interop.hf_format import part_names
from electra_ds.interop.load_model import resolve_model
from electra_ds.interop.vocabularies import check_same_vocabulary
from electra_ds.model.build import build_objective
from electra_ds.model.weights import Shapes, check_layers, check_state, shapes_of

PARTS = ("generator_embeddings.", "generator.", "generator_head.")


class Found(NamedTuple):
    """A generator as it was found.

    model: the section `model` of its config. sizes: those of its encoder. width: of its word table.
    weights: fp32 tensors with the names of a frozen generator.
    """

    model: ModelConfig
    sizes: EncoderConfig
    width: int
    weights: dict[str, Tensor]


def generator_reader(
    path: str | Path | None,
) -> Callable[[RunConfig, Tokenizer], dict[str, Tensor]] | None:
    """Return `read_generator` with this path; None for None."""
    return None if path is None else functools.partial(read_generator, Path(path))


def read_generator(path: Path, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the weights of a frozen generator: canonical name -> fp32 tensor without padded rows.

    path: a run folder or a checkpoint with a generator, or of objective.kind = mlm (then its main
        encoder predicts the tokens), or a Hugging Face folder with a language-modelling head.
    config: with the vocab_size and special_ids of the data. tokenizer: that of the data.
    Raises UserError when there is no such model, when its sizes differ from those of the config,
    and for another vocabulary.
    """
    where = f"--generator-from {printable(path)}"
    shapes = shapes_of(lambda: build_objective(config), where)
    own = {name: shape for name, shape in shapes.items() if name.startswith(PARTS)}
    source = resolve_model(path)
    if source.checkpoint is None:
        folder = source.hf.get("generator") or source.hf["discriminator"]
        found = _of_hf_folder(folder, tokenizer, own)
    else:
        found = _of_checkpoint(source.checkpoint, tokenizer)
    _check_sizes(found, config, where)
    check_state(found.weights, own, where)
    return found.weights


def _of_checkpoint(folder: Path, tokenizer: Tokenizer) -> Found:
    found = read_checkpoint(folder)
    if found.run is None:
        raise _no_generator(folder, "a fine-tuned model has a main encoder only")
    objective = found.run.objective
    predicts = objective.kind == "mlm"
    if not predicts and not objective.has_generator:
        raise _no_generator(folder, f"objective.generator = {objective.generator}")
    check_same_vocabulary(tokenizer, "--data", found.tokenizer(), folder)
    part = "discriminator" if predicts else "generator"
    weights = {_frozen_name(name): found.weights[name] for name in part_names(found.weights, part)}
    sizes = found.model if predicts else found.run.generator
    width = found.model.word_width if predicts else found.model.generator_width(sizes)
    return Found(found.model, sizes, width, weights)


def _of_hf_folder(folder: Path, tokenizer: Tokenizer, own: Shapes) -> Found:
    """own: the shapes of the parameters of the generator in this run, by name."""
    words = load_tokenizer(folder)
    check_same_vocabulary(tokenizer, "--data", words, folder)
    content = read_folder(folder, words.vocab_size)
    form = content.format
    if "generator" not in form.heads(content.config, content.tensors):
        raise _no_generator(folder, "its class has no language-modelling head")
    form.check_tied(content.config, content.tensors, str(folder))
    model, _ = form.parse(content.config, where=f"{folder}/config.json")
    check_layers(content.tensors, form.before_layer, model.num_layers, str(folder))
    names = [name for name in own if _layer(name) < model.num_layers]
    weights = form.from_hf(content.tensors, names, "generator")
    return Found(model, model, model.word_width, weights)


def _layer(name: str) -> int:
    """The number of the layer of a parameter; 0 for a parameter of no layer."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


def _frozen_name(name: str) -> str:
    """The name in a frozen generator of a parameter of a generator or a main encoder."""
    part, _, rest = name.partition(".")
    if part.endswith("_head"):
        return f"generator_head.{rest}"
    return f"generator_embeddings.{rest}" if part.endswith("embeddings") else f"generator.{rest}"


def _no_generator(path: Path, reason: str) -> UserError:
    return UserError(
        f"--generator-from {printable(path)}: no generator here ({reason}); expected a run or "
        "checkpoint with a generator or of objective.kind = mlm, or a Hugging Face folder with a "
        "language-modelling head"
    )


def _check_sizes(found: Found, config: RunConfig, where: str) -> None:
    """Raise UserError with the settings that fit, when sizes or mathematics differ."""
    own = config.model
    if found.model.architecture != own.architecture:
        raise UserError(
            f"{where}: model.architecture = {found.model.architecture}, but {own.architecture} in "
            "this run; expected a generator of the same architecture"
        )
    form = format_of(own)
    compared = {
        f"generator.{name}": (getattr(found.sizes, name), getattr(config.generator, name))
        for name in sorted(form.sizes - form.free)
    }
    if "embedding_size" in form.tables:
        width = own.generator_width(config.generator)
        compared["generator.embedding_size"] = (found.width, width)
    # A limit of the length where an import may change it, and the rows of a table elsewhere.
    limits = form.free & {"max_positions"}
    for name in sorted(form.tables - limits - {"embedding_size", "vocab_size"}):
        compared[f"model.{name}"] = (getattr(found.model, name), getattr(own, name))
    if isinstance(own, ModernBertModelConfig) and isinstance(found.model, ModernBertModelConfig):
        count = config.generator.num_layers  # patterns are equal if the layers of both are
        if found.model.layer_kinds(count) == own.layer_kinds(count):
            del compared["model.attention_pattern"]
    differing = {key: values for key, values in compared.items() if values[0] != values[1]}
    if differing:
        texts = (f"{key} = {theirs}, but {ours} here" for key, (theirs, ours) in differing.items())
        sets = (f"{key}={json.dumps(theirs)}" for key, (theirs, _) in differing.items())
        options = " ".join(f"--set {shlex.quote(setting)}" for setting in sets)
        raise UserError(f"{where}: {'; '.join(texts)}; add {options}")
