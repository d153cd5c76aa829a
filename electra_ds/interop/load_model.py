"""MODEL arguments: the accepted paths, and loading of their weights and tokenizer.

A MODEL is the path of one of these:

    OUT, OUT/ckpt                  a run folder: its latest checkpoint
    OUT/ckpt/STEP                  a checkpoint
    DIR/TASK, DIR/TASK/seed-N,     a fine-tuned model; DIR/TASK must hold the model of one seed
    DIR/TASK/seed-N/model
    a Hugging Face folder          config.json and weights of an ELECTRA, ModernBERT or DeBERTa-v2
                                   model, or discriminator/ and generator/ in it, as `export`
                                   writes it

`load` returns both parts of a model for use in Python, `load_objective` the module that is trained,
`load_pretrained` the main encoder for fine-tuning, `read_checkpoint` plain tensors.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import reading
from electra_ds.common.special_ids import SpecialIds
from electra_ds.common.urls import check_local
from electra_ds.config.architectures import ModelConfig
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.interop.average import average_of
from electra_ds.interop.checkpoints import (
    CHECKPOINTS,
    check_run,
    read_checkpoint,
    resolve_checkpoint,
)
from electra_ds.interop.hf_folder import is_hf_folder, read_config, read_folder, stated_length
from electra_ds.interop.parts import (
    EncoderWithHead,
    encoder_from_hf,
    main_encoder,
    part_from_hf,
    parts_of_objective,
)
from electra_ds.interop.vocabularies import (
    checked_tokenizer,
    tokenizer_of_model,
)
from electra_ds.model.build import build_objective
from electra_ds.model.heads import MaskedLMHead
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.model.weights import check_values, load_true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint_config import config_of_weights


class ModelSource(NamedTuple):
    """Where the weights of a MODEL are.

    checkpoint: a folder with meta.json, of a run or of a fine-tuned model; or None.
    hf: Hugging Face folders by name, "discriminator" (the main encoder) and "generator".
    """

    checkpoint: Path | None
    hf: dict[str, Path]


def resolve_model(path: Path, expected: str = CHECKPOINTS) -> ModelSource:
    """The checkpoint or the Hugging Face folders that a MODEL argument stands for.

    expected: description of the accepted folders, for the error message.
    A single Hugging Face folder counts as "discriminator". Raises UserError when there is neither,
    and when the path cannot be read.
    """
    with reading(path, expected):
        if is_hf_folder(path):
            return ModelSource(None, {"discriminator": path})
        parts = {part: path / part for part in ("discriminator", "generator")}
        if hf := {part: folder for part, folder in parts.items() if is_hf_folder(folder)}:
            return ModelSource(None, hf)
    return ModelSource(resolve_checkpoint(path, expected), {})


def load_objective(
    folder: Path, device: torch.device | str = "cpu", trust_code: bool = False
) -> tuple[Objective, RunConfig]:
    """The objective (both encoders with their heads) of a pretraining checkpoint, and its config:
    that of its phase.

    folder: a checkpoint, as `find_checkpoint` returns it. The module is in fp32 and eval mode.
    trust_code: run the code that model.factory names; without it such a checkpoint is refused
    with a UserError. UserError also for weights that do not fit the config or are not finite.
    """
    meta = checkpoint.read_meta(folder)
    if "task" in meta.config:
        raise UserError(f"{folder}: a fine-tuned model; expected the checkpoint of a pretraining")
    config = config_of_weights(meta, f"{folder}/meta.json")
    if isinstance(config.model, FactoryConfig) and not trust_code:
        raise UserError(
            f"{folder}: model.factory = {config.model.factory!r} builds this model; its code is "
            "not run by default; if you trust it, give --trust-code (Python: trust_code=True)"
        )
    weights = checkpoint.weights(folder)
    if isinstance(config.model, FactoryConfig):
        check_values(weights, str(folder))
    else:
        check_run(config, weights, folder)
    module = build_objective(config, seed=0)
    load_true_state(module, weights)
    return module.to(device).eval(), config


class Pretrained(NamedTuple):
    """A main encoder without heads.

    state: fp32 tensors without padded rows, named embeddings.* and discriminator.*.
    origin: a description of the source for reports.
    trained_length: tokens of a row in pretraining; None if it is not known.
    trained_segments: token types that the pretraining run trained; None if it is not known.
    """

    model: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    origin: str
    trained_length: int | None = None
    trained_segments: int | None = None


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
        read_config(folder)  # a model of another type often has another kind of vocabulary
        content = read_folder(folder, load_tokenizer(tokenizer or folder).vocab_size)
        model, _ = content.format.parse(content.config, where=f"{folder}/config.json")
        state = encoder_from_hf(model, content, str(folder))
        words = checked_tokenizer(tokenizer or folder, model.vocab_size)
        length = stated_length(folder)
        trained = length if length is not None and length < model.max_positions else None
        return Pretrained(model, state, words, f"Hugging Face folder {folder}", trained)
    found = read_checkpoint(source.checkpoint)
    prefixes = ("embeddings.", "discriminator.")
    state = {name: t for name, t in found.weights.items() if name.startswith(prefixes)}
    steps = found.meta.state.step
    averaged = average_of(found.folder) if found.run is not None and steps == 0 else None
    trained = found.fine_tuned.trained_length if found.fine_tuned else None
    # An imported model, at step 0, was pretrained elsewhere.
    if found.run is not None and (steps > 0 or (averaged and averaged.is_trained)):
        trained = found.run.data.sequence_length
    origin = f"{found.folder}, step {steps}"
    segments = found.trained_segments()
    if averaged is not None:
        origin = f"{found.folder}, average of {len(averaged.checkpoints)} checkpoints"
        segments = averaged.trained_segments
    return Pretrained(found.model, state, found.tokenizer(tokenizer), origin, trained, segments)


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
    check_local(model, "model")
    check_local(tokenizer or "", "tokenizer")
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
    words = tokenizer_of_model(folder, tokenizer, config.model.vocab_size, config.data.special_ids)
    parts: tuple[nn.Module, nn.Module | None]
    if isinstance(module, ElectraObjective):
        parts = parts_of_objective(module, words.special_ids.pad)
    else:
        modules = dict(module.named_children())
        parts = (modules["discriminator"], modules.get("generator"))
    return _loaded(*parts, words, config, config.data.sequence_length)


def _load_fine_tuned(folder: Path, tokenizer: Path | None) -> LoadedModel:
    found = read_checkpoint(folder)
    words = found.tokenizer(tokenizer)
    modules = main_encoder(found.model)
    encoder_state = {name: t for name, t in found.weights.items() if not name.startswith("head.")}
    load_true_state(modules, encoder_state)
    encoder = EncoderWithHead(
        modules["embeddings"], modules["discriminator"], None, words.special_ids.pad
    )
    return _loaded(encoder, None, words, found.meta.config, found.max_length)


def _load_hf(folders: dict[str, Path], tokenizer: Path | None) -> LoadedModel:
    first = next(iter(folders.values()))
    read_config(first)  # a model of another type often has another kind of vocabulary
    entries = load_tokenizer(tokenizer or first).vocab_size
    contents = {part: read_folder(folder, entries) for part, folder in folders.items()}
    main = next(iter(contents.values()))
    model, _ = main.format.parse(main.config, where=f"{first}/config.json")
    words = checked_tokenizer(tokenizer or first, model.vocab_size)
    parts: dict[str, nn.Module] = {}
    for part, folder in folders.items():
        content = contents[part]
        sizes, _ = content.format.parse(content.config, where=f"{folder}/config.json")
        encoder = part_from_hf(sizes, content, words.special_ids.pad, str(folder))
        # `export` writes a main encoder that predicts tokens as a folder named discriminator.
        is_alone = len(folders) == 1 and folder.name != "discriminator"
        if is_alone and isinstance(encoder.head, MaskedLMHead):
            part = "generator"
        parts[part] = encoder
    max_length = min(stated_length(first) or model.max_positions, model.max_positions)
    found = parts.get("discriminator"), parts.get("generator")
    return _loaded(*found, words, main.config, max_length)


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
