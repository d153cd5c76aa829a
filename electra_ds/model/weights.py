"""Parameters by canonical name, without the rows that only pad a table in memory."""

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError


def padded_rows(module: nn.Module) -> dict[str, int]:
    """Parameter name -> true rows, for the parameters whose first axis is padded in memory."""
    return {
        f"{prefix}.{name}" if prefix else name: rows
        for prefix, part in module.named_modules()
        for name, rows in getattr(part, "true_rows", {}).items()
    }


def true_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by canonical name, detached views without padded rows; a shared tensor once."""
    rows = padded_rows(module)
    return {name: p.detach()[: rows.get(name, len(p))] for name, p in module.named_parameters()}


@torch.no_grad()
def load_true_state(module: nn.Module, state: dict[str, Tensor], partial: bool = False) -> None:
    """Copy tensors of true rows into module. UserError names what is missing, unknown or of another shape."""
    own = true_state(module)
    missing = [] if partial else sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        raise UserError(
            f"weights do not fit: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}"
        )
    for name, value in state.items():
        found, expected = tuple(value.shape), tuple(own[name].shape)
        if found != expected:
            raise UserError(f"weights: {name} has shape {found}, the model expects {expected}")
        own[name].copy_(value)
