"""Linear layers that compute fp32 products on a CPU by oneDNN.

PyTorch computes fp32 products by MKL. On processors that are not by Intel, MKL uses half of the
vector width: 110 instead of 250 GFLOP/s per core were measured on one. oneDNN, which PyTorch uses
for bf16, uses the whole width.

Dimensions: M rows of a product, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, plus bias [O]; F.linear up to rounding."""
    if uses_onednn(x, weight):
        return _LinearFunction.apply(x, weight, bias, False)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """Linear layer of gelu(x). Only x is kept for backward, which recomputes gelu(x)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler decides what is kept for backward
            return linear(F.gelu(x), self.weight, self.bias)
        return _LinearFunction.apply(x, self.weight, self.bias, True)


# The operator of PyTorch's CPU inference graphs, or None where this build does not have it.
_onednn_product: Any = None
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _onednn_product = torch.ops.mkldnn._linear_pointwise.default


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `product` computes x times weight by oneDNN directly.

    True for plain fp32 on a CPU, outside autocast and torch.compile.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _onednn_product is not None
        and not torch.compiler.is_compiling()
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a [M, I] times b [O, I] transposed, plus bias [O]: [M, O]. It is not differentiable.

    Either argument may be a transposed view.
    """
    if uses_onednn(a, b):
        return _onednn_product(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


class _LinearFunction(torch.autograd.Function):
    """linear of x or of gelu(x), in the dtype of x; autocast has no effect on backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_gelu = with_gelu
        return product(
            F.gelu(x) if with_gelu else x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])  # [M, O]
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if needs_weight:
            dweight = _outer_product(
                flat_grad, (F.gelu(x) if ctx.with_gelu else x).reshape(-1, x.shape[-1])
            )
        if needs_x:
            dx = product(flat_grad, weight.to(x.dtype).T).view(x.shape)
            if ctx.with_gelu:
                torch.ops.aten.gelu_backward.grad_input(dx, x, grad_input=dx)
        if needs_bias:
            dbias = flat_grad.sum(0)
        return dx, dweight, dbias, None  # autograd casts them to the dtypes of the parameters


def _outer_product(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad [M, O] transposed times x [M, I].

    The operator copies a transposed first argument, so the narrower matrix is the first one.
    """
    if grad.shape[1] <= x.shape[1]:
        return product(grad.T, x.T)
    return product(x.T, grad.T).T.contiguous()
