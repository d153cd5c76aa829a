"""model.factory: what a run with encoders of one's own may say, and what is refused. Its training: test_kinds.py."""

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


def test_sizes_are_not_needed_and_parameters_are_counted(tmp_path):
    config = factory_run(tmp_path, "model.vocab_size=101")
    words, conv, head = 101 * 24, 24 * 8 + 8 + 24 * 8 + 8, 8 + 1
    gru = 2 * (3 * 8 * (24 + 8) + 2 * 3 * 8) + 16 * 101 + 101
    assert parameter_count(config) == (words + conv + head, words + conv + head + gru)
    assert parameter_count(factory_run(tmp_path)).joint > 30_522 * (24 + 16)


def test_mistakes_are_named_without_noise_of_the_other_kind_of_model(tmp_path):
    for sets, message in (
        (
            ["model.hidden_size=8"],
            "model.hidden_size: unknown key; known here: discr_dim, discr_layer, factory",
        ),
        (["objective.kind=mlm"], "objective.kind mlm needs the built-in model"),
        (["generator.hidden_size=8"], "generator"),
        (["train.compile=true"], "are for the built-in layers"),
    ):
        with pytest.raises(UserError) as error:
            factory_run(tmp_path, *sets)
        assert message in str(error.value) and "\n" not in str(error.value)
    for factory, message in (
        ("own_pair", "expected package.module:function"),
        ("own_pair:bild", "has no attribute 'bild'"),
        ("nowhere:build", "No module named 'nowhere'"),
        ("own_pair:build_buffered", r"average.running_mean is a buffer or frozen"),
        ("own_pair:build_frozen", r"turn.bias is a buffer or frozen"),
        ("own_pair:build_one", r"must return \(generator, discriminator\)"),
    ):
        with pytest.raises(UserError, match=message):
<<<<<<< HEAD
            build_objective(run(tmp_path, factory=factory).with_data(101, IDS, 32))
=======
            build_objective(factory_run(tmp_path, factory=factory, vocab_size=101))
>>>>>>> second-edition


def test_another_factory_is_another_science(tmp_path):
    old, new = factory_run(tmp_path), factory_run(tmp_path, options={"width": 9})
    assert differences(old, new)[0] == ["model.options: {'width': 8} -> {'width': 9}"]
    assert any(line.startswith("model: ") for line in differences(load_run("tiny"), new)[0])


class Bag(nn.Module):
    """Logits by the token alone, and a record of what the forward was given."""

    def __init__(self, outputs, vocab=101):
        super().__init__()
        self.table, self.given = nn.Embedding(vocab, outputs), {}

    def forward(self, ids, token_type_ids, position_ids=None, **others):
        self.given = {"token_type_ids": token_type_ids, "position_ids": position_ids, **others}
        return self.table(ids)


def own(encoder, **options):
    model = FactoryConfig(factory="a:b", vocab_size=101)
    return FactoryObjective(encoder, Bag(1), model, ObjectiveConfig(**options), IDS)


def test_forward_gets_what_it_names_and_logits_at_every_place_will_do():
    module, batch = own(Bag(101)), make_batch()
    losses = module(batch, counts_of(batch), with_counts=True)
    for part in (module.generator, module.discriminator.module):
        assert part.given.keys() == {"token_type_ids", "position_ids"}  # **others is no wish
        assert part.given["position_ids"] is batch.position_ids
    losses.total.backward()
    assert all(p.grad.any() for p in module.parameters()) and losses.counts.masked == 11
    only = own(None, generator="uniform")
    assert torch.isfinite(only(batch, counts_of(batch)).total) and [
        n for n, _ in only.named_parameters()
    ] == ["discriminator.module.table.weight"]
    with pytest.raises(UserError, match="the generator has 99 tokens, the data 101"):
        own(Bag(99))(batch)
