"""Parameter groups, state by parameter, and Adam with or without bias correction."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from electra_ds.config.schema import AdamConfig

# From this step on 1 - beta**step is exactly 1.0 in fp32, so torch's fused kernel applies no bias
# correction (tested).
NO_BIAS_CORRECTION_STEP = 2**20
# Tensors of the optimizer's state for each parameter, by their names in checkpoints.
MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    muon: Container[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay for matrices and embeddings, none for vectors.

    Vectors (fewer than two axes) are biases and LayerNorm weights. Frozen parameters are left out.
    lr_scale: parameter name -> factor of its learning rate. Each group has one factor, stored under
        the key "lr_scale". The key "is_vector" is whether the group has no weight decay.
    muon: names of the parameters that Muon updates. They have groups of their own ("is_muon").
    """
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector, scale, is_muon = parameter.ndim < 2, lr_scale(name), name in muon
        group = groups.setdefault(
            (is_vector, scale, is_muon),
            {
                "params": [],
                "weight_decay": 0.0 if is_vector else weight_decay,
                "lr_scale": scale,
                "is_vector": is_vector,
                "is_muon": is_muon,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with or without bias correction (ELECTRA, appendix A).

    Without bias correction the step count starts at NO_BIAS_CORRECTION_STEP. The state of a
    parameter is created at its first step, because ZeRO replaces the parameters after construction.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdamConfig):
        # lr 0: some DeepSpeed stages run a step in initialize, which must not change the weights.
        betas = (config.beta1, config.beta2)
        super().__init__(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
        self.bias_correction = config.bias_correction

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for parameter in group["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                make_state(self, parameter, 0, self.bias_correction)
        return super()._init_group(group, *args, **kwargs)


def moments_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the moments of the parameters in a group of `parameter_groups`."""
    return MUON_MOMENTS if group["is_muon"] else MOMENTS


def make_state(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    applied_steps: int,
    bias_correction: bool,
    moments: tuple[str, ...] = MOMENTS,
) -> None:
    """Set the moments of one parameter to zero, and its step count. Under ZeRO: of one flat shard.

    applied_steps: optimizer steps that the run has applied. The state of Muon has no step count.
    moments: see `moments_of`.
    """
    zeros = {
        name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in moments
    }
    if moments == MUON_MOMENTS:
        optimizer.state[parameter] = zeros
        return
    step: Any = applied_steps + (0 if bias_correction else NO_BIAS_CORRECTION_STEP)
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.tensor(float(step), device=parameter.device)
    optimizer.state[parameter] = {"step": step, **zeros}
