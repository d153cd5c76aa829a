"""Linear layers in fp32 on a CPU by oneDNN.

PyTorch sends fp32 products to MKL, which leaves half of the vector width unused on processors of other makers
(110 against 250 GFLOP/s per core measured on one of them); oneDNN, which PyTorch uses for bf16, does not.

Letters: M places, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]; the same as F.linear but for rounding."""
    if uses_onednn(x, weight):
        return _Linear.apply(x, weight, bias, False)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """Linear of gelu(x) that keeps x alone and makes gelu(x) again in backward: the same bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which decides by itself what to keep
            return linear(F.gelu(x), self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias, True)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x and weight goes to oneDNN by ourselves: plain fp32 on a CPU, outside autocast and
    torch.compile."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _product is not None
        and not torch.compiler.is_compiling()
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, I] times b [O, I] transposed, plus bias [O], without gradient; either may be a transposed view."""
    return _product(a, b, bias, "none", [], "") if uses_onednn(a, b) else F.linear(a, b, bias)


# The operator behind PyTorch's own CPU inference graphs, where this build has it.
_has_product = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_product = torch.ops.mkldnn._linear_pointwise.default if _has_product else None


class _Linear(torch.autograd.Function):
    """linear of x, or of gelu(x), in the dtype of x, whatever autocast says when backward comes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_gelu = with_gelu
        return product(
            F.gelu(x) if with_gelu else x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # [M, O]
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dweight = dx = None
        if wants_weight:
            dweight = _outer(flat, (F.gelu(x) if ctx.with_gelu else x).reshape(-1, x.shape[-1]))
        if wants_x:
            dx = product(flat, weight.to(x.dtype).T).view(x.shape)
            if ctx.with_gelu:
                torch.ops.aten.gelu_backward.grad_input(dx, x, grad_input=dx)
        return (
            dx,
            dweight,
            flat.sum(0) if wants_bias else None,
            None,
        )  # autograd casts them to the parameters' dtype


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad [M, O] transposed times x [M, I]. The operator copies a transposed first argument: make it the narrower."""
    if grad.shape[1] <= x.shape[1]:
        return product(grad.T, x.T)
    return product(x.T, grad.T).T.contiguous()
