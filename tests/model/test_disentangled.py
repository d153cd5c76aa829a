"""Disentangled attention: equal to the plain formula, in blocks, by documents and with dropout.

N heads, D width of a head.
"""

import math

import pytest
import torch

from electra_ds.model.kernels import disentangled
from electra_ds.model.kernels.attention_mask import PackedMask, document_cu_seqlens, packed_mask
from electra_ds.model.kernels.disentangled import disentangled_attention
from electra_ds.model.kernels.dropout import dropout_factors, factors_of_kept

N, D = 2, 4


def plain(qkv, positions, document_ids, factors=1.0):
    """The formula with an index for every score. factors: of dropout, [B, N, S, S]."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, N, D).permute(2, 0, 3, 1, 4)  # [B, N, S, D]
    position_q, position_k = positions.view(2 * length - 1, 2, N, D).permute(1, 2, 0, 3)
    places = torch.arange(length)
    rows = places - places[:, None] + length - 1  # of the distance i - j
    scores = q @ k.transpose(-1, -2)
    scores = scores + torch.einsum("bnid,nijd->bnij", q, position_k[:, rows])
    scores = scores + torch.einsum("bnjd,nijd->bnij", k, position_q[:, rows])
    apart = document_ids[:, None, :, None] != document_ids[:, None, None, :]
    probs = (scores / math.sqrt(3 * D)).masked_fill(apart, -math.inf).softmax(-1)
    return ((probs * factors) @ v).transpose(1, 2).flatten(2)


def inputs(length):
    """(qkv, positions, document_ids): a whole row, one of two documents, one with padding."""
    torch.manual_seed(length)
    qkv = torch.randn(3, length, 3 * N * D, dtype=torch.double, requires_grad=True)
    positions = torch.randn(2 * length - 1, 2 * N * D, dtype=torch.double, requires_grad=True)
    document_ids = torch.ones(3, length, dtype=torch.long)
    document_ids[1, length // 3 :] = 2
    document_ids[2, length // 2 :] = 0
    return qkv, positions, document_ids


def by_documents(document_ids):
    """The mask that computes documents one by one, in runs of equal lengths."""
    lengths = document_cu_seqlens(document_ids).diff()
    sizes, counts = torch.unique_consecutive(lengths[lengths > 0], return_counts=True)
    return PackedMask(runs=list(zip(counts.tolist(), sizes.tolist(), strict=True)))


def assert_equal(ours, expected, *variables):
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    found, wanted = (
        torch.autograd.grad((out * weights).sum(), variables) for out in (ours, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# Below, at and above the 64 tokens of a block, and with a smaller last block.
@pytest.mark.parametrize("length", [1, 2, 20, 64, 65, 130])
@pytest.mark.parametrize("mask_of", [lambda ids: packed_mask(ids, torch.double), by_documents])
def test_values_and_gradients_are_those_of_the_formula(length, mask_of):
    qkv, positions, document_ids = inputs(length)
    ours = disentangled_attention(qkv, positions, N, mask_of(document_ids))
    assert_equal(ours, plain(qkv, positions, document_ids), qkv, positions)


def test_a_mask_with_one_row_holds_for_all():
    qkv, positions, _ = inputs(9)
    document_ids = torch.tensor([[1] * 4 + [2] * 5])
    mask = packed_mask(document_ids, torch.double)._replace(rows=None)
    expected = plain(qkv, positions, document_ids.expand(3, -1))
    assert_equal(disentangled_attention(qkv, positions, N, mask), expected, qkv, positions)


def test_documents_need_the_distances_of_the_longest_one_only():
    """A row of documents has no distance of its whole length."""
    qkv, positions, document_ids = inputs(12)
    document_ids[0, 5:] = 2
    mask = by_documents(document_ids)
    longest = max(size for _, size in mask.runs)
    assert longest == 8
    near = positions[12 - longest : 11 + longest]
    ours = disentangled_attention(qkv, near, N, mask)
    assert_equal(ours, plain(qkv, positions, document_ids), qkv, positions)


@pytest.mark.parametrize("is_by_documents", [False, True])
def test_dropout_of_the_probabilities(monkeypatch, is_by_documents):
    """The factors of dropout enter the values and the gradients."""
    qkv, positions, document_ids = inputs(10)
    whole = torch.ones_like(document_ids)
    mask = by_documents(whole) if is_by_documents else PackedMask()
    factors = (torch.rand(N, 3, 10, 10) > 0.3).double() / 0.7
    monkeypatch.setattr(disentangled, "dropout_factors", lambda probs, p: factors)
    ours = disentangled_attention(qkv, positions, N, mask, dropout=0.3)
    expected = plain(qkv, positions, whole, factors.transpose(0, 1))
    assert_equal(ours, expected, qkv, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_elements_of_dropout_give_its_factors(monkeypatch, dtype):
    """Off the CPU backward has bools only; compiled code on a CPU draws as other devices do."""
    like = torch.zeros(50, 40, dtype=dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    factors = dropout_factors(like, 0.3)
    assert 0.2 < float((factors == 0).float().mean()) < 0.4
    assert torch.equal(factors_of_kept(factors != 0, 0.3, dtype), factors)


@pytest.mark.parametrize("is_by_documents", [False, True])
def test_a_mask_of_bools_gives_the_gradients_of_the_factors(monkeypatch, is_by_documents):
    qkv, positions, document_ids = inputs(10)
    mask = by_documents(torch.ones_like(document_ids)) if is_by_documents else PackedMask()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # draws by factors_of_kept
    results = []
    for saves_bools in (False, True):
        monkeypatch.setattr(disentangled, "_saves_bools", lambda device, to=saves_bools: to)
        torch.manual_seed(0)
        out = disentangled_attention(qkv, positions, N, mask, dropout=0.3)
        saved = [x.dtype for x in out.grad_fn.saved_tensors]
        assert (torch.bool in saved) == saves_bools
        results.append((out, *torch.autograd.grad(out.sum(), (qkv, positions))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_is_close_to_fp32():
    qkv, positions, document_ids = inputs(70)
    half = disentangled_attention(
        qkv.bfloat16(), positions.bfloat16(), N, packed_mask(document_ids, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    expected = plain(qkv, positions, document_ids)
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.05)


def test_the_inputs_are_not_changed():
    """Also where the rows have one token, so that views of them are contiguous."""
    for length in (1, 7):
        qkv, positions, _ = (x.detach() for x in inputs(length))
        before = qkv.clone(), positions.clone()
        disentangled_attention(qkv[:1], positions, N)
        assert torch.equal(qkv, before[0]) and torch.equal(positions, before[1])
