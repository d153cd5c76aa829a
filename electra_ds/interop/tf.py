"""TensorFlow variable names of the authors' code -> ours."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from electra_ds.errors import UserError

PARTS = {
    "embeddings": "electra/embeddings",
    "generator_embeddings": "generator/embeddings",
    "generator": "generator",
    "generator_head": "generator_predictions",
    "discriminator": "electra",
    "discriminator_head": "discriminator_predictions",
}
MODULES = {
    "word": ("word_embeddings",),
    "position": ("position_embeddings",),
    "token_type": ("token_type_embeddings",),
    "norm": ("LayerNorm",),
    "project": ("embeddings_project",),
    "dense": ("dense",),
    "classify": ("dense_1",),
    "qkv": ("attention/self/query", "attention/self/key", "attention/self/value"),
    "out": ("attention/output/dense",),
    "attention_norm": ("attention/output/LayerNorm",),
    "ffn_in": ("intermediate/dense",),
    "ffn_out": ("output/dense",),
    "ffn_norm": ("output/LayerNorm",),
}
SKIPPED = re.compile(r"(/adam_[mv]$|(^|/)global_step$)")  # optimizer state


def tf_names(name: str) -> tuple[str, ...]:
    """The variables behind one of our parameters: one, or three for a fused qkv."""
    if name == "generator_head.bias":
        return ("generator_predictions/output_bias",)
    part, *layer, module, kind = name.split(".")
    prefix = PARTS[part] + (f"/encoder/layer_{layer[1]}" if layer else "")
    if module in ("word", "position", "token_type"):
        suffix = ""
    elif module.endswith("norm"):
        suffix = {"weight": "/gamma", "bias": "/beta"}[kind]
    else:
        suffix = {"weight": "/kernel", "bias": "/bias"}[kind]
    return tuple(f"{prefix}/{foreign}{suffix}" for foreign in MODULES[module])


def from_tf(variables: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, Tensor]:
    """Our tensors (true rows, fp32) of the given parameter names from variables by TensorFlow name.

    Kernels are transposed. UserError when a variable is missing, or one is left over that is no optimizer state.
    """
    state, left = {}, {name for name in variables if not SKIPPED.search(name)}
    for name in names:
        foreign = tf_names(name)
        missing = [f for f in foreign if f not in variables]
        if missing:
            raise UserError(
                f"TensorFlow checkpoint: no variable {missing[0]} for {name}; are the sizes of the config right?"
            )
        left.difference_update(foreign)
        parts = [torch.tensor(np.asarray(variables[f]), dtype=torch.float32) for f in foreign]
        state[name] = torch.cat(
            [p.T if f.endswith("/kernel") else p for f, p in zip(foreign, parts, strict=True)]
        ).contiguous()
    if left:
        raise UserError(f"TensorFlow checkpoint: {len(left)} variables fit nowhere, first {sorted(left)[0]}")
    return state
