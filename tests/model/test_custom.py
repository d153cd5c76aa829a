"""model.factory: settings that are accepted or refused, and the arguments of a user's forward.

Their training is tested in tests/training/test_objective_kinds.py.
"""

import pytest
import torch
from factory_run import factory_run
from small_objective import IDS, counts_of, make_batch
from torch import nn

from electra_ds.common.errors import UserError
from electra_ds.config.loading import differences, load_run
from electra_ds.config.schema import FactoryConfig, ObjectiveConfig
from electra_ds.model.build import build_objective, parameter_count
from electra_ds.model.custom import FactoryObjective

VOCAB = 101


def test_parameters_are_counted_without_a_known_vocabulary_too(tmp_path):
    config = factory_run(tmp_path, f"model.vocab_size={VOCAB}")
    words = VOCAB * 24
    conv = 24 * 8 + 8 + 24 * 8 + 8
    head = 8 + 1
    gru = 2 * (3 * 8 * (24 + 8) + 2 * 3 * 8) + 16 * VOCAB + VOCAB
    assert parameter_count(config) == (words + conv + head, words + conv + head + gru, 0)
    assert parameter_count(factory_run(tmp_path)).trained > 30_522 * (24 + 16)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["model.hidden_size=8"],
            "model.hidden_size: unknown key; known here: discr_dim, discr_layer, factory",
        ),
        (["objective.kind=mlm"], "objective.kind mlm needs the built-in model"),
        (["generator.hidden_size=8"], "generator"),
        (["train.compile=true"], "work with the built-in layers only"),
    ],
)
def test_settings_of_the_built_in_model_are_refused_in_one_line(tmp_path, sets, message):
    with pytest.raises(UserError) as error:
        factory_run(tmp_path, *sets)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("own_pair", "expected package.module:function"),
        ("own_pair:bild", "has no attribute 'bild'"),
        ("nowhere:build", "No module named 'nowhere'"),
        ("own_pair:build_buffered", r"average.running_mean is a buffer or frozen"),
        ("own_pair:build_frozen", r"turn.bias is a buffer or frozen"),
        ("own_pair:build_one", r"must return \(generator, discriminator\)"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(tmp_path, factory, message):
    with pytest.raises(UserError, match=message):
        build_objective(factory_run(tmp_path, factory=factory).with_data(VOCAB, IDS, 32))


def test_other_options_of_a_factory_are_a_difference_of_science(tmp_path):
    old = factory_run(tmp_path)
    new = factory_run(tmp_path, options={"width": 9})
    assert differences(old, new)[0] == ["model.options.width: 8 -> 9"]
    assert any(line.startswith("model: ") for line in differences(load_run("tiny"), new)[0])


class TokenLogits(nn.Module):
    """Logits that depend only on the token; `arguments` are those of the last forward."""

    def __init__(self, outputs, vocab=VOCAB):
        super().__init__()
        self.table = nn.Embedding(vocab, outputs)
        self.arguments = {}

    def forward(self, ids, token_type_ids, position_ids=None, **others):
        self.arguments = {"token_type_ids": token_type_ids, "position_ids": position_ids, **others}
        return self.table(ids)


class DocumentLogits(TokenLogits):
    """A forward that names the documents."""

    def forward(self, ids, document_ids):
        self.arguments = {"document_ids": document_ids}
        return self.table(ids)


class PieceLogits(TokenLogits):
    """A forward that names the documents as in version 0.1."""

    def forward(self, ids, *, piece_ids):
        self.arguments = {"piece_ids": piece_ids}
        return self.table(ids)


def objective_of(generator, discriminator=None, /, **options):
    model = FactoryConfig(factory="a:b", vocab_size=VOCAB)
    discriminator = discriminator or TokenLogits(1)
    return FactoryObjective(generator, discriminator, model, ObjectiveConfig(**options), IDS)


def test_a_forward_is_passed_the_arguments_that_it_names():
    module = objective_of(TokenLogits(VOCAB))
    batch = make_batch()
    losses = module(batch, counts_of(batch), with_counts=True)
    for part in (module.generator, module.discriminator.module):
        assert part.arguments.keys() == {"token_type_ids", "position_ids"}  # none for **others
        assert part.arguments["position_ids"] is batch.position_ids
    losses.total.backward()
    assert all(p.grad.any() for p in module.parameters())
    assert losses.counts.masked == 11


def test_documents_are_passed_by_their_name_and_by_that_of_version_0_1():
    module = objective_of(DocumentLogits(VOCAB), PieceLogits(1))
    batch = make_batch()
    assert torch.isfinite(module(batch, counts_of(batch)).total)
    assert module.generator.arguments["document_ids"] is batch.document_ids
    assert module.discriminator.module.arguments["piece_ids"] is batch.document_ids


def test_uniform_samples_need_no_generator():
    module = objective_of(None, generator="uniform")
    batch = make_batch()
    assert torch.isfinite(module(batch, counts_of(batch)).total)
    names = [name for name, _ in module.named_parameters()]
    assert names == ["discriminator.module.table.weight"]


def test_a_generator_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="the generator has 99 tokens, the data 101"):
        objective_of(TokenLogits(99))(make_batch())
