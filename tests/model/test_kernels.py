"""The kernels return the values and gradients of plain implementations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import value_and_grads, written_out_attention

from electra_ds.data.batch import Batch
from electra_ds.finetuning.batches import TaskBatch
from electra_ds.model.kernels import linear as linear_op
from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import (
    PackedMask,
    document_cu_seqlens,
    packed_mask,
    with_cu_seqlens,
)
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.linear import GeluLinear, linear
from electra_ds.model.kernels.vocab_head import (
    logits_head,
    running_sums,
    sample_tokens,
    sample_weights,
    vocab_head,
)

# document_ids of three rows: two documents and padding, three documents, one document
PACKED = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 3, 3, 3, 3], [1] * 9])
SINGLE_ROW = torch.tensor([[1, 1, 2, 2, 3, 3, 3, 0, 0]])


# ---------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("backend", ["bmm", "sdpa"])
@pytest.mark.parametrize(
    "document_ids",
    [PACKED, PACKED[1:2], torch.ones_like(PACKED)],
    ids=["packed", "one row", "full"],
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_attention_is_the_formula_within_documents(backend, document_ids, is_compiled):
    qkv = torch.randn(*document_ids.shape, 3 * 8)
    mask = packed_mask(
        document_ids, qkv.dtype, document_cu_seqlens(document_ids), is_compiled=is_compiled
    )
    fast = value_and_grads(lambda t: attention(t, 2, mask, backend=backend), qkv)
    plain = value_and_grads(lambda t: written_out_attention(t, 2, document_ids), qkv)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_of_one_document_have_no_mask():
    assert packed_mask(torch.ones(2, 5, dtype=torch.long), torch.float32) == PackedMask()
    assert packed_mask(PACKED[[2, 0, 2, 1]], torch.float32).rows == [1, 3]


def test_a_single_row_is_computed_by_document_unless_layers_are_compiled():
    cu_seqlens = document_cu_seqlens(SINGLE_ROW)
    mask = packed_mask(SINGLE_ROW, torch.float32, cu_seqlens)
    assert mask == PackedMask(runs=[(2, 2), (1, 3), (1, 2)])
    compiled = packed_mask(SINGLE_ROW, torch.float32, cu_seqlens, is_compiled=True)
    assert compiled.runs is None
    assert compiled.bias.shape == (1, 1, 9, 9)


def test_attention_with_dropout_has_the_gradient_of_its_value():
    qkv = torch.randn(3, 9, 3 * 4, dtype=torch.float64, requires_grad=True)

    def repeatable(t):
        torch.manual_seed(3)
        return attention(t, 2, packed_mask(PACKED, t.dtype), dropout=0.4)

    assert torch.autograd.gradcheck(repeatable, qkv)
    assert not torch.equal(repeatable(qkv), attention(qkv, 2, packed_mask(PACKED, qkv.dtype)))


def test_attention_dropout_keeps_the_mean():
    qkv = torch.randn(1, 6, 3 * 4)
    torch.manual_seed(0)
    mean = torch.stack([attention(qkv, 1, dropout=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attention(qkv, 1), rtol=0, atol=0.1)


def test_cu_seqlens_are_the_starts_of_the_documents_in_one_of_few_sizes():
    starts = [0, 4, 7, 9, 11, 14, 18]
    assert document_cu_seqlens(PACKED).tolist() == starts + [27] * 6  # 3 rows x 4, plus one
    assert document_cu_seqlens(PACKED[:1]).tolist() == [0, 4, 7, 9, 9]
    assert document_cu_seqlens(torch.ones(3, 9, dtype=torch.long)).tolist() == [0, 9, 18, 27]
    assert len(document_cu_seqlens(torch.arange(5 * 9).view(5, 9) // 2)) == 5 * 8 + 1
    assert document_cu_seqlens(PACKED).dtype == torch.int32


@pytest.mark.parametrize("kind", [Batch, TaskBatch])
def test_with_cu_seqlens_fills_in_one_field_of_any_batch(kind):
    batch = kind(*[PACKED] * 7, *([PACKED] if kind is Batch else []))
    filled = with_cu_seqlens(batch)
    assert filled.cu_seqlens.equal(document_cu_seqlens(PACKED))
    assert filled._replace(cu_seqlens=None) == batch


def test_the_arguments_of_the_flash_kernel_have_the_shapes_and_types_that_it_checks():
    """On tensors without data; tests/gpu compares the values."""
    qkv = torch.empty(3, 9, 3 * 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = attention(
        qkv,
        2,
        PackedMask(cu_seqlens=document_cu_seqlens(PACKED).to("meta")),
        dropout=0.1,
        backend="varlen",
    )
    assert out.shape == (3, 9, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_share_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    out = dropout(torch.ones(301, 1001), p, training=True)
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.003)
    assert float(out.mean()) == pytest.approx(1, abs=0.005)
    columns = (out == 0).float().mean(0)  # all columns are dropped equally often
    assert float((columns - p).abs().max()) < 0.18


# ------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("shape", [(5, 7, 24, 40), (3, 4, 40, 24), (2, 3, 8, 1), (1, 1, 1, 3)])
def test_linear_is_the_plain_linear(shape):
    *lead, inputs, outputs = shape
    x, weight, bias = torch.randn(*lead, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for a, b in zip(
        value_and_grads(linear, x, weight, bias),
        value_and_grads(F.linear, x, weight, bias),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_follows_autocast_and_other_dtypes(monkeypatch):
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
    monkeypatch.setattr(linear_op, "_onednn_product", None)  # a build without the operator
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_gelu_linear_is_linear_of_gelu_and_saves_only_its_input(kind):
    torch.manual_seed(0)
    layer = GeluLinear(24, 40).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    x = torch.randn(5, 7, 24, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    saved_sizes = []

    def save(tensor):
        saved_sizes.append(tensor.numel())
        return tensor

    def result_of(function):
        saved_sizes.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        inputs = x.clone().requires_grad_()
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = function(inputs)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        result = [out, inputs.grad, layer.weight.grad, layer.bias.grad]
        layer.zero_grad()
        return result, saved_sizes.count(x.numel())

    ours, saved_by_ours = result_of(layer)
    plain, saved_by_plain = result_of(lambda x: linear(F.gelu(x), layer.weight, layer.bias))
    assert (saved_by_ours, saved_by_plain) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


# ----------------------------------------------------------------------------------------- sampling


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400))
def test_sampling_inverts_the_distribution_function(seed, size):
    torch.manual_seed(seed)
    weights = torch.rand(8, size) ** 8 * (torch.rand(8, size) > 0.3)
    weights[:, seed % size] += 0.1
    uniforms = torch.rand(8)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])
    drawn = sample_weights(weights, uniforms)
    drawn_weights = weights.gather(1, drawn[:, None]).squeeze(1)
    assert (drawn_weights > 0).all()
    sums = weights.double().cumsum(1)
    upper = sums.gather(1, drawn[:, None]).squeeze(1)
    lower = upper - drawn_weights.double()
    threshold = uniforms.double() * sums[:, -1]
    tolerance = 1e-5 * sums[:, -1]
    assert (upper >= threshold - tolerance).all()
    assert (lower <= threshold + tolerance).all()


def test_samples_have_the_softmax_as_frequencies_and_never_a_padded_token():
    logits = torch.randn(1, 1, 192)
    logits[..., 130:] = -math.inf
    count = 40_000
    # evenly spaced instead of random: the error is 1 / count
    uniforms = (torch.arange(count)[None] + 0.5) / count
    drawn = sample_tokens(logits.expand(1, count, 192), uniforms, temperature=0.7)
    frequency = torch.bincount(drawn.flatten(), minlength=192) / count
    torch.testing.assert_close(
        frequency, (logits[0, 0] / 0.7).softmax(-1), rtol=0, atol=2 / count + 1e-5
    )
    assert not frequency[130:].any()


def test_the_deterministic_mode_draws_the_same_tokens():
    weights, uniforms = torch.rand(200, 5000) ** 8, torch.rand(200)
    drawn = sample_weights(weights, uniforms)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(sample_weights(weights, uniforms), drawn)
        torch.testing.assert_close(running_sums(weights), weights.cumsum(-1), rtol=1e-6, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


# --------------------------------------------------------------------------------------------- head


def head_inputs(positions=75, vocab=150, padded=192, width=16):
    """(x, table, bias) and (targets, weights, uniforms, vocab_size) of a vocabulary head."""
    torch.manual_seed(1)
    x, table, bias = torch.randn(positions, width), torch.randn(padded, width), torch.randn(padded)
    weights = (torch.rand(positions) > 0.2).float()
    targets = torch.randint(0, vocab, (positions,))
    return (x, table, bias), (targets, weights, torch.rand(positions), vocab)


def fused_head(
    x, table, bias, targets, weights, uniforms, vocab_size, temperature, with_predictions
):
    rows = {"targets": targets, "weights": weights, "uniforms": uniforms}
    return vocab_head(
        x,
        table,
        bias,
        **rows,
        vocab_size=vocab_size,
        temperature=temperature,
        with_predictions=with_predictions,
    )


def plain_head(x, table, bias, targets, weights, uniforms, vocab_size, *options):
    """fused_head with all logits at once."""
    logits = F.linear(x, table.to(x.dtype), bias.to(x.dtype))  # [M, P]
    padding = torch.arange(len(table)) >= vocab_size
    return logits_head(logits.masked_fill(padding, -math.inf), targets, weights, uniforms, *options)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fused_head_equals_the_plain_head(temperature):
    tensors, rest = head_inputs()
    results = [f(*tensors, *rest, temperature, True) for f in (fused_head, plain_head)]
    assert torch.equal(results[0].sampled, results[1].sampled)
    assert torch.equal(results[0].predicted, results[1].predicted)
    grads = [
        value_and_grads(lambda *t, f=f: 3 * f(*t, *rest, temperature, False).nll.view(1), *tensors)
        for f in (fused_head, plain_head)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    _, _, table_grad, bias_grad = grads[0]
    assert not table_grad[150:].any()  # rows that pad the table have no gradient
    assert not bias_grad[150:].any()


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
def test_fused_head_in_bf16_equals_the_plain_head_up_to_rounding(table_dtype):
    (x, table, bias), rest = head_inputs()
    tensors = x.bfloat16(), table.to(table_dtype), bias.to(table_dtype)
    fused, plain = (
        value_and_grads(lambda *t, f=f: f(*t, *rest, 1.0, False).nll.view(1), *tensors)
        for f in (fused_head, plain_head)
    )
    assert fused[0].dtype == torch.float32
    for a, b, like in zip(fused[1:], plain[1:], tensors, strict=True):
        assert a.dtype == like.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.1)


def test_the_head_without_gradient_computes_none():
    tensors, (targets, weights, uniforms, vocab) = head_inputs()
    shape = (5, 15)
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        result = vocab_head(
            tensors[0].view(*shape, -1),
            *tensors[1:],
            targets=targets.view(shape),
            weights=weights.view(shape),
            uniforms=uniforms.view(shape),
            vocab_size=vocab,
        )
    assert not result.nll.requires_grad
    assert result.sampled.shape == shape
    assert result.predicted is None
