"""Records the places where the host reads a tensor; on a GPU such a read waits for the device.

On a CPU nothing waits, so every call that reads is recorded: those of Python (float(tensor),
.cpu(), .tolist(), ...) and the operators below them, each with the innermost function of electra_ds
or DeepSpeed on the stack.
"""

import contextlib
import sys
from pathlib import Path

import deepspeed
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import electra_ds
from electra_ds.training.collectives import ControlGroup

CALLS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "equal",
}
OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "bincount",
}
BY_MASK = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
}  # a boolean mask calls nonzero
PACKAGES = {
    str(Path(package.__file__).parent): package.__name__ for package in (electra_ds, deepspeed)
}


def reader() -> str:
    """The innermost function of either package on the stack, as package/file:function."""
    frame = sys._getframe(2)
    while frame is not None:
        for folder, name in PACKAGES.items():
            if frame.f_code.co_filename.startswith(folder + "/"):
                return (
                    f"{name}{frame.f_code.co_filename.removeprefix(folder)}:{frame.f_code.co_name}"
                )
        frame = frame.f_back
    return ""


class Calls(TorchFunctionMode):
    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in CALLS or (func.__name__ == "to" and "cpu" in map(str, args[1:])):
            self.found.add(reader())
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name in BY_MASK else ()
        if name in OPERATORS or any(
            mask is not None and mask.dtype == torch.bool for mask in masks
        ):
            self.found.add(reader())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def during(first: int, last: int, *contexts: contextlib.AbstractContextManager):
    """Enter contexts for the forward and backward passes and votes of steps `first` to `last`."""
    original, steps, held = ControlGroup.wait_votes, [], contextlib.ExitStack()

    def wait_votes(self):  # the first call of every step
        steps.append(1)
        if len(steps) == first:
            for context in contexts:
                held.enter_context(context)
        if len(steps) == last + 1:
            held.close()
        return original(self)

    ControlGroup.wait_votes = wait_votes
    try:
        yield
    finally:
        ControlGroup.wait_votes = original


@contextlib.contextmanager
def waiting(mode: str):
    """Set torch's reaction to a host that waits for a GPU: "error" or "default"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
