"""Reading of TensorFlow checkpoints of the ELECTRA authors' code, and their variable names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_small
from electra_ds.interop.hf_electra import ElectraFormat

ELECTRA = ElectraFormat()
MAX_STATE_BYTES = 1 << 20  # of the file `checkpoint`
# A variable has the name of Hugging Face's parameter, with "/" for "." and these changes.
DIFFERENCES = {
    r"^generator_lm_head\.bias$": "generator_predictions.output_bias",
    r"\.dense_prediction\.": ".dense_1.",
    r"\.layer\.(\d+)": r".layer_\1",
    r"LayerNorm\.weight$": "LayerNorm.gamma",
    r"LayerNorm\.bias$": "LayerNorm.beta",
    r"_embeddings\.weight$": "_embeddings",
    r"\.weight$": ".kernel",
}


def tf_names(name: str) -> tuple[str, ...]:
    """The variables that hold one of our parameters: one, or three for a fused qkv."""
    names = list(ELECTRA.foreign_names(name))
    if name.startswith(("generator.", "generator_embeddings.")):
        names = [foreign.replace("electra.", "generator.", 1) for foreign in names]
    for pattern, replacement in DIFFERENCES.items():
        names = [re.sub(pattern, replacement, foreign) for foreign in names]
    return tuple(foreign.replace(".", "/") for foreign in names)


def as_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Variables as tensors under the same names; kernels are transposed to [out, in]."""
    tensors = {}
    for name, value in variables.items():
        tensor = torch.from_numpy(np.array(value))
        tensors[name] = tensor.T.contiguous() if name.endswith("/kernel") else tensor
    return tensors


def find_tf(path: Path) -> Path | None:
    """The prefix of a TensorFlow checkpoint, or None.

    `path` is the prefix itself or a folder. In a folder, the file `checkpoint` names the prefix, or
    there is only one. UserError when there are several.
    """
    if Path(f"{path}.index").is_file():
        return path
    prefixes = {file.with_suffix("") for file in path.glob("*.index")}
    if (path / "checkpoint").is_file() and prefixes:
        text = read_small(path / "checkpoint", "the names of checkpoints", MAX_STATE_BYTES)
        line = re.search(r'model_checkpoint_path: "(.*)"', text.decode(errors="replace"))
        named = {prefix for prefix in prefixes if line and prefix.name == Path(line[1]).name}
        prefixes = named or prefixes
    if len(prefixes) > 1:
        listed = ", ".join(sorted(map(str, prefixes)))
        raise UserError(f"{path}: several checkpoints; give one of {listed}")
    return prefixes.pop() if prefixes else None


def read_tf(prefix: Path) -> dict[str, Tensor]:
    """`as_tensors` of all variables. Raises UserError when tensorflow (extra [tf]) is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from tensorflow.train import load_checkpoint
    except ImportError:
        raise UserError(
            f"{prefix}: reading a TensorFlow checkpoint needs tensorflow: "
            "pip install 'electra_ds[tf]'"
        ) from None
    try:
        reader = load_checkpoint(str(prefix))
        names = sorted(reader.get_variable_to_shape_map())
        return as_tensors({name: reader.get_tensor(name) for name in names})
    except Exception as error:  # tensorflow raises classes of its own for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{prefix}: cannot be read as a TensorFlow checkpoint ({reason})") from None


def sizes_of(
    variables: Mapping[str, Tensor], head_width: int = 64
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(fields of ModelConfig, fields of GeneratorConfig or None), read from the tensors' shapes.

    head_width: hidden size of one attention head, which the shapes do not determine.
    Raises UserError when there is no ELECTRA encoder among the variables.
    """
    model = _encoder_sizes(variables, "electra", head_width)
    generator = _encoder_sizes(variables, "generator", head_width)
    if model is None:
        raise UserError(
            "TensorFlow checkpoint: no variable electra/encoder/layer_0/...; expected ELECTRA"
        )
    sharing = "shared"
    if "generator/embeddings/word_embeddings" in variables:
        sharing = "untied"
    elif generator is None and "generator_predictions/output_bias" in variables:
        sharing = "all"  # both parts use one encoder
        generator = dict(model)
    tables = {"vocab_size": "word", "max_positions": "position", "type_vocab_size": "token_type"}
    for field, table in tables.items():
        rows, width = _matrix(variables, f"electra/embeddings/{table}_embeddings")
        model[field] = rows
        model["embedding_size"] = width
    return model | {"sharing": sharing}, generator


def _encoder_sizes(
    variables: Mapping[str, Tensor], scope: str, head_width: int
) -> dict[str, Any] | None:
    """Sizes of the encoder in a variable scope, or None when it has no layers."""
    pattern = re.compile(rf"{scope}/encoder/layer_(\d+)/")
    layers = {match[1] for match in map(pattern.match, variables) if match}
    if not layers:
        return None
    ffn, hidden = _matrix(variables, f"{scope}/encoder/layer_0/intermediate/dense/kernel")
    return {
        "hidden_size": hidden,
        "num_layers": len(layers),
        "ffn_size": ffn,
        "num_heads": max(1, hidden // head_width),
    }


def _matrix(variables: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a variable. UserError when it is missing or no matrix."""
    shape = tuple(variables[name].shape) if name in variables else ()
    if len(shape) != 2:
        found = f"has the shape {shape}" if shape else "is missing"
        raise UserError(f"TensorFlow checkpoint: {name} {found}; expected a matrix")
    return shape[0], shape[1]
