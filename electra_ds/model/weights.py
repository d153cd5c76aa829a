"""Parameters by canonical name, without the rows that pad a table in memory."""

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError


def padded_rows(module: nn.Module) -> dict[str, int]:
    """Return {name: rows without padding} of the parameters that are padded in memory."""
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
    """Copy tensors without padded rows into the parameters of module.

    state:   canonical name -> tensor
    partial: allow missing names; these parameters keep their values
    Raises UserError when names are missing or unknown, or a shape differs. Tensors before the first
    wrong shape are copied already.
    """
    parameters = true_state(module)
    missing = [] if partial else sorted(parameters.keys() - state.keys())
    unknown = sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise UserError(
            f"the weights do not fit the model: missing {missing[:3] or 'none'}, unknown "
            f"{unknown[:3] or 'none'} (the first three names of each)"
        )
    for name, value in state.items():
        shape, expected = tuple(value.shape), tuple(parameters[name].shape)
        if shape != expected:
            raise UserError(f"weights: {name} has shape {shape}, the model expects {expected}")
        parameters[name].copy_(value)
