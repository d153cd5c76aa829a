"""Attention with a local window and rotary positions: every path equals the formula."""

import pytest
import torch
import torch.nn.functional as F
from plain_attention import value_and_grads, written_out_attention, written_out_rotation

from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import (
    PackedMask,
    add_neighbors,
    document_cu_seqlens,
    neighbors,
    packed_mask,
)
from electra_ds.model.kernels.linear import GegluLinear
from electra_ds.model.kernels.rotary import Rotary, rotary_tables, rotate, rotate_

HEADS, WIDTH, THETA = 2, 8, 30.0


def rows_of_documents(kind: str, length: int) -> torch.Tensor:
    """document_ids [B, S] of rows of a kind."""
    full = torch.ones(length, dtype=torch.long)
    two = (torch.arange(length) >= length // 3).long() + 1
    many = torch.arange(length) // 5 + 1
    padded = two * (torch.arange(length) < length - length // 4)
    return {
        "full": full.expand(3, -1),
        "one row": full[None],
        "two documents": two[None],
        "padding": padded.expand(2, -1),
        "all kinds": torch.stack([two, full, padded, many]),
    }[kind]


def positions_in_documents(document_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token inside its document, [B, S]; padding counts as a document."""
    places = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


def random_qkv(document_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(*document_ids.shape, 3 * WIDTH, generator=random).to(dtype)


def tables_of(document_ids: torch.Tensor) -> Rotary:
    return rotary_tables(positions_in_documents(document_ids), WIDTH // HEADS, THETA)


def formula(
    qkv: torch.Tensor, document_ids: torch.Tensor, window: int | None, is_rotated: bool = True
) -> tuple[torch.Tensor, ...]:
    """Value and gradient of the formula, in fp64."""
    rotary = (positions_in_documents(document_ids), THETA) if is_rotated else None
    return value_and_grads(
        lambda t: written_out_attention(t, HEADS, document_ids, window, rotary), qkv.double()
    )


def assert_is_formula(
    qkv: torch.Tensor,
    document_ids: torch.Tensor,
    mask: PackedMask,
    window: int | None,
    backend: str = "auto",
    is_rotated: bool = True,
) -> None:
    """Value and gradient of `attention` are those of the formula."""
    rotary = tables_of(document_ids) if is_rotated else None
    found = value_and_grads(
        lambda t: attention(t, HEADS, mask, backend=backend, rotary=rotary), qkv
    )
    is_exact = qkv.dtype == torch.float32
    for a, b in zip(found, formula(qkv, document_ids, window, is_rotated), strict=True):
        assert a.dtype == qkv.dtype
        tolerance = 1e-5 if is_exact else 0.03
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ local window

# Rows of a length and a window, and whether these are computed by blocks: where the blocks around
# one hold fewer keys than the row.
WINDOWS = {
    "smaller than a block": (64, 4, True),
    "a length of no whole number of blocks": (61, 4, True),
    "one token": (50, 1, True),
    "equal to a block": (96, 32, False),
    "shorter than the blocks around one": (97, 32, True),
    "a block of another size": (75, 23, True),
    "the largest block": (200, 64, True),
    "larger than a block": (330, 70, True),
    "hardly smaller than the row": (30, 28, False),
    "half of a short row": (30, 8, False),
}


@pytest.mark.parametrize("documents", ["full", "one row", "two documents", "padding", "all kinds"])
@pytest.mark.parametrize("case", WINDOWS)
def test_a_local_window_is_the_formula(case, documents):
    length, window, by_blocks = WINDOWS[case]
    document_ids = rows_of_documents(documents, length)
    cu_seqlens = document_cu_seqlens(document_ids)
    mask = packed_mask(document_ids, torch.float32, cu_seqlens, window=window)
    assert (mask.blocks is not None) == by_blocks
    assert_is_formula(random_qkv(document_ids), document_ids, mask, window)


def test_a_window_as_long_as_the_row_is_no_window():
    for document_ids in (rows_of_documents("full", 30), rows_of_documents("all kinds", 30)):
        cu_seqlens = document_cu_seqlens(document_ids)
        plain = packed_mask(document_ids, torch.float32, cu_seqlens)
        for window in (29, 30, 64):
            found = packed_mask(document_ids, torch.float32, cu_seqlens, window=window)
            assert found.blocks is None and found.rows == plain.rows
            assert_is_formula(random_qkv(document_ids), document_ids, found, None)


@pytest.mark.parametrize("backend", ["bmm", "sdpa"])
def test_a_window_of_a_short_row_is_the_formula_in_every_backend(backend):
    document_ids = rows_of_documents("all kinds", 30)
    mask = packed_mask(document_ids, torch.float32, window=8)
    assert_is_formula(random_qkv(document_ids), document_ids, mask, 8, backend)


@pytest.mark.parametrize(("window", "is_rotated"), [(8, False), (8, True), (None, True)])
def test_the_gradient_with_dropout_is_that_of_the_value(window, is_rotated):
    """Blocks, or dense rows: the same factors of dropout in forward and backward."""
    document_ids = rows_of_documents("padding", 49)[:1]
    mask = packed_mask(document_ids, torch.float64, window=window)
    assert (mask.blocks is not None) == (window is not None)
    positions = positions_in_documents(document_ids)
    rotary = rotary_tables(positions, 2, THETA) if is_rotated else None
    qkv = random_qkv(document_ids, torch.float64)[..., :12].requires_grad_()

    def repeatable(t):
        torch.manual_seed(3)
        return attention(t, HEADS, mask, dropout=0.4, rotary=rotary)

    assert torch.autograd.gradcheck(repeatable, qkv)  # its fast mode misses errors
    assert not torch.equal(repeatable(qkv), attention(qkv, HEADS, mask, rotary=rotary))


def test_dropout_of_blocks_keeps_the_mean():
    document_ids = rows_of_documents("one row", 50)
    mask = packed_mask(document_ids, torch.float32, window=4)
    qkv = random_qkv(document_ids)
    torch.manual_seed(0)
    mean = torch.stack([attention(qkv, HEADS, mask, dropout=0.3) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, attention(qkv, HEADS, mask), rtol=0, atol=0.1)


@pytest.mark.parametrize(("size", "reach", "blocks"), [(16, 1, 4), (4, 2, 3), (3, 1, 1), (5, 3, 2)])
def test_add_neighbors_is_the_adjoint_of_neighbors(size, reach, blocks):
    torch.manual_seed(0)
    x = torch.randn(2, blocks * size, 3, dtype=torch.float64)
    gathered = neighbors(x, size, reach)
    assert gathered.shape == (2 * blocks, (2 * reach + 1) * size, 3)
    other = torch.randn_like(gathered)
    added = add_neighbors(other, 2, size, reach)
    assert added.shape == x.shape
    torch.testing.assert_close((gathered * other).sum(), (x * added).sum())


def test_neighbors_of_a_block_are_the_blocks_around_it():
    x = torch.arange(12.0).view(1, 12, 1)
    found = neighbors(x, 4, 1, fill=-1.0)[..., 0]
    assert found[0].tolist() == [-1.0] * 4 + list(range(8))
    assert found[1].tolist() == list(range(12))
    assert found[2].tolist() == [*range(4, 12), *[-1.0] * 4]


def test_a_device_without_flash_attention_gets_a_bias_with_the_window():
    """The device "meta" stands for it; the values are those of a CPU."""
    document_ids = rows_of_documents("all kinds", 100)
    cu_seqlens = document_cu_seqlens(document_ids).to("meta")
    mask = packed_mask(document_ids.to("meta"), torch.bfloat16, cu_seqlens, window=4)
    assert mask.bias.shape == (4, 1, 100, 100)
    assert (mask.blocks, mask.cu_seqlens) == (None, None)
    full = packed_mask(torch.ones(2, 100).to("meta"), torch.bfloat16, cu_seqlens[:3], window=4)
    assert full.bias is not None  # rows of one document have a window, too


def test_the_flash_kernel_takes_the_window():
    """On tensors without data; tests/gpu compares the values."""
    qkv = torch.empty(2, 9, 3 * 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = document_cu_seqlens(torch.ones(2, 9)).to("meta")
    position_ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    mask = PackedMask(cu_seqlens=cu_seqlens, window=4)
    rotary = rotary_tables(position_ids, 8, THETA)
    out = attention(qkv, 2, mask, backend="varlen", rotary=rotary)
    assert out.shape == (2, 9, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


# ---------------------------------------------------------------------------------- rotary positions


def masks_of_every_path() -> dict[str, tuple[torch.Tensor, PackedMask, int | None, str]]:
    """Path on a CPU -> document_ids, mask, window and backend."""
    short, long = rows_of_documents("all kinds", 30), rows_of_documents("two documents", 450)
    long = torch.cat([long, long])
    by_document = packed_mask(long, torch.float32, document_cu_seqlens(long))
    assert by_document.runs is not None
    local = packed_mask(long, torch.float32, window=8)
    assert local.blocks is not None
    dense = packed_mask(short, torch.float32)
    return {
        "bmm": (short, dense, None, "bmm"),
        "sdpa": (short, dense, None, "sdpa"),
        "by document": (long, by_document, None, "auto"),
        "blocks": (long, local, 8, "auto"),
    }


@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("path", ["bmm", "sdpa", "by document", "blocks"])
def test_rotated_attention_is_the_formula_in_every_path(path, is_rotated):
    document_ids, mask, window, backend = masks_of_every_path()[path]
    qkv = random_qkv(document_ids)
    assert_is_formula(qkv, document_ids, mask, window, backend, is_rotated)


@pytest.mark.parametrize("path", ["bmm", "sdpa", "by document", "blocks"])
def test_bf16_is_close_to_the_formula_in_every_path(path):
    document_ids, mask, window, backend = masks_of_every_path()[path]
    if mask.bias is not None:
        mask = mask._replace(bias=mask.bias.bfloat16())
    if mask.blocks is not None:
        mask = mask._replace(blocks=mask.blocks._replace(bias=mask.blocks.bias.bfloat16()))
    qkv = random_qkv(document_ids, torch.bfloat16)
    assert_is_formula(qkv, document_ids, mask, window, backend)


def test_documents_of_equal_lengths_in_several_rows_are_one_run():
    document_ids = torch.ones(2, 600, dtype=torch.long)
    document_ids[:, 200:400], document_ids[:, 400:] = 2, 3
    mask = packed_mask(document_ids, torch.float32, document_cu_seqlens(document_ids))
    assert mask == PackedMask(runs=[(6, 200)])
    assert_is_formula(random_qkv(document_ids), document_ids, mask, None)


def test_attention_depends_on_differences_of_positions_only():
    document_ids = rows_of_documents("one row", 30)
    qkv = random_qkv(document_ids)
    positions = positions_in_documents(document_ids)
    values = [
        attention(qkv, HEADS, rotary=rotary_tables(positions + shift, WIDTH // HEADS, THETA))
        for shift in (0, 7, 1000)
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[2], values[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(values[0], attention(qkv, HEADS), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_in_place_is_the_rotation_and_has_an_inverse(dtype):
    position_ids = torch.tensor([[0, 1, 2, 700], [0, 5, 0, 8191]])
    x = torch.randn(2, 3, 4, WIDTH).to(dtype)  # [B, N, S, D]
    cos, sin = (t[:, None] for t in rotary_tables(position_ids, WIDTH, THETA))
    turned, again = rotate(x, cos, sin), x.clone()
    rotate_(again, cos, sin)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-3  # position 8191 in fp32
    expected = written_out_rotation(x, position_ids, THETA)
    for found in (turned, again):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    rotate_(again, cos, -sin)
    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------- GEGLU


def plain_geglu(x, weight, bias=None):
    a, b = x.chunk(2, -1)
    return F.linear(F.gelu(a) * b, weight, bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_geglu_linear_is_linear_of_the_gated_input_and_saves_only_its_input(kind, with_bias):
    torch.manual_seed(0)
    layer = GegluLinear(24, 40, bias=with_bias)
    layer = layer.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    x = torch.randn(5, 7, 48, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    def result_of(function):
        saved.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            found = value_and_grads(function, x)
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        return [*found, *grads], sorted(saved)

    ours, ours_saved = result_of(layer)
    plain, _ = result_of(lambda t: plain_geglu(t, layer.weight, layer.bias))
    assert ours_saved == sorted([x.numel(), layer.weight.numel()])
    tolerance = 1e-5 if kind == "fp32" else 0.05
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_dropout_of_geglu_linear_is_on_the_gated_input():
    layer = GegluLinear(6, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
    x = torch.randn(50, 12)
    torch.manual_seed(0)
    dropped, whole = layer(x, 0.5), layer(x)
    is_zero = dropped == 0
    assert 0.35 < float(is_zero.float().mean()) < 0.65
    torch.testing.assert_close(dropped[~is_zero], 2 * whole[~is_zero])
