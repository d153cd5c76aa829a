"""Parts of parameters in the tensors that the optimizer updates, and sums over whole parameters.

At ZeRO stage 0 the optimizer updates whole parameters. From stage 1 on it updates flat tensors; each
holds a part of some parameters, and a parameter can lie on several ranks. Private names of
DeepSpeed 0.19 in this file: parameter._hp_mapping (stages 1 and 2), and at stage 3
optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat and parameter.partition_numel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """The part of one parameter that lies in a tensor of the optimizer on this rank.

    shape: of the whole parameter. true_numel: its elements without rows that pad a table.
    stacked: number of matrices that the parameter stacks on its first axis.
    start: first element in the tensor of the optimizer. offset: first element in the flattened
        parameter. length: number of elements; 0 if other ranks hold all of them.
    is_cut: whether several ranks hold a part of the parameter.
    """

    shape: torch.Size
    true_numel: int
    stacked: int
    start: int
    offset: int
    length: int
    is_cut: bool = False


class Pieces(NamedTuple):
    """The parameters in one tensor of the optimizer, in the same order on all ranks.

    is_shared_out: whether other ranks hold parts of these parameters that this rank lacks.
    """

    of: list[Piece]
    is_shared_out: bool


class Place(NamedTuple):
    """A parameter in a tensor of the optimizer: the tensor, first elements, and length."""

    tensor: Tensor
    start: int
    offset: int
    length: int


def find_pieces(
    places: Mapping[str, Place],
    shapes: Mapping[str, torch.Size],
    true_rows: Mapping[str, int],
    stacked: Mapping[str, int],
    all_gather_object: Callable[[Any], list[Any]],
) -> dict[int, Pieces]:
    """Return {id of a tensor of the optimizer: its pieces}. Collective.

    places: of every parameter by name, in the same order on all ranks.
    shapes: of the whole parameters. true_rows: rows of the parameters that are padded.
    stacked: matrices that a parameter stacks; 1 for other names.
    """
    lengths = all_gather_object({name: place.length for name, place in places.items()})
    pieces: dict[int, list[Piece]] = {}
    split: dict[int, bool] = {}
    for name, place in places.items():
        shape = shapes[name]
        found = [rank[name] for rank in lengths]
        is_cut = any(0 < length < shape.numel() for length in found)
        row = shape.numel() // shape[0] if shape else 1
        true_numel = true_rows.get(name, shape[0] if shape else 1) * row
        piece = Piece(
            shape,
            true_numel,
            stacked.get(name, 1),
            place.start,
            place.offset,
            place.length,
            is_cut,
        )
        key = id(place.tensor)
        pieces.setdefault(key, []).append(piece)
        split[key] = split.get(key, False) or any(length < shape.numel() for length in found)
    return {key: Pieces(found, split[key]) for key, found in pieces.items()}


def places_of_whole(masters: Mapping[str, Tensor]) -> dict[str, Place]:
    """Return the places at stage 0. masters: the tensors that the optimizer updates, by name."""
    return {name: Place(value, 0, 0, value.numel()) for name, value in masters.items()}


def places_in_groups(
    groups: Sequence[Sequence[str]], parameters: Mapping[str, Any], flat: Sequence[Tensor]
) -> dict[str, Place]:
    """Return the places at stages 1 and 2. groups: names of each group. flat: tensor of each."""
    places = {}
    for names, tensor in zip(groups, flat, strict=True):
        for name in names:
            mapping = parameters[name]._hp_mapping
            if mapping is None:
                places[name] = Place(tensor, 0, 0, 0)
                continue
            here, inside = mapping.hp_fragment_address, mapping.lp_fragment_address
            places[name] = Place(tensor, here.start, inside.start, here.numel)
    return places


def places_at_stage_3(holder: Any, parameters: Mapping[str, Any], rank: int) -> dict[str, Place]:
    """Return the places at stage 3. holder: DeepSpeed's optimizer."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    places = {}
    for group, tensor in zip(holder.fp16_groups, holder.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in group:
            share = parameter.partition_numel()
            offset = rank * share
            length = max(0, min(share, parameter.ds_numel - offset))
            places[names[id(parameter)]] = Place(tensor, start, offset, length)
            start += share
    return places


def square_sums(values: Tensor, pieces: Pieces) -> Tensor:
    """Return the sum of squares over each whole parameter, [number of pieces]. Collective.

    values: one number for each element of the tensor of the optimizer.
    """
    flat = values.reshape(-1)
    held = [flat[piece.start :][: piece.length] for piece in pieces.of if piece.length]
    norms = iter(torch._foreach_norm(held) if held else ())
    zero = flat.new_zeros(())
    sums = torch.stack([next(norms) if piece.length else zero for piece in pieces.of]).square()
    if pieces.is_shared_out:
        dist.all_reduce(sums)
    return sums


def multiply_pieces(values: Tensor, pieces: Pieces, factors: Tensor) -> None:
    """Multiply each piece in place by its factor. factors: [number of pieces]."""
    flat = values.view(-1)
    for piece, factor in zip(pieces.of, factors.unbind(), strict=True):
        if piece.length:
            flat[piece.start :][: piece.length].mul_(factor)


def whole(values: Tensor, piece: Piece) -> Tensor | None:
    """Return the parameter's whole tensor, on every rank that holds a part; else None.

    values: one number for each element of the tensor of the optimizer. Collective for a parameter
    that is cut: then all ranks get the tensor.
    """
    part = values.reshape(-1)[piece.start :][: piece.length]
    if not piece.is_cut:
        return part.view(piece.shape) if piece.length else None
    full = part.new_zeros(piece.shape)
    full.view(-1)[piece.offset :][: piece.length] = part
    dist.all_reduce(full)  # each element is one number and zeros: exact
    return full
