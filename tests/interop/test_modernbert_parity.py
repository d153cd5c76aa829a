"""Logits and gradients of both encoders equal those of transformers' ModernBERT classes."""

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

from electra_ds.interop.hf_modernbert import ModernBertFormat
from electra_ds.model.encoder import encode
from electra_ds.model.weights import load_true_state, true_state

transformers = pytest.importorskip("transformers")
IS_VERSION_4 = transformers.__version__.startswith("4.")
HF = ModernBertFormat()
CASES = {
    "window smaller than a row": {},
    "window larger than a row": {"local_attention": 64},
    "window of two neighbours": {"local_attention": 2},
    "four heads": {"num_heads": 4},
    "one head": {"num_heads": 1},
    "other bases": {"global_theta": 160_000.0, "local_theta": 10.0},
    "global layers only": {"attention_pattern": ["global"]},
    "a local layer first": {"attention_pattern": ["local", "global"]},
    "two global layers in turn": {"attention_pattern": ["global", "global", "local"]},
}


def pair(sharing="shared", **changes):
    """(model, generator, objective with noise on every parameter)."""
    return noisy_pair(*small_objective.modernbert_configs(sharing=sharing), **changes)


def stock_logits(model, batch):
    """The logits of each document alone, in the places of the rows; 0 at padding."""
    return by_document(batch, lambda ids: model(ids).logits)


def config_of(model, generator, part):
    role = "detection" if part == "discriminator" else "prediction"
    return HF.config(model, generator if part == "generator" else None, IDS, role)


def stock(model, generator, part):
    config = transformers.ModernBertConfig(**config_of(model, generator, part))
    return getattr(transformers, config.architectures[0])(config).eval()


@pytest.mark.parametrize("part", ["discriminator", "generator"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_all_parameters_are_equal(case, rows, part):
    model, generator, objective = pair(**CASES[case])
    if IS_VERSION_4 and HF.requirement(config_of(model, generator, part)):
        with pytest.raises(TypeError):
            stock(model, generator, part)
        return
    theirs, batch = stock(model, generator, part), batch_of(ROWS[rows])
    state = HF.to_hf(true_state(objective), part)
    theirs.load_state_dict(state)  # strict: no name is missing or unknown
    theirs.tie_weights()
    real = batch.document_ids > 0
    ours, expected = our_logits(objective, batch, part)[real], stock_logits(theirs, batch)[real]
    assert relative(ours.detach(), expected.detach()) <= BOUND
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (ours * weights).sum().backward()
    rows_of = {name: len(value) for name, value in true_state(objective).items()}
    gradients = {
        name: p.grad[: rows_of[name]]
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    found = HF.to_hf(gradients, part)
    compared = dict(theirs.named_parameters())
    assert found.keys() - compared.keys() <= {HF.output_matrix}
    for name, p in compared.items():
        largest = float(p.grad.abs().max())
        assert largest > 0, name
        assert float((found[name] - p.grad).abs().max()) <= BOUND * largest, name


@torch.no_grad()
@pytest.mark.parametrize("part", ["discriminator", "generator"])
@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_logits_are_equal_after_conversion_from_the_stock_class(sharing, part):
    model, generator, objective = pair(sharing)
    theirs, batch = stock(model, generator, part), batch_of(ROWS["padded"])
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    state = HF.from_hf(theirs.state_dict(), true_state(objective), part)
    load_true_state(objective, state, partial=True)
    real = batch.document_ids > 0
    if part == "generator":
        embeddings = objective.generator_embeddings if sharing == "untied" else objective.embeddings
        encoder = objective.discriminator if sharing == "all" else objective.generator
        hidden = encode(embeddings, encoder, batch.input_ids, batch)
        ours = objective.generator_head(hidden, embeddings.word)
    else:
        ours = our_logits(objective, batch, part)
    padded = theirs(batch.input_ids, attention_mask=real.long()).logits
    assert relative(ours[real], padded[real]) <= BOUND
    assert HF.to_hf(true_state(objective), part).keys() == theirs.state_dict().keys()


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
    expected = model.model_copy(update=kept)
    assert HF.parse(main, other) == (expected, generator)
    version_4 = [without(config, "layer_types", "rope_parameters") for config in (main, other)]
    version_5 = [
        without(config, "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
        for config in (main, other)
    ]
    assert HF.parse(*version_5) == (expected, generator)
    if all(config["global_attn_every_n_layers"] for config in (main, other)):
        assert HF.parse(*version_4) == (expected, generator)
    else:
        assert case in ("a local layer first", "two global layers in turn")
        assert "transformers 5" in HF.requirement(main)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("case", CASES)
def test_config_json_means_the_same_to_the_stock_class(case):
    """What transformers derives from the keys of one version is what the other keys say."""
    model, _, _ = pair(**CASES[case])
    values = HF.config(model, None, IDS, "detection")
    stock = transformers.ModernBertConfig(**values)
    assert stock.num_labels == 1 and stock.id2label == {0: "replaced"}
    assert HF.parse(stock.to_dict()) == HF.parse(values)
    if not IS_VERSION_4 and values["global_attn_every_n_layers"]:
        older = without(values, "layer_types", "rope_parameters")
        stock = transformers.ModernBertConfig(**older)
        assert stock.layer_types == values["layer_types"]
        assert stock.rope_parameters == values["rope_parameters"]
