"""The generator of another model, for objective.generator = frozen (`--generator-from`)."""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.printable import printable
from electra_ds.config.architectures import EncoderConfig, ModelConfig, ModernBertModelConfig
from electra_ds.config.schema import RunConfig
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.interop.checkpoints import read_checkpoint
from electra_ds.interop.hf import format_of, format_of_type
from electra_ds.interop.hf_folder import read_config, read_folder
from electra_ds.interop.hf_format import part_names
from electra_ds.interop.load_model import resolve_model
from electra_ds.interop.vocabularies import check_same_vocabulary
from electra_ds.model.build import build_objective
from electra_ds.model.weights import Shapes, check_layers, check_state, shapes_of

PARTS = ("generator_embeddings.", "generator.", "generator_head.")


EXPECTED = (
    "a run or checkpoint with a generator or of objective.kind = mlm, or a Hugging Face folder "
    "with a language-modelling head"
)


class Found(NamedTuple):
    """The sizes of a generator as it was found.

    model: the section `model` of its config. sizes: those of its encoder. width: of its word table.
    """

    model: ModelConfig
    sizes: EncoderConfig
    width: int


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
    try:
        shapes = shapes_of(lambda: build_objective(config), "the config of this run")
        own = {name: shape for name, shape in shapes.items() if name.startswith(PARTS)}
        weights = _read(path, config, tokenizer, own)
        check_state(weights, own, str(path))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return weights


def _read(path: Path, config: RunConfig, tokenizer: Tokenizer, own: Shapes) -> dict[str, Tensor]:
    """`read_generator` without the comparison of shapes.

    own: the shapes of the parameters of the generator in this run, by name.
    """
    if found_at(path).kind == "fine-tuned":
        raise _no_generator("a fine-tuned model has a main encoder only")
    source = resolve_model(path, EXPECTED)
    if source.checkpoint is not None:
        return _of_checkpoint(source.checkpoint, config, tokenizer)
    folder = source.hf.get("generator") or source.hf["discriminator"]
    return _of_hf_folder(folder, config, tokenizer, own)


def _of_checkpoint(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    found = read_checkpoint(folder)
    if found.run is None:
        raise _no_generator("a fine-tuned model has a main encoder only")
    _check_architecture(found.model.architecture, config)
    objective = found.run.objective
    predicts = objective.kind == "mlm"
    if not predicts and not objective.has_generator:
        raise _no_generator(f"objective.generator = {objective.generator}")
    check_same_vocabulary(tokenizer, "--data", found.tokenizer(), folder)
    sizes = found.model if predicts else found.run.generator
    width = found.model.word_width if predicts else found.model.generator_width(sizes)
    _check_sizes(Found(found.model, sizes, width), config)
    part = "discriminator" if predicts else "generator"
    return {_frozen_name(name): found.weights[name] for name in part_names(found.weights, part)}


def _of_hf_folder(
    folder: Path, config: RunConfig, tokenizer: Tokenizer, own: Shapes
) -> dict[str, Tensor]:
    """The sizes are compared first: names and tensors are converted by those of this run."""
    architecture = format_of_type(read_config(folder)["model_type"]).architecture
    _check_architecture(architecture, config)
    words = load_tokenizer(folder)
    check_same_vocabulary(tokenizer, "--data", words, folder)
    content = read_folder(folder, words.vocab_size)
    form = content.format
    if "generator" not in form.heads(content.config, content.tensors):
        raise _no_generator("its class has no language-modelling head")
    form.check_tied(content.config, content.tensors, str(folder))
    model, _ = form.parse(content.config, where=f"{folder}/config.json")
    _check_sizes(Found(model, model, model.word_width), config)
    check_layers(content.tensors, form.before_layer, model.num_layers, str(folder))
    return form.from_hf(content.tensors, own, "generator")


def _frozen_name(name: str) -> str:
    """The name in a frozen generator of a parameter of a generator or a main encoder."""
    part, _, rest = name.partition(".")
    if part.endswith("_head"):
        return f"generator_head.{rest}"
    return f"generator_embeddings.{rest}" if part.endswith("embeddings") else f"generator.{rest}"


def _no_generator(reason: str) -> UserError:
    return UserError(f"no generator here ({reason}); expected {EXPECTED}")


def _check_architecture(theirs: str, config: RunConfig) -> None:
    own = config.model.architecture
    if theirs != own:
        raise UserError(
            f"model.architecture = {theirs}, but {own} in this run; expected a generator of the "
            "same architecture"
        )


def _check_sizes(found: Found, config: RunConfig) -> None:
    """Raise UserError with the settings that fit, when sizes or mathematics differ."""
    own = config.model
    form = format_of(own)
    compared = {
        f"generator.{name}": (getattr(found.sizes, name), getattr(config.generator, name))
        for name in sorted(form.sizes - form.free)
    }
    if "embedding_size" in form.tables:
        width = own.generator_width(config.generator)
        compared["generator.embedding_size"] = (found.width, width)
    # A limit of the length alone, the rows of a table, or a distance on which logits depend.
    limits = (form.free & {"max_positions"}) - form.effects.keys()
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
        raise UserError(f"{'; '.join(texts)}; add {options}")
