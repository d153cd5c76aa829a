"""Autocast: forward runs under it and backward does not, so both must agree on the dtypes."""

import pytest
import small_objective
import torch
from cuda_autocast import CudaDtypes

from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import packed_mask
from electra_ds.model.kernels.disentangled import disentangled_attention

KINDS = ("electra", "electra_15", "mlm", "replace_mlm", "all_tokens_mlm")


def test_the_dtypes_of_cuda_are_imitated():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with CudaDtypes():
        assert torch.softmax(x, -1).dtype == x.softmax(-1).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            found = (torch.softmax(x, -1), x.exp(), x.sum(0), torch.softmax(x, -1, dtype=x.dtype))
    assert [y.dtype for y in found] == [torch.float32] * 3 + [torch.bfloat16]


def disentangled(qkv, mask, dropout):
    positions = torch.randn(2 * qkv.shape[1] - 1, 16, dtype=qkv.dtype, requires_grad=True)
    return disentangled_attention(qkv, positions, 2, mask, dropout)


def plain(qkv, mask, dropout):
    return attention(qkv, 2, mask, dropout, backend="bmm")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("function", "window"), [(disentangled, None), (plain, None), (plain, 2)])
def test_attention_keeps_its_dtype_for_backward(function, window, dropout):
    length = 120  # long enough for the blocks of a window
    qkv = torch.randn(2, length, 24, dtype=torch.bfloat16, requires_grad=True)
    mask = packed_mask(torch.ones(2, length, dtype=torch.long), qkv.dtype, window=window)
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with CudaDtypes(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = function(qkv, mask, dropout)
        (grad,) = torch.autograd.grad(out.float().sum(), qkv)
        results.append((out, grad))
    for with_autocast, without in zip(*results, strict=True):
        assert with_autocast.dtype == torch.bfloat16 and torch.equal(with_autocast, without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", small_objective.CONFIGS)
def test_backward_of_a_forward_under_autocast_gives_the_gradients_of_fp32(architecture, kind):
    module = small_objective.build(architecture=architecture, kind=kind)
    batch = small_objective.make_batch()
    grads = []
    for enabled in (True, False):
        with CudaDtypes(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module(batch, small_objective.counts_of(batch)).total
        assert loss.dtype == torch.float32
        module.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    similarity = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert similarity > 0.9  # the sampled tokens may differ
