"""Kinds of objectives and of generators: each changes only what its option describes."""

import math

import pytest
import torch
import torch.nn.functional as F
from modern_scenarios import KINDS, MODERN_STEPS
from small_objective import IDS, VOCAB, counts_of, make_batch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.evaluation.detect import Detector
from electra_ds.evaluation.evaluate import evaluate_checkpoint
from electra_ds.model.build import parameter_count
from electra_ds.model.encoder import encode
from electra_ds.model.kernels import vocab_head
from electra_ds.model.losses import Totals
from electra_ds.model.objective import (
    mask_input,
    masked_tokens_mask,
    scatter_tokens,
    uniform_tokens,
)
from electra_ds.reporting.memory import MemoryTracker
from electra_ds.training.metrics import metrics_of_kind
from electra_ds.training.metrics_file import read_metrics, summary

MAIN = {"embeddings", "discriminator"}
GENERATOR = {"generator", "generator_head"}
# The first parts of the names of the parameters of each kind.
PARTS = {
    "electra": MAIN | GENERATOR | {"discriminator_head"},
    "electra_15": MAIN | GENERATOR | {"discriminator_head"},
    "mlm": MAIN | {"mlm_head"},
    "replace_mlm": MAIN | GENERATOR | {"mlm_head"},
    "all_tokens_mlm": MAIN | GENERATOR | {"mlm_head", "copy_gate"},
}


def corrupted(module, batch):
    return scatter_tokens(
        batch.input_ids,
        batch.masked_positions,
        module._draw(batch, False).sampled,
        batch.masked_weights,
    )


@pytest.mark.parametrize(
    ("kind", "generator"), [*((kind, "model") for kind in PARTS), ("electra", "uniform")]
)
def test_a_kind_has_its_parameters_and_the_gradient_reaches_them_all(kind, generator, build):
    module, batch = build(kind=kind, generator=generator), make_batch()
    wanted = PARTS[kind] - (GENERATOR if generator == "uniform" else set())
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == wanted
    module(batch, counts_of(batch)).total.backward()
    assert not [name for name, p in module.named_parameters() if not p.grad.any()]


def test_every_sharing_has_its_parameters_and_the_gradient_reaches_them_all(build):
    shared, untied, whole = (build(sharing=sharing) for sharing in ("shared", "untied", "all"))
    names = []
    for module in (shared, untied, whole):
        batch = make_batch()
        module(batch, counts_of(batch)).total.backward()
        assert not [name for name, p in module.named_parameters() if not p.grad.any()]
        names.append({name.split(".")[0] for name, _ in module.named_parameters()})
    assert names == [
        PARTS["electra"],
        PARTS["electra"] | {"generator_embeddings"},
        PARTS["electra"] - {"generator"},
    ]


@pytest.mark.parametrize("kind", PARTS)
def test_no_tensor_holds_the_logits_of_the_whole_batch(kind, monkeypatch, build):
    """Training, evaluation and detect make no tensor as large as [B, S, V], even in fp32."""
    monkeypatch.setattr(vocab_head, "ROWS_ON_CPU", 8)
    monkeypatch.setattr(vocab_head, "GROUP", 16)  # all_tokens_mlm has 80 positions
    vocab_size = 1000  # larger than every other dimension
    module, batch = build(kind=kind, vocab_size=vocab_size), make_batch(vocab_size=vocab_size)
    with MemoryTracker() as live:
        module(batch, counts_of(batch)).total.backward()
        with torch.no_grad():
            module.eval()(batch, with_counts=True)
            if module.objective.detects:
                module(batch, task="discriminate")
    assert 0 < live.largest < batch.input_ids.numel() * vocab_size * 4


@pytest.mark.parametrize(
    ("preset", "binary_head", "mlm_head"),  # 128 wide: dense, norm, and the last layer
    [
        ("tiny", 128 * 128 + 128 + 128 + 1, 128 * 128 + 128 + 2 * 128 + 101),
        ("modern-tiny", 128 * 128 + 128 + 128 + 1, 128 * 128 + 128 + 101),
        ("deberta-tiny", 128 * 128 + 128 + 128 + 1, 128 * 128 + 3 * 128 + 101),
    ],
)
def test_parameters_are_counted_kind_by_kind(preset, binary_head, mlm_head):
    def count(kind, generator="model"):
        sets = [
            f"objective.kind={kind}",
            f"objective.generator={generator}",
            "model.vocab_size=101",
        ]
        found = parameter_count(load_run(preset, sets))
        assert found.frozen == 0
        return found.discriminator, found.trained

    main, joint = count("electra")
    predicts = main - binary_head + mlm_head
    assert count("electra_15") == (main, joint) and count("electra", "uniform") == (main, main)
    assert count("mlm") == (predicts, predicts)
    assert count("replace_mlm") == (predicts, joint - main + predicts)
    assert count("all_tokens_mlm") == (predicts + 129, joint - main + predicts + 129)


def test_kinds_share_the_masked_positions_the_generator_and_its_samples(build):
    batch = make_batch()
    args = batch, counts_of(batch)
    electra = build()
    for kind in ("electra_15", "replace_mlm", "all_tokens_mlm"):
        other = build(kind=kind, gen_weight=2.0, disc_weight=3.0)
        losses = other(*args)
        assert torch.equal(corrupted(other, batch), corrupted(electra, batch))
        assert torch.equal(losses.mlm_loss, electra(*args).mlm_loss)
        weight = 3.0 if kind == "electra_15" else 1.0  # disc_weight applies only to the binary loss
        torch.testing.assert_close(losses.total, 2 * losses.mlm_loss + weight * losses.disc_loss)


def test_electra_15_is_electra_without_the_terms_of_the_other_positions(build):
    batch = make_batch()
    whole, chosen = (
        build()(batch, with_counts=True),
        build(kind="electra_15")(batch, with_counts=True),
    )
    module = build()
    ids = corrupted(module, batch)
    terms = F.binary_cross_entropy_with_logits(
        module.discriminate(ids, batch), (ids != batch.input_ids).float(), reduction="none"
    )
    others = (batch.document_ids > 0) & (masked_tokens_mask(batch) == 0)
    torch.testing.assert_close(whole.disc_loss - terms[others].sum(), chosen.disc_loss)
    assert (
        chosen.counts.tokens == chosen.counts.masked == 11
        and whole.counts.replaced == chosen.counts.replaced
    )


def test_mlm_is_the_main_encoder_on_masked_rows(build):
    module, batch = build(kind="mlm", gen_weight=7.0, disc_weight=7.0), make_batch()
    losses = module(batch, counts_of(batch))
    masked = mask_input(batch, IDS.mask)
    hidden = encode(module.embeddings, module.discriminator, masked, batch)
    logits = module.mlm_head(hidden, module.embeddings.word)
    at = masked_tokens_mask(batch) > 0
    torch.testing.assert_close(losses.mlm_loss, F.cross_entropy(logits[at], batch.input_ids[at]))
    assert losses.disc_loss == 0 and torch.equal(losses.total, losses.mlm_loss)


@pytest.mark.parametrize("kind", ["replace_mlm", "all_tokens_mlm"])
def test_predicting_kinds_are_the_dense_computation_in_fp64(kind, monkeypatch, build):
    monkeypatch.setattr(vocab_head, "GROUP", 64)  # 80 positions: two groups
    module, batch = build(kind=kind, gen_weight=0.0), make_batch()
    module(batch, counts_of(batch)).total.backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    ids = corrupted(module, batch)
    loss = module(batch, counts_of(batch)).disc_loss

    dense = build(kind=kind).double()
    hidden = encode(dense.embeddings, dense.discriminator, ids, batch)
    likely = dense.mlm_head(hidden, dense.embeddings.word).softmax(-1)  # [B, S, V]
    likely = likely.gather(2, batch.input_ids[..., None]).squeeze(2)
    is_predicted = masked_tokens_mask(batch) > 0
    if kind == "all_tokens_mlm":
        copy = dense.copy_gate(hidden).squeeze(2).sigmoid()
        likely = copy * (ids == batch.input_ids) + (1 - copy) * likely
        is_predicted = batch.document_ids > 0
    expected = -likely[is_predicted].log().mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for name, p in dense.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name].double(), p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("special", [[0, 1, 2, 3, 4], [0, 60, 61, 62, 100]])
def test_uniform_samples_are_equally_likely_and_never_special(special):
    count, ordinary = 96_000, sorted({*range(VOCAB)} - {*special})
    uniforms = (torch.arange(count) + 0.5) / count
    frequency = torch.bincount(uniform_tokens(uniforms, VOCAB, special), minlength=VOCAB)
    assert not frequency[special].any() and set(frequency[ordinary].tolist()) == {1000}
    for index in (0, 50, 95):  # the first, one between, the last
        avoid = torch.full((count,), ordinary[index])
        frequency = torch.bincount(uniform_tokens(uniforms, VOCAB, special, avoid), minlength=VOCAB)
        assert not frequency[[*special, ordinary[index]]].any() and frequency.sum() == count
        assert set(frequency[ordinary[:index] + ordinary[index + 1 :]].tolist()) <= {1010, 1011}
    unknown = uniform_tokens(
        uniforms, VOCAB, special, torch.full((count,), special[1])
    )  # a special token is never drawn
    assert torch.equal(unknown, uniform_tokens(uniforms, VOCAB, special))


def test_a_disallowed_original_is_never_drawn_and_changes_nothing_else(build):
    batch = make_batch()
    batch.input_ids[0, batch.masked_positions[0]] = 50  # with generators that predict 50
    plain, strict = build(temperature=0.05), build(temperature=0.05, disallow_correct=True)
    for module in (plain, strict):
        with torch.no_grad():
            module.generator_head.bias[50] = 30.0
    targets = batch.input_ids.gather(1, batch.masked_positions)
    assert torch.equal(plain(batch, Totals(9, 9)).mlm_loss, strict(batch, Totals(9, 9)).mlm_loss)
    used = batch.masked_weights > 0
    hits = (plain._draw(batch, False).sampled == targets) & used
    assert hits.any() and not ((strict._draw(batch, False).sampled == targets) & used).any()
    for temperature in (1.0, 0.7):  # the softmax without the target, on a grid of uniforms
        logits, target = torch.randn(1, 128), torch.full((20_000,), 7)
        uniforms = (torch.arange(20_000) + 0.5) / 20_000
        x, table = torch.ones(20_000, 1), logits.T.contiguous()
        rows = {"targets": target, "weights": torch.ones(20_000), "uniforms": uniforms}
        options = {"vocab_size": 128, "temperature": temperature, "disallow_target": True}
        drawn = vocab_head.vocab_head(x, table, torch.zeros(128), **rows, **options).sampled
        expected = (logits[0] / temperature).index_fill(0, torch.tensor([7]), -math.inf).softmax(-1)
        torch.testing.assert_close(
            torch.bincount(drawn, minlength=128) / 20_000, expected, rtol=0, atol=2e-4
        )


def test_options_without_meaning_are_refused():
    with pytest.raises(UserError, match="objective: kind mlm replaces nothing"):
        load_run("tiny", ["objective.kind=mlm", "objective.generator=uniform"])


def test_metrics_that_a_kind_does_not_have_are_left_out():
    names = "loss mlm_loss mlm_accuracy sampled_accuracy disc_loss replaced_fraction"
    names += " disc_auc base_rate_loss fixed_auc"
    values = dict.fromkeys([*names.split(), "unigram_loss", "lr"], 0.0)

    def missing(**options):
        return values.keys() - metrics_of_kind(values, ObjectiveConfig(**options)).keys()

    detecting = {"disc_auc", "base_rate_loss", "fixed_auc"}
    assert missing() == missing(kind="electra_15") == set()
    assert missing(kind="mlm") == detecting | {"disc_loss", "sampled_accuracy", "replaced_fraction"}
    assert missing(kind="replace_mlm") == missing(kind="all_tokens_mlm") == detecting
    assert missing(generator="uniform") == {"mlm_loss", "mlm_accuracy", "sampled_accuracy"}
    assert summary({"mlm_loss": 2.0, "unigram_loss": 3.0, "mlm_accuracy": 0.5}) == (
        "mlm 2.000 (unigram 3.000)  accuracy 0.500"
    )


# ----------------------------------------------------------------------------------- real training


def losses(run):
    return [
        [r["loss"], r["grad_norm"]]
        for r in read_metrics(run / "metrics.jsonl")
        if r["split"] == "train"
    ]


@pytest.mark.parametrize("kind", [*sorted(PARTS.keys() - {"electra"}), "uniform"])
def test_a_kind_trains_and_resumes_at_another_stage(kind_runs, data, kind):
    whole, on_progress = losses(kind_runs / f"{kind}-whole"), losses(kind_runs / f"{kind}-moved")
    assert len(whole) == 20 and sum(x for x, _ in whole[:5]) > sum(x for x, _ in whole[-5:])
    torch.testing.assert_close(torch.tensor(on_progress), torch.tensor(whole), rtol=1e-5, atol=0)
    values = evaluate_checkpoint(kind_runs / f"{kind}-whole", data, max_rows=20)
    valid = read_metrics(kind_runs / f"{kind}-whole" / "metrics.jsonl")[-1]
    assert values.keys() == valid.keys() - {"step", "split"}
    assert all(math.isfinite(value) for key, value in values.items() if key.endswith("loss"))
    if kind.endswith("mlm"):
        with pytest.raises(UserError, match=f"objective.kind = {kind} predicts tokens"):
            Detector.load(kind_runs / f"{kind}-whole")


@pytest.mark.parametrize("name", ["modern", "deberta"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_other_architectures_trains_resumes_and_is_evaluated(kind_runs, data, kind, name):
    run = kind_runs / f"{name}-{kind}"
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"] == [
        *range(1, MODERN_STEPS + 1)
    ]
    assert all(math.isfinite(value) for pair in losses(run) for value in pair)
    values = evaluate_checkpoint(run, data, max_rows=8)
    # JSON has no NaN, such as the precision of a detector that found nothing.
    valid = {k: v for k, v in read_metrics(run / "metrics.jsonl")[-1].items() if v is not None}
    assert valid.keys() >= {"unigram_loss", "tokens"}
    for key in values.keys() & valid.keys():
        assert values[key] == pytest.approx(valid[key], rel=1e-4), key


def test_a_factory_trains_stops_and_resumes_like_the_uninterrupted_run(kind_runs, data):
    whole, cut = kind_runs / "own-whole", kind_runs / "own-cut"
    assert len(losses(whole)) == 20 and losses(whole) == losses(cut)
    with pytest.raises(UserError, match=r"own_pair:build.*--trust-code"):
        evaluate_checkpoint(whole, data, max_rows=20)
    values = evaluate_checkpoint(whole, data, max_rows=20, trust_code=True)
    assert math.isfinite(values["disc_loss"]) and 0 < values["fixed_auc"] < 1
