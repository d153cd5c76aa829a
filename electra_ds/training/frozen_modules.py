"""Modules that do not train: their copy on the device, and the values that checkpoints hold."""

import torch
from torch import Tensor, nn

from electra_ds.model.weights import load_true_state, true_state


class FrozenModules:
    """Modules on a device in a dtype, set tensor by tensor.

    values: canonical name -> tensor without padded rows. Where they are saved, these are the fp32
        values: the modules' own tensors in fp32, otherwise a copy on the CPU. On other ranks they
        are the modules' own tensors in any dtype.
    """

    def __init__(
        self, modules: nn.Module, device: torch.device, dtype: torch.dtype, *, is_saved: bool
    ) -> None:
        """Move the modules. is_saved: whether this rank writes `values` to checkpoints."""
        self._modules = modules
        self._has_copies = is_saved and dtype != torch.float32
        copies = {}
        if self._has_copies:
            copies = {name: value.float().clone() for name, value in true_state(modules).items()}
        modules.to(device, dtype)
        self.values: dict[str, Tensor] = copies or true_state(modules)

    def set(self, name: str, value: Tensor) -> None:
        """Set one tensor. value: fp32, without padded rows."""
        load_true_state(self._modules, {name: value}, partial=True)
        if self._has_copies:
            self.values[name].copy_(value)
