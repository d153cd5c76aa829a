"""Muon: orthogonalized momentum for the matrices in the layers of the encoders."""

import math
from typing import Any

import torch
from torch import Tensor

from electra_ds.config.schema import OptimizerConfig
from electra_ds.training.optimizer import AdamW
from electra_ds.training.pieces import Pieces, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
TINY = 1e-7  # added to the norm of a matrix


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix near U V^T of the singular value decomposition U S V^T, in fp32.

    X = G / (|G| + 1e-7), then `steps` times X = a X + (b A + c A A) X with A = X X^T. The singular
    values of the result are between about 0.7 and 1.2 after 5 steps.

    matrix: [rows, columns]. dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = (x / (x.norm() + TINY)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Return the floating-point operations of `newton_schulz`, of its matrix products."""
    n, m = sorted((rows, columns))
    return steps * (4 * n * n * m + 2 * n**3)


def update_scale(rows: int, columns: int, adjust: str) -> float:
    """Return the factor of an orthogonalized update [rows, columns].

    rms: 0.2 sqrt(max(rows, columns)), so that the update has about the root mean square of Adam's
    (Liu et al. 2025, section 2.2). spectral: sqrt(max(1, rows / columns)) (Jordan et al. 2024).
    """
    if adjust == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the groups with `is_muon`, Adam for the others.

    For a matrix W with the clipped gradient G, momentum mu and rate r:

        M = mu M + (1 - mu) G
        U = newton_schulz(mu M + (1 - mu) G)
        W = W - r s (k U) - r decay W      k: update_scale, s: muon_lr_scale

    A parameter that stacks several matrices (query, key and value) is orthogonalized matrix by
    matrix. With k = 0.2 sqrt(max(rows, columns)) and s = 1 the rate of Adam is used (Liu et al.
    2025, "Muon is Scalable for LLM Training").

    A rank orthogonalizes the matrices of which it holds a part. A matrix that lies on several ranks
    is put together first, so that the result does not depend on the number of ranks.

    pieces: {id of a tensor of the optimizer: its pieces}, set after DeepSpeed has replaced the
        parameters. Before that, a step creates the state only.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
    ):
        """dtype: of the products in `newton_schulz`."""
        super().__init__(groups, config)
        self.options = config.muon
        self.dtype = dtype
        self.pieces: dict[int, Pieces] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["is_muon"] else ():
                if parameter.grad is not None and id(parameter) in self.pieces:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        assert parameter.grad is not None
        options = self.options
        momentum = self.state[parameter]["momentum_buffer"]
        momentum.lerp_(parameter.grad, 1 - options.momentum)
        blended = parameter.grad.lerp(momentum, options.momentum)
        parameter.mul_(1 - lr * weight_decay)
        for piece in self.pieces[id(parameter)].of:
            full = whole(blended, piece)
            if full is None or not piece.length:
                continue
            blocks = full.chunk(piece.stacked)
            rows, columns = blocks[0].shape
            factor = update_scale(rows, columns, options.adjust)
            update = torch.cat([newton_schulz(b, options.ns_steps, self.dtype) for b in blocks])
            part = update.view(-1)[piece.offset :][: piece.length]
            flat = parameter.view(-1)[piece.start :][: piece.length]
            flat.add_(part, alpha=-lr * options.lr_scale * factor)
