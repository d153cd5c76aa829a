"""The dtypes of autocast on CUDA, on a CPU: there softmax, sums and others are computed in fp32.

Autocast on a CPU leaves these functions in the dtype of their inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# From "CUDA Ops that can autocast to float32" and "... with an output dtype" in torch's docs.
FP32 = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "cross_entropy", "cumprod", "cumsum",
    "exp", "expm1", "layer_norm", "log", "log1p", "log2", "log_softmax", "nll_loss", "norm",
    "normalize", "pow", "prod", "reciprocal", "rsqrt", "softmax", "softplus", "sum",
}  # fmt: skip


class CudaDtypes(TorchFunctionMode):
    """Under autocast, computes the functions of FP32 in fp32 unless the call has a dtype."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_listed = getattr(func, "__name__", "") in FP32 and not kwargs.get("dtype")
        if is_listed and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value
