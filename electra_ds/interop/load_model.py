"""Where does a pretrained encoder come from? Our runs and checkpoints, fine-tuned models, Hugging Face folders."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.config.schema import FactoryConfig, ModelConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.hf import from_hf, from_hf_config
from electra_ds.interop.hf_folder import is_hf_folder, read_config, read_tensors
from electra_ds.interop.hf_tokenizer import read_tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.encoder import Embeddings, Encoder
from electra_ds.model.objective import Objective
from electra_ds.model.weights import load_true_state, true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint, tokenizer_of


def load_module(
    path: Path, device: torch.device | str = "cpu", trust_code: bool = False
) -> tuple[Objective, RunConfig]:
    """The objective of a checkpoint in fp32 and eval mode, with the config that made it.

    trust_code: a checkpoint that names a model.factory may run that code; otherwise it is refused (UserError).
    """
    meta = checkpoint.read_meta(path)
    config = parse_run(meta.config, f"{path}/meta.json")
    if isinstance(config.model, FactoryConfig) and not trust_code:
        raise UserError(
            f"{path}: its model is made by model.factory = {config.model.factory!r}; reading a checkpoint runs no code "
            "unless told to: give --trust-code if you know that module"
        )
    module = build_objective(config, seed=0)
    load_true_state(module, checkpoint.weights(path))
    return module.to(device).eval(), config


class Pretrained(NamedTuple):
    """A main encoder without heads. state: fp32, true rows, names embeddings.* and discriminator.*"""

    model: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    origin: str


def load_pretrained(path: Path, tokenizer: Path | None = None) -> Pretrained:
    """The main encoder (ELECTRA's discriminator) of `path` with the tokenizer it was trained with.

    path: a run folder (its latest checkpoint), a checkpoint, a fine-tuned model, a folder that `export` wrote, or a
    Hugging Face ELECTRA folder of any class. tokenizer: where it is not found beside the weights.
    Raises UserError when there is no such encoder, or when the tokenizer has another number of entries.
    """
    if (
        found := next((p for p in (path, path / "discriminator") if is_hf_folder(p)), None)
    ) is not None:
        config = read_config(found)
        model, _ = from_hf_config(config)
        with torch.device("meta"):
            parts = {
                "embeddings": Embeddings(model, model.embedding_size, 0.0),
                "discriminator": Encoder(model, model.embedding_size, model.layer_norm_eps),
            }
        state = from_hf(read_tensors(found), true_state(nn.ModuleDict(parts)), "discriminator")
        origin, beside = f"Hugging Face folder {found}", found
    else:
        found, meta, state = read_trained(path)
        state = {
            name: value
            for name, value in state.items()
            if name.startswith(("embeddings.", "discriminator."))
        }
        model = ModelConfig.model_validate(meta.config["model"])
        origin, beside = f"{found}, step {meta.state.step}", tokenizer_of(found)
    return Pretrained(
        model, state, checked_tokenizer(tokenizer or beside, model.vocab_size), origin
    )


def find_trained(path: Path) -> Path:
    """The checkpoint of a run, or of a fine-tuned model: DIR/TASK (its one kept seed), DIR/TASK/seed-N, .../model."""
    kept = sorted(
        meta.parent
        for pattern in ("", "seed-*/")
        for meta in path.glob(f"{pattern}model/meta.json")
    )
    if len(kept) > 1:
        raise UserError(
            f"{path}: holds the models of {len(kept)} seeds; name one, such as {kept[0].parent}"
        )
    expected = (
        "a run folder (OUT), OUT/ckpt, OUT/ckpt/STEP, a fine-tuned model (DIR/TASK, DIR/TASK/seed-N) or, where "
        "a pretrained encoder is asked for, a Hugging Face folder"
    )
    return kept[0] if kept else find_checkpoint(path, expected)


def read_trained(path: Path) -> tuple[Path, checkpoint.Meta, dict[str, Tensor]]:
    """(checkpoint folder, its meta.json, all weights) of a run, a checkpoint or a fine-tuned model of our encoders."""
    found = find_trained(path)
    meta, weights = checkpoint.read_meta(found), checkpoint.weights(found)
    if "embeddings.word.weight" not in weights:
        raise UserError(
            f"{found}: expected the built-in encoder (embeddings.*, discriminator.*), found "
            f"{', '.join(sorted(weights)[:2])}, ...; modules of your own are yours to load"
        )
    return found, meta, weights


def checked_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `path`; UserError when it has not as many entries as the word table."""
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} entries, but the model was trained with {vocab_size}; give "
            "its tokenizer with --tokenizer"
        )
    return tokenizer
