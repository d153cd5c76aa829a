"""How do weights move? Parameter groups, the schedule, and Adam with or without bias correction."""

from collections.abc import Callable

import torch
from torch import nn

from electra_ds.config.schema import OptimizerConfig

# 1 - beta**step is exactly 1.0 in fp32 from here on, so torch's fused kernel applies no bias correction (tested).
NO_BIAS_CORRECTION_STEP = 2**20


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """Decayed parameters (matrices, embeddings included) apart from plain ones (biases and LayerNorm, all vectors).

    lr_scale: parameter name -> factor of its learning rate; each factor has groups of its own, under that key.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in module.named_parameters():
        is_plain, scale = parameter.ndim < 2, lr_scale(name)
        group = {"params": [], "weight_decay": 0.0 if is_plain else weight_decay, "lr_scale": scale}
        if parameter.requires_grad:
            groups.setdefault((is_plain, scale), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose state can start past bias correction (ELECTRA, appendix A: Adam without it).

    State is made here, not lazily in torch, since ZeRO swaps the parameters after construction.
    """

    def __init__(self, groups: list[dict], config: OptimizerConfig):
        # lr 0: some DeepSpeed stages run a dummy step inside initialize, which must move nothing.
        super().__init__(
            groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        self.bias_correction = config.bias_correction

    def _init_group(self, group: dict, *args, **kwargs):
        for parameter in group["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                make_state(self, parameter, 0, self.bias_correction)
        return super()._init_group(group, *args, **kwargs)


def make_state(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    applied_steps: int,
    bias_correction: bool,
) -> None:
    """Set fresh moments and the step count of one parameter (a flat shard under ZeRO) that has seen `applied_steps`."""
    step = applied_steps + (0 if bias_correction else NO_BIAS_CORRECTION_STEP)
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.tensor(float(step), device=parameter.device)
    optimizer.state[parameter] = {
        "step": step,
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
