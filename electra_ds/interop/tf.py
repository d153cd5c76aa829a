"""TensorFlow variable names of the authors' code -> ours."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.interop.hf import hf_names

# A name of Hugging Face is the authors' with dots for slashes, but for these.
OTHERWISE = {
    r"^generator_lm_head\.bias$": "generator_predictions.output_bias",
    r"\.dense_prediction\.": ".dense_1.",
    r"\.layer\.(\d+)": r".layer_\1",
    r"LayerNorm\.weight$": "LayerNorm.gamma",
    r"LayerNorm\.bias$": "LayerNorm.beta",
    r"_embeddings\.weight$": "_embeddings",
    r"\.weight$": ".kernel",
}


def tf_names(name: str) -> tuple[str, ...]:
    """The variables behind one of our parameters: one, or three for a fused qkv."""
    found = hf_names(name)
    if name.startswith(("generator.", "generator_embeddings.")):
        found = [foreign.replace("electra.", "generator.", 1) for foreign in found]
    for pattern, theirs in OTHERWISE.items():
        found = [re.sub(pattern, theirs, foreign) for foreign in found]
    return tuple(foreign.replace(".", "/") for foreign in found)


def as_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Variables as tensors under their own names; kernels transposed, so that matrices are [out, in]."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in variables.items()}
    return {
        name: t.T.contiguous() if name.endswith("/kernel") else t for name, t in tensors.items()
    }


def find_tf(path: Path) -> Path | None:
    """The prefix of a TensorFlow checkpoint: path itself, what the folder's `checkpoint` names, or its only one."""
    if Path(f"{path}.index").is_file():
        return path
    prefixes = {file.with_suffix("") for file in path.glob("*.index")}
    if (path / "checkpoint").is_file() and prefixes:
        named = re.search(r'model_checkpoint_path: "(.*)"', (path / "checkpoint").read_text())
        prefixes = {
            prefix for prefix in prefixes if named and prefix.name == Path(named[1]).name
        } or prefixes
    if len(prefixes) > 1:
        raise UserError(
            f"{path}: several checkpoints; give one of {', '.join(sorted(map(str, prefixes)))}"
        )
    return prefixes.pop() if prefixes else None


def read_tf(prefix: Path) -> dict[str, Tensor]:
    """`as_tensors` of every variable of a TensorFlow checkpoint."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from tensorflow.train import load_checkpoint
    except ImportError:
        raise UserError(
            f"{prefix}: a TensorFlow checkpoint, and tensorflow is not installed: pip install 'electra_ds[tf]'"
        ) from None
    reader = load_checkpoint(str(prefix))
    return as_tensors(
        {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}
    )


def sizes_of(variables: Mapping[str, Tensor], head_width: int = 64) -> tuple[dict, dict | None]:
    """(fields of ModelConfig, fields of GeneratorConfig or None) from the shapes; heads = hidden / head_width."""
    has_untied = "generator/embeddings/word_embeddings" in variables

    def encoder(scope: str) -> dict | None:
        layers = {
            int(m[1])
            for name in variables
            if (m := re.match(rf"{scope}/encoder/layer_(\d+)/", name))
        }
        if not layers:
            return None
        ffn, hidden = variables[f"{scope}/encoder/layer_0/intermediate/dense/kernel"].shape
        return {
            "hidden_size": hidden,
            "num_layers": len(layers),
            "ffn_size": ffn,
            "num_heads": max(1, hidden // head_width),
        }

    model, generator = encoder("electra"), encoder("generator")
    if model is None:
        raise UserError(
            "TensorFlow checkpoint: no variable electra/encoder/layer_0/...; is it one of ELECTRA?"
        )
    is_one = (
        generator is None and "generator_predictions/output_bias" in variables
    )  # all weights tied
    tables = {
        key: variables[f"electra/embeddings/{table}_embeddings"].shape
        for key, table in (
            ("vocab_size", "word"),
            ("max_positions", "position"),
            ("type_vocab_size", "token_type"),
        )
    }
    model |= {
        "embedding_size": tables["vocab_size"][1],
        **{key: shape[0] for key, shape in tables.items()},
        "sharing": "untied" if has_untied else "all" if is_one else "shared",
    }
    return model, encoder("electra") if is_one else generator
