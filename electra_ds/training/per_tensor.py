"""Optimizers that scale the step of each parameter: StableAdamW and LAMB.

Notation: gradient g (clipped), rate r, moments m and v as in Adam with their bias correction
(optimizer.bias_correction), eps, decay (0 for biases and LayerNorm).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from electra_ds.config.schema import AdamConfig
from electra_ds.training.optimizer import make_state
from electra_ds.training.pieces import Pieces, multiply_pieces, square_sums


class PerTensor(torch.optim.Optimizer):
    """Adam's moments, and a step that depends on norms of whole parameters.

    pieces: {id of a tensor of the optimizer: its pieces}, set after DeepSpeed has replaced the
        parameters. Before that, a step creates the state only.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdamConfig):
        super().__init__(groups, {"lr": 0.0})
        self.betas, self.eps = (config.beta1, config.beta2), config.eps
        self.bias_correction = config.bias_correction
        self.pieces: dict[int, Pieces] = {}

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Advance the moments and yield (group, parameter) for each parameter."""
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                if not self.state[parameter]:
                    make_state(self, parameter, 0, self.bias_correction)
                if id(parameter) not in self.pieces:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                yield group, parameter

    def _m(self, parameter: Tensor) -> Tensor:
        """Return a copy of the first moment, bias-corrected."""
        state = self.state[parameter]
        return state["exp_avg"] / (1 - self.betas[0] ** state["step"])

    def _root(self, parameter: Tensor) -> Tensor:
        """Return the root of the second moment, bias-corrected; a copy."""
        state = self.state[parameter]
        return (state["exp_avg_sq"] / (1 - self.betas[1] ** state["step"])).sqrt_()


class StableAdamW(PerTensor):
    """AdamW with a smaller step of a parameter when its gradient is large for v.

    Wortsman et al. 2023, "Stable and low-precision training", Algorithm 2:

        q = RMS over the parameter of g / max(sqrt(v), eps)
        w = w - r (m / (sqrt(v) + eps)) / max(1, q) - r decay w

    Rows that pad a table do not count in the mean. In Algorithm 2 the decay is divided by
    max(1, q) as well; here it is that of `adam`.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdamConfig):
        super().__init__(groups, config)
        self._counts: dict[int, Tensor] = {}  # elements of each piece's whole parameter

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in self._parameters():
            pieces = self.pieces[id(parameter)]
            factors = self._factors(parameter, pieces)
            update = self._m(parameter).div_(self._root(parameter).add_(self.eps))
            multiply_pieces(update, pieces, factors)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _factors(self, parameter: Tensor, pieces: Pieces) -> Tensor:
        """Return 1 / max(1, q) of each piece."""
        assert parameter.grad is not None
        quotient = self._root(parameter).clamp_min_(self.eps)
        sums = square_sums(torch.div(parameter.grad, quotient, out=quotient), pieces)
        key = id(parameter)
        if key not in self._counts:  # once: a copy to a GPU
            self._counts[key] = sums.new_tensor([piece.true_numel for piece in pieces.of])
        return 1 / (sums / self._counts[key]).sqrt_().clamp_min_(1)


class Lamb(PerTensor):
    """LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2).

        u = m / (sqrt(v) + eps) + decay w
        w = w - r (|w| / |u|) u        |.|: norm over the parameter; the ratio is 1 if a norm is 0

    phi of the paper is the identity. For biases and LayerNorm, which do not decay, the ratio is 1,
    as in the authors' code.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in self._parameters():
            update = self._m(parameter).div_(self._root(parameter).add_(self.eps))
            update.add_(parameter, alpha=group["weight_decay"])
            if not group["is_vector"]:
                pieces = self.pieces[id(parameter)]
                weights, updates = (square_sums(x, pieces) for x in (parameter, update))
                ratio = (weights / updates).sqrt_()
                is_defined = (weights > 0) & (updates > 0)
                multiply_pieces(update, pieces, torch.where(is_defined, ratio, 1.0))
            parameter.sub_(update, alpha=group["lr"])
