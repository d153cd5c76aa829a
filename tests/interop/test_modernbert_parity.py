"""Logits and gradients of both encoders equal those of transformers' ModernBERT classes."""

import pytest
import small_objective
import torch
from small_objective import IDS

from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.batch import Batch
from electra_ds.interop.hf_modernbert import ModernBertFormat
from electra_ds.model.encoder import encode
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import load_true_state, true_state

transformers = pytest.importorskip("transformers")
IS_VERSION_4 = transformers.__version__.startswith("4.")
HF = ModernBertFormat()
BOUND = 1e-5  # relative to the largest value, fp32
LENGTH = 20
# Lengths of the documents of each row; the rest of a row is padding.
ROWS = {
    "full": [[20], [20], [20]],
    "padded": [[20], [12], [3]],
    "packed": [[9, 11], [1, 5, 14], [7, 8]],
}
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
    model, generator = small_objective.modernbert_configs(sharing=sharing)
    model = type(model).model_validate(model.model_dump() | changes)
    objective = ElectraObjective(model, generator, ObjectiveConfig(), IDS, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model, generator, objective


def batch_of(documents):
    """A batch of rows that hold documents of these lengths."""
    ids = torch.randint(5, small_objective.VOCAB, (len(documents), LENGTH))
    document_ids, position_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths, 1):
            document_ids[row, start : start + length] = number
            position_ids[row, start : start + length] = torch.arange(length)
            start += length
        ids[row, start:] = IDS.pad
    none = torch.zeros(len(documents), 1)
    zeros = torch.zeros_like(ids)
    batch = Batch(ids, zeros, document_ids, position_ids, none.long(), none, none > 0, none)
    return with_cu_seqlens(batch)


def our_logits(objective, batch, part):
    if part == "discriminator":
        return objective.discriminate(batch.input_ids, batch)[..., None]
    embeddings, encoder, head = objective._generator_parts()
    return head(encode(embeddings, encoder, batch.input_ids, batch), embeddings.word)


def stock_logits(model, batch):
    """The logits of each document alone, in the places of the rows; 0 at padding."""
    rows = []
    for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True):
        sizes = torch.bincount(documents)[1:].tolist()
        logits = [model(part[None]).logits[0] for part in ids[: sum(sizes)].split(sizes)]
        logits.append(torch.zeros(LENGTH - sum(sizes), logits[0].shape[-1]))
        rows.append(torch.cat(logits))
    return torch.stack(rows)


def config_of(model, generator, part):
    role = "detection" if part == "discriminator" else "prediction"
    return HF.config(model, generator if part == "generator" else None, IDS, role)


def stock(model, generator, part):
    config = transformers.ModernBertConfig(**config_of(model, generator, part))
    return getattr(transformers, config.architectures[0])(config).eval()


def relative(ours, theirs):
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))


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
