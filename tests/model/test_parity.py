"""The objective equals the authors' TensorFlow code and the classes of transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import ElectraGeneratorConfig, ElectraModelConfig
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.batch import Batch
from electra_ds.interop.hf_electra import ElectraFormat
from electra_ds.interop.tf import as_tensors, tf_names
from electra_ds.model.objective import (
    ElectraObjective,
    discriminator_nll,
    gather_positions,
    scatter_tokens,
)
from electra_ds.model.weights import load_true_state, true_state

DATA = Path(__file__).parents[1] / "files" / "tf_reference"
IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
HF = ElectraFormat()
ROLES = {"discriminator": "detection", "generator": "prediction"}
BOUND = 1e-5  # relative, fp32


def relative(ours: torch.Tensor, theirs: torch.Tensor, minimum: float = 0.0) -> float:
    """The largest difference, relative to the largest value of theirs, or to a larger minimum."""
    return float((ours - theirs).detach().abs().max()) / max(float(theirs.abs().max()), minimum)


@pytest.fixture(scope="module")
def reference():
    values = np.load(DATA / "reference.npz")
    tensors = {k: torch.tensor(values[k]) for k in values.files}
    return {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}


@pytest.fixture
def authors_model():
    sizes = dict(num_layers=2, **NO_DROPOUT)
    model = ElectraModelConfig(
        hidden_size=128, num_heads=2, ffn_size=512, embedding_size=32, vocab_size=600, **sizes
    )
    generator = ElectraGeneratorConfig(hidden_size=64, num_heads=1, ffn_size=256, **sizes)
    objective = ElectraObjective(model, generator, ObjectiveConfig(), IDS, seed=0)
    variables = as_tensors(np.load(DATA / "weights.npz"))
    state = {
        name: torch.cat([variables[f] for f in tf_names(name)]) for name in true_state(objective)
    }
    load_true_state(objective, state)
    return objective


def authors_batch(ref) -> Batch:
    rows, length = ref["input_ids"].shape
    return Batch(
        input_ids=ref["input_ids"],
        segment_ids=ref["segment_ids"],
        document_ids=ref["input_mask"],
        position_ids=torch.arange(length).expand(rows, -1),
        masked_positions=ref["masked_positions"],
        masked_weights=ref["masked_weights"],
        keep_original=torch.zeros_like(ref["masked_positions"], dtype=torch.bool),
        uniforms=torch.full(ref["masked_positions"].shape, 0.5),
    )


def test_losses_logits_and_all_gradients_equal_those_of_the_authors_code(reference, authors_model):
    ref, batch = reference, authors_batch(reference)
    mlm_loss = (
        authors_model.generate(ref["masked_input_ids"], batch).nll / ref["masked_weights"].sum()
    )
    logits = authors_model.discriminate(ref["disc_input_ids"], batch)
    is_replaced = ref["disc_input_ids"] != ref["input_ids"]
    disc_loss = discriminator_nll(logits, is_replaced, batch.document_ids) / ref["input_mask"].sum()
    total = mlm_loss + 50 * disc_loss
    total.backward()

    real = ref["input_mask"] > 0
    assert torch.equal(is_replaced[real], ref["disc_labels"][real] > 0)
    assert relative(logits.sigmoid()[real], ref["disc_probs"][real]) <= BOUND
    for ours, name in ((mlm_loss, "mlm_loss"), (disc_loss, "disc_loss"), (total, "total_loss")):
        assert relative(ours, ref[name]) <= BOUND, name
    compared = set()
    for name, p in authors_model.named_parameters():
        variables = tf_names(name)
        for variable, grad in zip(variables, p.grad.chunk(len(variables)), strict=True):
            theirs = ref["grad/" + variable]
            if not variable.endswith("kernel"):
                assert not grad[len(theirs) :].any()  # rows that pad the word table
            ours = grad.T if variable.endswith("kernel") else grad[: len(theirs)]
            # A constant added to all keys changes no softmax: the gradient is 0 up to rounding.
            minimum = float(ref["grad/" + variable.replace("/key/", "/query/")].abs().max())
            assert relative(ours, theirs, minimum) <= BOUND, variable
            compared.add("grad/" + variable)
    assert compared == {k for k in ref if k.startswith("grad/")}


def test_logits_at_masked_positions_equal_those_of_the_authors_code(reference, authors_model):
    ref, batch = reference, authors_batch(reference)
    embedded = authors_model.embeddings(
        ref["masked_input_ids"], batch.segment_ids, batch.position_ids
    )
    hidden = authors_model.generator(embedded, batch.document_ids)
    logits = authors_model.generator_head(
        gather_positions(hidden, batch.masked_positions), authors_model.embeddings.word
    )
    assert logits.shape == ref["mlm_logits"].shape
    assert relative(logits, ref["mlm_logits"]) <= BOUND


def test_positions_of_weight_zero_are_not_written(reference):
    ref, batch = reference, authors_batch(reference)
    ids = scatter_tokens(
        batch.input_ids, batch.masked_positions, ref["sampled_ids"], batch.masked_weights
    )
    assert torch.equal(ids[:, 0], batch.input_ids[:, 0])  # unused positions are 0


# ------------------------------------------------------------------------------------- Hugging Face

SHAPES = {
    "projected": dict(hidden_size=48, embedding_size=32, generator=24, sharing="shared"),
    "same width": dict(hidden_size=32, embedding_size=32, generator=32, sharing="shared"),
    "untied": dict(hidden_size=48, embedding_size=32, generator=24, sharing="untied"),
    "all": dict(hidden_size=48, embedding_size=32, generator=48, sharing="all"),
}


def pair(hidden_size, embedding_size, generator, sharing):
    sizes = dict(num_layers=2, num_heads=2, **NO_DROPOUT)
    model = ElectraModelConfig(
        hidden_size=hidden_size,
        ffn_size=80,
        embedding_size=embedding_size,
        vocab_size=101,  # not a multiple of 64
        max_positions=40,
        sharing=sharing,
        **sizes,
    )
    gen = ElectraGeneratorConfig(hidden_size=generator, ffn_size=80, **sizes)
    return model, gen, ElectraObjective(model, gen, ObjectiveConfig(), IDS, seed=1)


def hf_config(model, gen, part):
    return HF.config(model, gen if part == "generator" else None, IDS, ROLES[part])


def stock(model, gen, part, seed=5):
    transformers = pytest.importorskip("transformers")
    config = transformers.ElectraConfig(**hf_config(model, gen, part))
    torch.manual_seed(seed)
    made = getattr(transformers, config.architectures[0])(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def rows_with_padding():
    ids, mask = torch.randint(5, 101, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    ids[1, 12:], mask[1, 12:] = IDS.pad, 0
    segments = (torch.arange(20) > 8).long().expand(3, -1)
    positions = torch.arange(20).expand(3, -1)
    empty = torch.zeros(3, 1)
    return Batch(ids, segments, mask, positions, positions[:, :1], empty, empty > 0, empty)


def our_logits(objective, batch, part):
    if part == "discriminator":
        return objective.discriminate(batch.input_ids, batch)
    sharing = objective.sharing
    embeddings = objective.generator_embeddings if sharing == "untied" else objective.embeddings
    encoder = objective.discriminator if sharing == "all" else objective.generator
    hidden = encoder(
        embeddings(batch.input_ids, batch.segment_ids, batch.position_ids), batch.document_ids
    )
    return objective.generator_head(hidden, embeddings.word)


@torch.no_grad()
@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_the_hugging_face_classes_after_conversion_both_ways(shape, part):
    model, gen, objective = pair(**SHAPES[shape])
    theirs, batch = stock(model, gen, part), rows_with_padding()
    real = batch.document_ids > 0

    def compare_logits():
        logits = theirs(
            batch.input_ids, attention_mask=batch.document_ids, token_type_ids=batch.segment_ids
        ).logits
        assert float((our_logits(objective, batch, part) - logits)[real].abs().max()) <= 1e-5

    load_true_state(
        objective, HF.from_hf(theirs.state_dict(), true_state(objective), part), partial=True
    )
    compare_logits()  # theirs -> ours
    for p in objective.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    missing, unexpected = theirs.load_state_dict(
        HF.to_hf(true_state(objective), part), strict=False
    )
    assert not unexpected and all("position_ids" in name for name in missing)
    compare_logits()  # ours -> theirs


def test_sizes_are_unchanged_by_conversion_to_config_json_and_back():
    model, gen, _ = pair(**SHAPES["projected"])
    configs = [hf_config(model, gen, part) for part in ("discriminator", "generator")]
    assert HF.parse(*configs) == (model, gen)
    with pytest.raises(UserError, match="hidden_act"):
        HF.parse(configs[0] | {"hidden_act": "relu"})
    with pytest.raises(UserError, match=r"hidden_size = .1/4."):
        HF.parse(configs[0], configs[1] | {"hidden_size": "1/4"})


def test_the_weights_of_the_other_encoder_are_refused():
    *_, objective = pair(**SHAPES["projected"])
    with pytest.raises(UserError, match=r"generator_predictions|generator_lm_head"):
        HF.from_hf(
            HF.to_hf(true_state(objective), "discriminator"), true_state(objective), "generator"
        )
