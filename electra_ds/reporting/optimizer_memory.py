"""Memory that depends on the kind of the optimizer: its state, and copies during an update."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from electra_ds.model.encoder import hidden_matrices
from electra_ds.training.optimizer import moments_of, parameter_groups


class GroupSizes(NamedTuple):
    """One group of the optimizer.

    sizes: elements of each parameter, in memory order. moments: tensors of state per parameter.
    has_counters: whether each tensor of the optimizer has a step counter of 4 bytes.
    """

    sizes: list[int]
    moments: int = 2
    has_counters: bool = True


def group_sizes(module: nn.Module, kind: str) -> list[GroupSizes]:
    """Return the groups of the optimizer of a module. kind: optimizer.kind."""
    muon = hidden_matrices(module) if kind == "muon" else {}
    has_counters = kind in ("adam", "muon")
    return [
        GroupSizes(
            [parameter.numel() for parameter in group["params"]],
            len(moments_of(group)),
            has_counters and not group["is_muon"],
        )
        for group in parameter_groups(module, 1.0, muon=muon)
    ]


def update_copies(module: nn.Module, kind: str, stage: int, is_half: bool, world_size: int) -> int:
    """Return the bytes that the update of a group holds beside the model states, at most; 0: Adam.

    StableAdamW and LAMB hold two fp32 copies of what they update at a time: a parameter at stage 0,
    else this rank's share of a group. Muon holds one copy, and the matrices of one parameter. At
    stage 0 in half precision there are fp32 gradients of all parameters. From stage 1 on there is a
    flat fp32 gradient of the group; at stages 1 and 2 its gradients, which count as model states,
    are freed before.
    """
    if kind == "adam":
        return 0
    muon = hidden_matrices(module) if kind == "muon" else {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, 1.0, muon=muon)
    all_sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    gradients = 4 * sum(all_sizes) if stage == 0 and is_half else 0
    most = 0
    for group in groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        share = -(-sum(sizes) // world_size)
        updated = max(sizes) if stage == 0 else share
        copies = 0
        if group["is_muon"]:
            is_gathered = stage > 0 and world_size > 1
            parts = (_muon_elements(p, muon[names[id(p)]], is_gathered) for p in group["params"])
            copies = updated + max(parts)
        elif kind != "muon":
            copies = 2 * updated
        flat = 4 * share if stage > 0 else 0
        freed = (2 if is_half else 4) * share if stage in (1, 2) else 0
        most = max(most, gradients + flat - freed + 4 * copies)
    return most


def _muon_elements(parameter: nn.Parameter, stacked: int, is_gathered: bool) -> int:
    """Elements of the tensors that orthogonalize one parameter, at most at once.

    These are the whole parameter if it lies on several ranks, the results so far, and for the last
    matrix the iterate, its next value and products with its Gram matrix.
    """
    rows, columns = parameter.shape
    block = parameter.numel() // stacked
    gram = min(rows // stacked, columns) ** 2
    iteration = parameter.numel() - block + 3 * block + 2 * gram
    return parameter.numel() * is_gathered + max(iteration, 2 * parameter.numel())


def moment_elements(groups: Sequence[GroupSizes], elements: Sequence[int]) -> int:
    """Return the elements of all moments. elements: those of a rank in each group."""
    return sum(g.moments * n for g, n in zip(groups, elements, strict=True))


def counter_bytes(groups: Sequence[GroupSizes], tensors: Sequence[int]) -> int:
    """Return the bytes of the step counters. tensors: of the optimizer in each group."""
    return sum(4 * n for g, n in zip(groups, tensors, strict=True) if g.has_counters)
