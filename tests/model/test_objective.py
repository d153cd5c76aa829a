"""The ELECTRA objective: masking, samples, labels, losses and counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from small_objective import IDS, counts_of, make_batch

from electra_ds.data.batch import Batch
from electra_ds.model.encoder import encode
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.losses import BINS, Totals, histogram
from electra_ds.model.objective import mask_input, scatter_tokens
from electra_ds.training.metrics import auc


def rows_of(batch: Batch, rows: slice) -> Batch:
    return batch.map(lambda tensor: tensor[rows])


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "full"])
@pytest.mark.parametrize("with_counts", [False, True])
def test_a_step_on_a_device_copies_nothing_to_the_host(is_packed, with_counts, monkeypatch, build):
    """Reading a tensor without data on the host raises, where reading one on a GPU waits for it."""
    # There is no autocast for tensors of the device "meta".
    for module in ("heads", "electra", "modernbert", "deberta_v2"):
        monkeypatch.setattr(f"electra_ds.model.{module}.compute_dtype", lambda x: x.dtype)
    module, batch = build(dropout=0.1), make_batch()
    if not is_packed:
        batch = batch._replace(document_ids=torch.ones_like(batch.document_ids))
    batch = with_cu_seqlens(batch).map(lambda tensor: tensor.to("meta"))
    losses = module.to("meta")(batch, Totals(12, 70), with_counts=with_counts)
    losses.total.backward()
    assert losses.total.device.type == "meta"
    assert all(p.grad is not None for p in module.parameters())


def test_masked_positions_become_mask_unless_they_keep_their_token():
    batch = make_batch()
    masked = mask_input(batch, IDS.mask)
    expected = batch.input_ids.clone()
    for b in range(4):
        for position, weight, keep in zip(
            batch.masked_positions[b], batch.masked_weights[b], batch.keep_original[b], strict=True
        ):
            if weight and not keep:
                expected[b, position] = IDS.mask
    assert torch.equal(masked, expected)


def test_losses_equal_their_definition(build):
    module, batch = build(), make_batch()
    masked_count, token_count = counts_of(batch)
    losses = module(batch, Totals(masked_count, token_count))

    masked = mask_input(batch, IDS.mask)
    hidden = encode(module.embeddings, module.generator, masked, batch)
    logits = module.generator_head(hidden, module.embeddings.word)  # at every position
    corrupted, nll = batch.input_ids.clone(), 0.0
    for b in range(4):
        for k in range(4):
            if batch.masked_weights[b, k]:
                position = batch.masked_positions[b, k]
                distribution = logits[b, position].softmax(-1)
                nll = nll - distribution[batch.input_ids[b, position]].log()
                corrupted[b, position] = (distribution.cumsum(0) <= batch.uniforms[b, k]).sum()
    disc_logits = module.discriminate(corrupted, batch)
    real, label = batch.document_ids > 0, (corrupted != batch.input_ids).float()
    disc_loss = F.binary_cross_entropy_with_logits(disc_logits[real], label[real])
    torch.testing.assert_close(losses.mlm_loss, nll / masked_count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.disc_loss, disc_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.total, losses.mlm_loss + 50 * losses.disc_loss)
    assert all(value.dtype == torch.float32 for value in losses[:3]) and losses.counts is None


def test_losses_of_micro_batches_add_up_to_those_of_the_whole_batch(build):
    batch, grads, sums = make_batch(), [], []
    for slices in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        module = build()
        parts = [
            module(rows_of(batch, rows), counts_of(batch), with_counts=True) for rows in slices
        ]
        sum(losses.total for losses in parts).backward()
        grads.append([p.grad for p in module.parameters()])
        sums.append(
            [sum(value) for value in zip(*(losses.counts for losses in parts), strict=True)]
        )
    for whole, halves in zip(*grads, strict=True):
        torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-6)
    for whole, halves in zip(*sums, strict=True):
        assert torch.equal(whole, halves)


def test_the_generator_loss_is_zero_without_masked_positions(build):
    module, batch = build(), rows_of(make_batch(), slice(3, 4))
    losses = module(batch, Totals(7, counts_of(batch).token_count))
    losses.total.backward()
    assert float(losses.mlm_loss) == 0 and torch.isfinite(losses.total)
    assert not module.generator_head.dense.weight.grad.any()


def test_padding_has_no_effect_on_the_losses(build):
    module, batch = build(), make_batch()
    other = batch._replace(input_ids=torch.where(batch.document_ids > 0, batch.input_ids, 77))
    assert torch.equal(module(batch, Totals(9, 9)).total, module(other, Totals(9, 9)).total)


def test_the_same_batch_gives_the_same_bits(build):
    module, batch = build(), make_batch()
    first, second = module(batch, Totals(9, 9), with_counts=True), module(batch, Totals(9, 9))
    assert torch.equal(first.total, second.total)


def test_no_gradient_passes_through_the_samples(build):
    module, batch = build(gen_weight=0.0), make_batch()
    module(batch, counts_of(batch)).total.backward()
    for name, p in module.named_parameters():
        if name.startswith("generator"):
            assert not p.grad.any(), name
    assert module.embeddings.word.weight.grad.any()


def test_loss_weights_and_temperature_change_only_what_they_scale(build):
    batch = make_batch()
    args = batch, counts_of(batch)
    plain, weighted, hot = (
        build(**o)(*args)
        for o in ({}, {"gen_weight": 2.0, "disc_weight": 3.0}, {"temperature": 9.0})
    )
    assert torch.equal(plain.mlm_loss, weighted.mlm_loss) and torch.equal(
        plain.disc_loss, weighted.disc_loss
    )
    torch.testing.assert_close(weighted.total, 2 * plain.mlm_loss + 3 * plain.disc_loss)
    assert torch.equal(plain.mlm_loss, hot.mlm_loss)  # the temperature affects the samples only
    assert not torch.equal(plain.disc_loss, hot.disc_loss)


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_layers_give_the_same_bits(bf16, build):
    """Loss and gradients of both encoders, with dropout, documents and padding."""
    batch, found = make_batch(), []
    for recompute in (False, True):
        module = build(dropout=0.2)
        module.recompute_layers(recompute)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module(batch, counts_of(batch)).total
        loss.backward()
        found.append([loss, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_is_applied_in_training_only(build):
    module, batch = build(dropout=0.3), make_batch()
    assert not torch.equal(module(batch).total, module(batch).total)
    module.eval()
    assert torch.equal(module(batch).total, module(batch).total)


def test_forward_returns_the_logits_of_discriminate(build):
    module, batch = build(), make_batch()
    assert torch.equal(
        module(batch, task="discriminate"), module.discriminate(batch.input_ids, batch)
    )


@pytest.mark.parametrize("kind", ["bf16", "fp16", "autocast"])
def test_half_precisions_return_fp32_losses_close_to_those_of_fp32(kind, build):
    module, batch = build().eval(), make_batch()
    exact = module(batch, counts_of(batch))
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            losses = module(batch, counts_of(batch), with_counts=True)
    else:
        losses = module.to({"bf16": torch.bfloat16, "fp16": torch.float16}[kind])(
            batch, counts_of(batch), with_counts=True
        )
    losses.total.backward()
    assert all(value.dtype == torch.float32 for value in losses[:3])
    torch.testing.assert_close(losses.mlm_loss, exact.mlm_loss, rtol=0.02, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_weights_that_are_nan_give_a_loss_that_is_not_finite(build):
    module, batch = build(), make_batch()
    with torch.no_grad():
        module.embeddings.norm.weight[0] = float("nan")
    losses = module(batch, counts_of(batch), with_counts=True)
    losses.total.backward()
    assert not torch.isfinite(losses.total)


# ------------------------------------------------------------------------------------------- counts


def test_counts_equal_their_definition(build):
    module, batch = build(temperature=0.05), make_batch(seed=3)
    batch.input_ids[0, batch.masked_positions[0]] = 50  # with a generator that predicts 50
    with torch.no_grad():
        module.generator_head.bias[50] = 30.0
    counts = module(batch, Totals(9, 9), with_counts=True).counts
    drawn = module.generate(mask_input(batch, IDS.mask), batch, with_predictions=True)
    corrupted = scatter_tokens(
        batch.input_ids, batch.masked_positions, drawn.sampled, batch.masked_weights
    )
    real, replaced = batch.document_ids > 0, corrupted != batch.input_ids
    prediction = module.discriminate(corrupted, batch) > 0
    used = batch.masked_weights > 0
    targets = batch.input_ids.gather(1, batch.masked_positions)
    expected = {
        "masked": used.sum(),
        "tokens": real.sum(),
        "mlm_correct": ((drawn.predicted == targets) & used).sum(),
        "sampled_correct": ((drawn.sampled == targets) & used).sum(),
        "replaced": replaced.sum(),
        "true_positive": (replaced & prediction & real).sum(),
        "false_positive": (~replaced & prediction & real).sum(),
        "false_negative": (replaced & ~prediction & real).sum(),
    }
    assert {name: int(getattr(counts, name)) for name in expected} == {
        n: int(v) for n, v in expected.items()
    }
    assert expected["sampled_correct"] >= 4  # samples that equal the original are not replaced
    assert expected["replaced"] < expected["masked"]
    assert counts.histogram.sum(1).tolist() == [int((real & ~replaced).sum()), int(replaced.sum())]


def test_the_auc_of_the_histogram_equals_that_of_scikit_learn():
    torch.manual_seed(0)
    label = torch.rand(50, 40) > 0.85
    logits = torch.randn(50, 40) * 3 + label * 2
    logits[0, 0], logits[0, 1] = 1e6, -1e6  # clipped to the outer bins
    real = (torch.rand(50, 40) > 0.1).double()
    sums = histogram(logits, label, real)
    assert sums.shape == (2, BINS)
    assert float(sums.sum()) == float(real.sum())
    expected = roc_auc_score(label[real > 0].numpy(), logits[real > 0].numpy())
    assert auc(sums) == pytest.approx(expected, abs=1e-3)


def test_the_auc_is_nan_without_tokens_and_a_half_for_equal_logits():
    label = torch.tensor([[True, False, True, False]])
    assert math.isnan(auc(histogram(torch.zeros(1, 4), label, torch.zeros(1, 4))))
    assert auc(histogram(torch.zeros(1, 4), label, torch.ones(1, 4))) == 0.5
