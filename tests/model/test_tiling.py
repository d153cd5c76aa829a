"""Indices of tiling, against loops in the form of ModernBERT's code."""

import pytest
import torch

from electra_ds.model.tiling import centred, layer_sources


def from_the_middle(small, large):
    """The loops of `tile_weights_from_middle` on the indices of one axis."""
    offset = (large - small) // 2
    result = [-1] * large
    result[offset : offset + small] = range(small)
    for i in range(offset):
        result[offset - 1 - i] = small - 1 - (i % small)
    for i in range(offset + small, large):
        result[i] = (i - offset) % small
    return result


@pytest.mark.parametrize("small", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 12, 31])
def test_the_smaller_axis_is_in_the_centre_and_repeats(small, more):
    assert centred(small, small + more).tolist() == from_the_middle(small, small + more)


@pytest.mark.parametrize(("small", "large"), [(22, 28), (12, 24), (6, 12), (3, 3), (1, 9), (5, 40)])
def test_layers_follow_the_pattern_by_depth(small, large):
    found = layer_sources(["global"] * small, ["global"] * large)
    assert found == [min(round(i * small / large), small - 1) for i in range(large)]
    assert found == sorted(found) and set(found) == set(range(small))


def kinds(count, pattern=("global", "local", "local")):
    return [pattern[i % len(pattern)] for i in range(count)]


@pytest.mark.parametrize(("small", "large"), [(22, 28), (3, 22), (7, 10), (4, 4), (12, 24)])
def test_each_layer_starts_from_one_of_its_kind_and_each_is_used(small, large):
    found = layer_sources(kinds(small), kinds(large))
    assert [kinds(small)[i] for i in found] == kinds(large)
    assert set(found) == set(range(small))
    for kind in ("global", "local"):
        of_kind = [i for i, own in zip(found, kinds(large), strict=True) if own == kind]
        assert of_kind == sorted(of_kind)
    if small == large:
        assert found == list(range(small))


def test_a_missing_kind_follows_the_pattern_over_all_layers():
    assert layer_sources(["global"] * 2, ["global", "local", "local", "global"]) == [0, 0, 1, 1]


def test_an_index_selects_rows_of_a_matrix():
    matrix = torch.arange(6.0).view(2, 3)
    assert matrix.index_select(1, centred(3, 5)).tolist() == [[2, 0, 1, 2, 0], [5, 3, 4, 5, 3]]
