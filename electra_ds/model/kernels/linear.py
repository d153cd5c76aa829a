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

from electra_ds.model.kernels.dropout import dropout


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


class GegluLinear(Linear):
    """Linear layer of gelu(a) * b, where [a, b] = x (GEGLU: Shazeer 2020, section 2).

    x has twice as many columns as the layer has inputs. Without dropout and compilation, only x is
    kept for backward, which recomputes the product.
    """

    def forward(self, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Return [..., O] for x [..., 2 I]. dropout_p: dropout of gelu(a) * b; 0 outside training."""
        if dropout_p or torch.compiler.is_compiling():
            return linear(dropout(geglu(x), dropout_p, True), self.weight, self.bias)
        return _GegluLinearFunction.apply(x, self.weight, self.bias)


def geglu(x: Tensor) -> Tensor:
    """Return gelu(a) * b of [a, b] = x: [..., 2 I] -> [..., I]."""
    a, b = x.chunk(2, -1)
    return F.gelu(a) * b


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


class _GegluLinearFunction(torch.autograd.Function):
    """linear of geglu(x), in the dtype of x; autocast has no effect on backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.to(x.dtype)
        return product(geglu(x), weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])  # [M, O]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        a, b = x.reshape(-1, x.shape[-1]).chunk(2, -1)  # [M, I] each
        activated = F.gelu(a)
        dx = dweight = dbias = None
        if needs_weight:
            dweight = _outer_product(flat_grad, activated * b)
        if needs_x:
            inner = product(flat_grad, weight.to(x.dtype).T)  # [M, I]
            dx = torch.empty_like(x)
            da, db = dx.view(-1, x.shape[-1]).chunk(2, -1)
            torch.mul(inner, activated, out=db)
            da.copy_(torch.ops.aten.gelu_backward(inner.mul_(b), a))
        if needs_bias:
            dbias = flat_grad.sum(0)
        return dx, dweight, dbias  # autograd casts them to the dtypes of the parameters


def linear_and_part(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Return linear(x, weight, bias), and linear(other, ...) with the first rows of both.

    x [..., I] and other [M, I] have one dtype, that of the results. The gradient of the weight is
    made once, instead of a second one with zeros for the other rows.
    """
    if torch.compiler.is_compiling():
        return linear(x, weight, bias), linear(other, weight[:rows], bias[:rows])
    return _LinearAndPart.apply(x, other, weight, bias, rows)


class _LinearAndPart(torch.autograd.Function):
    """linear_and_part, in the dtype of x; autocast has no effect on backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        ctx.save_for_backward(x, other, weight)
        ctx.rows = rows
        return product(x, weight, bias), product(other, weight[:rows], bias[:rows])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, other_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, other, weight = ctx.saved_tensors
        rows = ctx.rows
        flat_grad = grad.reshape(-1, grad.shape[-1])  # [M, O]
        dx = product(flat_grad, weight.T).view(x.shape)
        dother = product(other_grad, weight[:rows].T)
        dweight = _outer_product(flat_grad, x.reshape(-1, x.shape[-1]))
        dweight[:rows] += _outer_product(other_grad, other)
        dbias = flat_grad.sum(0)
        dbias[:rows] += other_grad.sum(0)
        return dx, dother, dweight, dbias, None  # autograd casts them to the parameters' dtypes


def _outer_product(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad [M, O] transposed times x [M, I].

    The operator copies a transposed first argument, so the narrower matrix is the first one.
    """
    if grad.shape[1] <= x.shape[1]:
        return product(grad.T, x.T)
    return product(x.T, grad.T).T.contiguous()
