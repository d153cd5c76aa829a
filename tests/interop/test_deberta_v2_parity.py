"""Logits, hidden states and gradients of both encoders equal those of transformers' DeBERTa-v2."""

import pytest
import small_objective
import torch
from small_objective import IDS
from stock_parity import (
    BOUND,
    ROWS,
    batch_of,
    by_document,
    noisy_pair,
    our_logits,
    relative,
)

from electra_ds.interop.hf_deberta_v2 import DebertaV2Format
from electra_ds.model.encoder import encode
from electra_ds.model.kernels.disentangled import distance_rows
from electra_ds.model.weights import load_true_state, true_state

transformers = pytest.importorskip("transformers")
HF = DebertaV2Format()
CASES = {
    "fewer buckets than distances": {},
    "two buckets": {"position_buckets": 2},
    "a row of the table for every distance": {"position_buckets": 38},
    "one distance more than rows of the table": {"position_buckets": 36},
    "rows longer than max_positions": {"max_positions": 12},
    "steps of whole numbers": {"max_positions": 33},  # log(32 / 4) / log(2) = 3
    "four heads": {"num_heads": 4},
    "one head": {"num_heads": 1},
}


def pair(sharing="shared", **changes):
    """(model, generator, objective with noise on every parameter)."""
    return noisy_pair(*small_objective.deberta_configs(sharing=sharing), **changes)


def logits_of(model, ids, **inputs):
    """Logits [B, S, ...] of a stock class; of a discriminator as the card computes them."""
    if not hasattr(model, "pooler"):
        return model(ids, **inputs).logits
    hidden = model.deberta(ids, **inputs).last_hidden_state
    return model.classifier(model.pooler(hidden.flatten(0, 1)[:, None])).view(*ids.shape, 1)


def stock_logits(model, batch):
    """The logits of each document alone, in the places of the rows; 0 at padding."""
    return by_document(batch, lambda ids: logits_of(model, ids))


def stock(model, generator, part, **changes):
    role = "detection" if part == "discriminator" else "prediction"
    values = HF.config(model, generator if part == "generator" else None, IDS, role)
    config = transformers.DebertaV2Config(**values | changes)
    return getattr(transformers, config.architectures[0])(config).eval()


def load_ours(model, state):
    """Load tensors into a stock class: no name is unknown, and none is missing but copies."""
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= HF.copies.keys()
    model.tie_weights()


def assert_equal_gradients(objective, theirs, part):
    rows_of = {name: len(value) for name, value in true_state(objective).items()}
    gradients = {
        name: p.grad[: rows_of[name]]
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    found, compared = HF.to_hf(gradients, part), dict(theirs.named_parameters())
    assert found.keys() - compared.keys() <= {HF.output_matrix}
    for name, p in compared.items():
        largest = float(p.grad.abs().max())
        assert largest > 0, name
        assert float((found[name] - p.grad).abs().max()) <= BOUND * largest, name


@pytest.mark.parametrize("part", ["discriminator", "generator"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_all_parameters_are_equal(case, rows, part):
    model, generator, objective = pair(**CASES[case])
    theirs, batch = stock(model, generator, part), batch_of(ROWS[rows])
    load_ours(theirs, HF.to_hf(true_state(objective), part))
    real = batch.document_ids > 0
    ours, expected = our_logits(objective, batch, part)[real], stock_logits(theirs, batch)[real]
    assert relative(ours.detach(), expected.detach()) <= BOUND
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (ours * weights).sum().backward()
    assert_equal_gradients(objective, theirs, part)


@pytest.mark.parametrize("documents", [[[150], [71]], [[80, 70], [64, 1, 65]]])
def test_rows_of_several_blocks_are_equal(documents):
    """Rows longer than a block of the kernel, of one document and of several."""
    model, generator, objective = pair(max_positions=150, position_buckets=16)
    theirs, batch = stock(model, generator, "discriminator"), batch_of(documents, 150)
    load_ours(theirs, HF.to_hf(true_state(objective), "discriminator"))
    real = batch.document_ids > 0
    ours = our_logits(objective, batch, "discriminator")[real]
    expected = stock_logits(theirs, batch)[real]
    assert relative(ours.detach(), expected.detach()) <= BOUND
    expected.square().sum().backward()
    ours.square().sum().backward()
    assert_equal_gradients(objective, theirs, "discriminator")


@pytest.mark.parametrize("max_positions", [5, 12, 33, 40, 512])
@pytest.mark.parametrize("buckets", [2, 4, 6, 256])
def test_the_rows_of_distances_are_those_of_transformers(buckets, max_positions):
    from transformers.models.deberta_v2 import modeling_deberta_v2

    if max_positions - 1 <= buckets // 2:
        return
    for length in (1, 2, 33, 150, 600):
        states = torch.zeros(1, length, 4)
        expected = modeling_deberta_v2.build_relative_position(
            states, states, buckets, max_positions
        )[0]
        expected = (expected + buckets).clamp(0, 2 * buckets - 1)
        places = torch.arange(length)
        found = distance_rows(length, buckets, max_positions)
        assert torch.equal(found[places - places[:, None] + length - 1], expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", ["full", "padded"])
@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_hidden_states_are_those_of_the_stock_encoder(sharing, rows):
    model, generator, objective = pair(sharing)
    batch = batch_of(ROWS[rows])
    real = batch.document_ids > 0
    for part in ("discriminator", "generator"):
        theirs = stock(model, generator, part)
        load_ours(theirs, HF.to_hf(true_state(objective), part))
        if part == "discriminator":
            embeddings, encoder = objective.embeddings, objective.discriminator
        else:
            embeddings, encoder, _ = objective._generator_parts()
        ours = encode(embeddings, encoder, batch.input_ids, batch)
        hidden = theirs.deberta(batch.input_ids, attention_mask=real.long()).last_hidden_state
        assert relative(ours[real], hidden[real]) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("part", ["discriminator", "generator"])
@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_logits_are_equal_after_conversion_from_the_stock_class(sharing, part, legacy):
    if not legacy and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 ties the dense layer of this head to the word table")
    model, generator, objective = pair(sharing)
    theirs, batch = stock(model, generator, part, legacy=legacy), batch_of(ROWS["padded"])
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    state = HF.from_hf(theirs.state_dict(), true_state(objective), part)
    load_true_state(objective, state, partial=True)
    real = batch.document_ids > 0
    ours = our_logits(objective, batch, part)
    padded = logits_of(theirs, batch.input_ids, attention_mask=real.long())
    assert relative(ours[real], padded[real]) <= BOUND
    names = HF.stock_names(theirs.state_dict()).values()
    written = HF.to_hf(true_state(objective), part).keys()
    assert written - set(names) <= {HF.output_matrix} and set(names) - written <= HF.copies.keys()


@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
@pytest.mark.parametrize("case", CASES)
def test_sizes_are_unchanged_by_conversion_to_config_json_and_back(case, sharing):
    model, generator, _ = pair(sharing, **CASES[case])
    if sharing == "all":
        generator = type(generator)(**model.model_dump(include=set(type(generator).model_fields)))
    main = HF.config(model, None, IDS, "detection")
    other = HF.config(model, generator, IDS, "prediction")
    kept = {"init": "normal", "embedding_init_std": 0.02}  # not in config.json
    # Tensors, not sizes, tell one shared encoder from two.
    kept["sharing"] = "untied" if sharing == "untied" else "shared"
    assert HF.parse(main, other) == (model.model_copy(update=kept), generator)
    config = transformers.DebertaV2Config(**main)
    assert config.num_labels == 1 and config.id2label == {0: "replaced"}
    assert HF.parse(config.to_dict()) == HF.parse(main)
