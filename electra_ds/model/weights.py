"""Parameters by canonical name, without the rows that pad a table in memory."""

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError


def padded_rows(module: nn.Module) -> dict[str, int]:
    """Return the true number of rows of each parameter that is padded in memory, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: rows
        for prefix, part in module.named_modules()
        for name, rows in getattr(part, "true_rows", {}).items()
    }


def true_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by canonical name, as detached views without padded rows.

    A shared tensor occurs once.
    """
    rows = padded_rows(module)
    return {name: p.detach()[: rows.get(name, len(p))] for name, p in module.named_parameters()}


@torch.no_grad()
def load_true_state(module: nn.Module, state: dict[str, Tensor], partial: bool = False) -> None:
    """Copy tensors without padded rows into module.

    partial: parameters that `state` lacks keep their values
    Raises UserError with the names that are missing, unknown or of another shape.
    """
    parameters = true_state(module)
    missing = [] if partial else sorted(parameters.keys() - state.keys())
    unknown = sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise UserError(
            f"weights do not fit: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}"
        )
    for name, value in state.items():
        shape, expected = tuple(value.shape), tuple(parameters[name].shape)
        if shape != expected:
            raise UserError(f"weights: {name} has shape {shape}, the model expects {expected}")
        parameters[name].copy_(value)
