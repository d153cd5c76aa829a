"""MODEL arguments: the accepted paths, and loading of their weights and tokenizer.

A MODEL is the path of one of these:

    OUT, OUT/ckpt                  a run folder: its latest checkpoint
    OUT/ckpt/STEP                  a checkpoint
    DIR/TASK, DIR/TASK/seed-N,     a fine-tuned model; DIR/TASK must hold the model of one seed
    DIR/TASK/seed-N/model
    a Hugging Face folder          config.json and weights of an ELECTRA model, or a folder with
                                   discriminator/ and generator/, as `export` writes it

`load` returns both parts of a model for use in Python, `load_objective` the module that is trained,
`load_pretrained` the main encoder for fine-tuning, `read_checkpoint` plain tensors.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.loading import parse_config, parse_run
from electra_ds.config.schema import FactoryConfig, ModelConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.hf import from_hf, from_hf_config
from electra_ds.interop.hf_folder import is_hf_folder, read_config, read_tensors
from electra_ds.interop.hf_tokenizer import read_tokenizer
from electra_ds.interop.parts import (
    EncoderWithHead,
    main_encoder,
    part_from_hf,
    parts_of_objective,
)
from electra_ds.model.build import build_objective
from electra_ds.model.heads import GeneratorHead
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.model.weights import load_true_state, true_state
from electra_ds.training import checkpoint

CHECKPOINTS = (
    "a run folder (OUT), OUT/ckpt, OUT/ckpt/STEP, a fine-tuned model (DIR/TASK, DIR/TASK/seed-N) "
    "or, where a pretrained encoder is expected, a Hugging Face folder"
)


class ModelSource(NamedTuple):
    """Where the weights of a MODEL are.

    checkpoint: a folder with meta.json, of a run or of a fine-tuned model; or None.
    hf: Hugging Face folders by name, "discriminator" (the main encoder) and "generator".
    """

    checkpoint: Path | None
    hf: dict[str, Path]


def resolve_model(path: Path) -> ModelSource:
    """The checkpoint or the Hugging Face folders that a MODEL argument stands for.

    A single Hugging Face folder counts as "discriminator". Raises UserError when there is neither.
    """
    if is_hf_folder(path):
        return ModelSource(None, {"discriminator": path})
    parts = {part: path / part for part in ("discriminator", "generator")}
    if hf := {part: folder for part, folder in parts.items() if is_hf_folder(folder)}:
        return ModelSource(None, hf)
    return ModelSource(resolve_checkpoint(path), {})


def resolve_checkpoint(path: Path) -> Path:
    """The folder with meta.json of a run, a checkpoint or a fine-tuned model.

    Raises UserError when there is none, and when `path` holds the models of several seeds.
    """
    models = sorted(
        meta.parent
        for pattern in ("model/meta.json", "seed-*/model/meta.json")
        for meta in path.glob(pattern)
    )
    if len(models) > 1:
        raise UserError(
            f"{path}: holds the models of {len(models)} seeds; name one, such as {models[0].parent}"
        )
    return models[0] if models else checkpoint.find_checkpoint(path, CHECKPOINTS)


def checked_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer in `path`. UserError when its size is not vocab_size, the size of the model."""
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} entries, but the model was trained with {vocab_size}; "
            "give its tokenizer with --tokenizer"
        )
    return tokenizer


class Checkpoint(NamedTuple):
    """A checkpoint of the built-in encoders, read whole.

    model: sizes of the main encoder. weights: fp32 tensors by canonical name, without padded rows.
    """

    folder: Path
    meta: checkpoint.Meta
    model: ModelConfig
    weights: dict[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Meta data and all weights of a run, a checkpoint or a fine-tuned model, checked by sha256.

    Raises UserError for damaged files and for a run with modules from model.factory.
    """
    folder = resolve_checkpoint(path)
    meta = checkpoint.read_meta(folder)
    weights = checkpoint.weights(folder)
    if "embeddings.word.weight" not in weights:
        raise UserError(
            f"{folder}: expected the built-in encoder (embeddings.*, discriminator.*), found "
            f"{', '.join(sorted(weights)[:2])}, ...; for modules of your own use electra_ds.load"
        )
    model = parse_config(meta.config.get("model"), f"{folder}/meta.json: model", ModelConfig)
    return Checkpoint(folder, meta, model, weights)


def load_objective(
    folder: Path, device: torch.device | str = "cpu", trust_code: bool = False
) -> tuple[Objective, RunConfig]:
    """The objective (both encoders with their heads) of a pretraining checkpoint, and its config.

    folder: a checkpoint, as `find_checkpoint` returns it. The module is in fp32 and eval mode.
    trust_code: run the code that model.factory names; without it such a checkpoint is refused
    with a UserError.
    """
    meta = checkpoint.read_meta(folder)
    config = parse_run(meta.config, f"{folder}/meta.json")
    if isinstance(config.model, FactoryConfig) and not trust_code:
        raise UserError(
            f"{folder}: model.factory = {config.model.factory!r} builds this model; its code is "
            "not run by default; if you trust it, give --trust-code (Python: trust_code=True)"
        )
    module = build_objective(config, seed=0)
    load_true_state(module, checkpoint.weights(folder))
    return module.to(device).eval(), config


class Pretrained(NamedTuple):
    """A main encoder without heads.

    state: fp32 tensors without padded rows, named embeddings.* and discriminator.*.
    origin: a description of the source for reports.
    """

    model: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    origin: str


def load_pretrained(path: Path, tokenizer: Path | None = None) -> Pretrained:
    """The main encoder (ELECTRA's discriminator) of a MODEL, with its tokenizer.

    tokenizer: needed when there is none beside the weights. Raises UserError when there is no such
    encoder, or when the sizes of model and tokenizer differ.
    """
    source = resolve_model(path)
    if source.checkpoint is None:
        # A generator's folder has the sizes of another encoder.
        if (folder := source.hf.get("discriminator")) is None:
            raise UserError(f"{path}: found only generator/; expected discriminator/ beside it")
        model, _ = from_hf_config(read_config(folder))
        with torch.device("meta"):
            names = true_state(main_encoder(model))
        state = from_hf(read_tensors(folder), names, "discriminator")
        origin, vocabulary = f"Hugging Face folder {folder}", folder
    else:
        found = read_checkpoint(source.checkpoint)
        model = found.model
        prefixes = ("embeddings.", "discriminator.")
        state = {name: t for name, t in found.weights.items() if name.startswith(prefixes)}
        origin = f"{found.folder}, step {found.meta.state.step}"
        vocabulary = checkpoint.tokenizer_of(found.folder)
    words = checked_tokenizer(tokenizer or vocabulary, model.vocab_size)
    return Pretrained(model, state, words, origin)


class LoadedModel(NamedTuple):
    """Both parts of a model, in fp32 and eval mode; None for a part that the MODEL does not have.

    discriminator, generator: `EncoderWithHead`, called with input_ids [B, S]; its `encode` returns
        hidden states [B, S, H]. A fine-tuned model has a discriminator without a head. A run with
        model.factory returns that factory's modules.
    config: the RunConfig of a run; otherwise a dict, the config in meta.json of a fine-tuned model
        or the config.json of a Hugging Face folder (of the discriminator, if it has both).
    max_length: most tokens of a row, [CLS] and [SEP] included.
    """

    discriminator: nn.Module | None
    generator: nn.Module | None
    tokenizer: Tokenizer
    config: RunConfig | dict[str, Any]
    max_length: int

    def input_ids(self, texts: list[str]) -> Tensor:
        """Token ids [B, S] int64 of texts cut to max_length: [CLS] text [SEP], then padding.

        texts: B texts, at least one. S is the length of the longest row.
        """
        token_ids = self.tokenizer.encode_batch(texts)
        cut = [ids[: self.max_length - 2] for ids in token_ids]
        return rows_of_token_ids(cut, self.tokenizer.special_ids)


def load(
    model: str | Path, tokenizer: str | Path | None = None, trust_code: bool = False
) -> LoadedModel:
    """Load a MODEL for use in Python: discriminator, generator, tokenizer and config.

    model: a run folder, a checkpoint, a fine-tuned model or a Hugging Face folder. A Hugging Face
        folder with a language-modelling head is returned as the generator.
    tokenizer: folder or file of the vocabulary, when it is not beside the weights.
    trust_code: run the code that model.factory of a checkpoint names.
    Raises UserError if there is no model in `model`, if its tokenizer is missing or does not fit,
    and for a model.factory without trust_code.
    """
    source = resolve_model(Path(model))
    words = None if tokenizer is None else Path(tokenizer)
    if source.checkpoint is None:
        return _load_hf(source.hf, words)
    meta = checkpoint.read_meta(source.checkpoint)
    if "task" in meta.config:
        return _load_fine_tuned(source.checkpoint, words)
    return _load_run(source.checkpoint, words, trust_code)


def _load_run(folder: Path, tokenizer: Path | None, trust_code: bool) -> LoadedModel:
    module, config = load_objective(folder, trust_code=trust_code)
    vocabulary = tokenizer or checkpoint.tokenizer_of(folder)
    words = checked_tokenizer(vocabulary, config.model.vocab_size)
    parts: tuple[nn.Module, nn.Module | None]
    if isinstance(module, ElectraObjective):
        parts = parts_of_objective(module, words.special_ids.pad)
    else:
        modules = dict(module.named_children())
        parts = (modules["discriminator"], modules.get("generator"))
    return _loaded(*parts, words, config, config.data.sequence_length)


def _load_fine_tuned(folder: Path, tokenizer: Path | None) -> LoadedModel:
    found = load_pretrained(folder, tokenizer)
    modules = main_encoder(found.model)
    load_true_state(modules, found.state)
    encoder = EncoderWithHead(
        modules["embeddings"], modules["discriminator"], None, found.tokenizer.special_ids.pad
    )
    config = checkpoint.read_meta(folder).config
    return _loaded(encoder, None, found.tokenizer, config, found.model.max_positions)


def _load_hf(folders: dict[str, Path], tokenizer: Path | None) -> LoadedModel:
    configs = {part: read_config(folder) for part, folder in folders.items()}
    config = next(iter(configs.values()))
    first = next(iter(folders.values()))
    words = checked_tokenizer(tokenizer or first, config["vocab_size"])
    parts: dict[str, nn.Module] = {}
    for part, folder in folders.items():
        sizes, _ = from_hf_config(configs[part])
        encoder = part_from_hf(sizes, read_tensors(folder), words.special_ids.pad)
        # `export` writes a main encoder that predicts tokens as a folder named discriminator.
        is_alone = len(folders) == 1 and folder.name != "discriminator"
        if is_alone and isinstance(encoder.head, GeneratorHead):
            part = "generator"
        parts[part] = encoder
    max_length = config["max_position_embeddings"]
    return _loaded(parts.get("discriminator"), parts.get("generator"), words, config, max_length)


def _loaded(
    discriminator: nn.Module | None,
    generator: nn.Module | None,
    tokenizer: Tokenizer,
    config: RunConfig | dict[str, Any],
    max_length: int,
) -> LoadedModel:
    for part in (discriminator, generator):
        if part is not None:
            part.eval()
    return LoadedModel(discriminator, generator, tokenizer, config, max_length)


def rows_of_token_ids(token_ids: list[list[int]], special_ids: SpecialIds) -> Tensor:
    """Rows `[CLS] ids [SEP]` padded to the longest: [B, S] int64."""
    length = max(map(len, token_ids)) + 2
    rows = torch.full((len(token_ids), length), special_ids.pad)
    for row, ids in zip(rows, token_ids, strict=True):
        row[: len(ids) + 2] = torch.tensor([special_ids.cls, *ids, special_ids.sep])
    return rows
