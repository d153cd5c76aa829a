"""Parameters by canonical name, without the rows that pad a table in memory."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

Shapes = dict[str, tuple[int, ...]]
# Types of weights. Narrower types, of 8 and 4 bits, are quantized: their scales are other tensors.
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def true_rows(module: nn.Module) -> dict[str, int]:
    """Return {name: rows without padding} of the parameters that are padded in memory."""
    return {
        f"{prefix}.{name}" if prefix else name: rows
        for prefix, part in module.named_modules()
        for name, rows in getattr(part, "true_rows", {}).items()
    }


def true_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by canonical name, as detached views without padded rows.

    A shared tensor occurs once.
    """
    rows = true_rows(module)
    return {name: p.detach()[: rows.get(name, len(p))] for name, p in module.named_parameters()}


@torch.no_grad()
def load_true_state(module: nn.Module, state: dict[str, Tensor], partial: bool = False) -> None:
    """Copy tensors without padded rows into the parameters of module.

    state:   canonical name -> tensor
    partial: allow missing names; these parameters keep their values
    Raises UserError when names are missing or unknown, or a shape differs. Tensors before the first
    wrong shape are copied already.
    """
    parameters = true_state(module)
    missing = [] if partial else sorted(parameters.keys() - state.keys())
    unknown = sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise UserError(
            f"the weights do not fit the model: missing {missing[:3] or 'none'}, unknown "
            f"{unknown[:3] or 'none'} (the first three names of each)"
        )
    for name, value in state.items():
        shape, expected = tuple(value.shape), tuple(parameters[name].shape)
        if shape != expected:
            raise UserError(f"weights: {name} has shape {shape}, the model expects {expected}")
        parameters[name].copy_(value)


def shapes_of(build: Callable[[], nn.Module], where: str) -> Shapes:
    """Return the shapes of the parameters of a module, without padded rows; no memory is used.

    build: returns the module; it is called with "meta" as the default device.
    where: the file with the sizes, for the message. UserError for sizes that overflow.
    """
    try:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in true_state(build()).items()}
    except (RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: the sizes of the model are impossible ({reason})") from None


def check_state(state: Mapping[str, Tensor], shapes: Shapes, where: str) -> None:
    """Compare weights with the model that its config describes.

    state:  canonical name -> tensor. shapes: of every parameter, by canonical name.
    where:  folder or file of the weights, for messages.
    UserError for missing and unknown names, other shapes, integers, and values that are not finite.
    """
    check_shapes({name: tuple(value.shape) for name, value in state.items()}, shapes, where)
    check_values(state, where)


def check_shapes(found: Shapes, shapes: Shapes, where: str) -> None:
    """Compare the shapes of weights with those of the model that their config describes.

    found, shapes: of the weights and of the model, by canonical name. where: as in `check_state`.
    UserError for missing and unknown names and for other shapes.
    """
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        raise UserError(
            f"{where}: the weights do not fit the config: {len(missing)} tensors are missing "
            f"({_first(missing)}), {len(unknown)} are not in the model ({_first(unknown)}); use "
            "the config that was saved with the weights"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise UserError(
                f"{where}: {name} has shape {found[name]}, but the config gives {shape}"
            )


def check_values(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError for tensors that are not floating-point, or with NaN or infinite values."""
    for name, value in state.items():
        check_type(value, printable(name), where)
        count = int((~torch.isfinite(value.float())).sum())
        if count:
            raise UserError(
                f"{where}: {count:,} of the {value.numel():,} values of {printable(name)} are not "
                "finite; the model has diverged or the file is damaged; use an older checkpoint"
            )


def check_type(value: Tensor, name: str, where: str) -> None:
    """Raise UserError unless a tensor is of a type of WEIGHT_TYPES. name, where: for the message."""
    if value.dtype not in WEIGHT_TYPES:
        raise UserError(
            f"{where}: {name} has the type {value.dtype}; expected floating-point weights of at "
            "least 16 bits; quantized weights are not read"
        )


def check_layers(names: Iterable[str], part: str, count: int, where: str) -> None:
    """Raise UserError unless `names` has the layers 0 to count - 1 of a part.

    part: what stands before the number of a layer, such as "discriminator.layers.". This check
    comes before a module of `count` layers is built.
    """
    rests = (name.partition(part)[2] for name in names if part in name)
    found = {rest.partition(".")[0] for rest in rests}
    if len(found) != count or not all(number.isdecimal() for number in found):
        raise UserError(
            f"{where}: the weights have {len(found)} layers ({part}N), but the config has {count}; "
            "use the config that was saved with the weights"
        )


def _first(names: list[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "") or "none"
