"""The encoder: sizes, starting weights, pieces, padding in memory, precisions."""

import pytest
import torch

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import GeneratorConfig, ModelConfig, ObjectiveConfig
from electra_ds.model.encoder import Encoder
from electra_ds.model.heads import DiscriminatorHead
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import load_true_state, padded_rows, true_state

IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


def configs(vocab_size=101, dropout=0.0, generator=24, sharing="shared", **more):
    sizes = dict(
        num_layers=2, num_heads=2, ffn_size=64, hidden_dropout=dropout, attention_dropout=dropout
    )
    model = ModelConfig(
        hidden_size=48,
        embedding_size=32,
        max_positions=40,
        vocab_size=vocab_size,
        sharing=sharing,
        **sizes,
        **more,
    )
    return model, GeneratorConfig(hidden_size=48 if sharing == "all" else generator, **sizes)


def build(seed=1, **options):
    return ElectraObjective(*configs(**options), ObjectiveConfig(), IDS, seed=seed)


def test_memory_padding_changes_no_true_weight():
    padded, whole = true_state(build(vocab_size=101)), true_state(build(vocab_size=128))
    assert padded_rows(build(vocab_size=101)) == {
        "embeddings.word.weight": 101,
        "generator_head.bias": 101,
    }
    assert padded["embeddings.word.weight"].shape == (101, 32)
    torch.manual_seed(0)
    wide = build(vocab_size=101)
    assert len(wide.embeddings.word.weight) == 128 and not wide.embeddings.word.weight[101:].any()
    assert padded.keys() == whole.keys()


def test_initialisation_is_that_of_the_paper():
    state = true_state(build(vocab_size=30_000))
    word, ffn = state["embeddings.word.weight"], state["discriminator.layers.0.ffn_in.weight"]
    for weight in (word, ffn):
        assert float(weight.abs().max()) <= 0.04  # truncated at two deviations
        assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.05)
    xavier = (6 / (48 + 32)) ** 0.5
    assert 0.9 * xavier < float(state["discriminator.project.weight"].abs().max()) <= xavier
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name


def test_fan_in_initialisation_and_a_table_of_its_own():
    state = true_state(build(vocab_size=3000, init="fan_in", embedding_init_std=0.2))
    assert float(state["discriminator.layers.0.ffn_in.weight"].std()) == pytest.approx(
        48**-0.5, rel=0.1
    )
    assert float(state["discriminator.layers.0.ffn_out.weight"].std()) == pytest.approx(
        64**-0.5, rel=0.1
    )
    assert float(state["embeddings.word.weight"].std()) == pytest.approx(0.2, rel=0.05)


def test_the_seed_alone_decides_the_weights():
    first = true_state(build(seed=7))
    torch.manual_seed(123)
    again, other = true_state(build(seed=7)), true_state(build(seed=8))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embeddings.word.weight"], other["embeddings.word.weight"])


def test_sharing_names_each_tensor_once():
    shared, untied, alone = (set(true_state(build(sharing=s))) for s in ("shared", "untied", "all"))
    assert untied - shared == {
        n.replace("embeddings", "generator_embeddings", 1) for n in shared if n[:3] == "emb"
    }
    assert shared - untied == {
        "generator.project.weight",
        "generator.project.bias",
    }  # as wide as the generator itself
    assert alone == {n for n in shared if not n.startswith("generator.")}


def test_packed_pieces_are_encoded_as_if_alone():
    module = build().eval()
    ids = torch.randint(5, 101, (1, 20))
    pieces = torch.tensor([[1] * 8 + [2] * 9 + [0] * 3])
    places = torch.cat([torch.arange(8), torch.arange(9), torch.arange(3)])[None]

    def encode(part):
        embedded = module.embeddings(ids[:, part], torch.zeros_like(ids[:, part]), places[:, part])
        return module.discriminator(embedded, pieces[:, part])

    packed, last = encode(slice(None)), torch.tensor([16, 0])
    at = module.discriminator(
        module.embeddings(ids, torch.zeros_like(ids), places), pieces, positions=last
    )
    torch.testing.assert_close(at, packed[0, last], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, :8], encode(slice(0, 8)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 8:17], encode(slice(8, 17)), rtol=1e-5, atol=1e-5)


def test_dropout_works_in_training_only():
    encoder, x, ones = (
        Encoder(configs(dropout=0.3)[0], 32, 1e-12),
        torch.randn(2, 9, 32),
        torch.ones(2, 9).long(),
    )
    assert not torch.equal(encoder(x, ones), encoder(x, ones))
    encoder.eval()
    assert torch.equal(encoder(x, ones), encoder(x, ones))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "autocast"])
def test_half_precisions_come_near_fp32(kind):
    encoder, head = Encoder(configs()[0], 32, 1e-12), DiscriminatorHead(48)
    x, ones = torch.randn(2, 9, 32), torch.ones(2, 9).long()
    exact = head(encoder(x, ones))
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(x, ones)
            logits = head(hidden)
        assert hidden.dtype == torch.bfloat16
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        logits = head.to(dtype)(encoder.to(dtype)(x.to(dtype), ones))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05)


def test_weights_that_do_not_fit_are_refused_by_name():
    module = build()
    state = {name: value.clone() for name, value in true_state(module).items()}
    load_true_state(module, state)
    with pytest.raises(UserError, match="stranger"):
        load_true_state(module, state | {"stranger": torch.zeros(1)})
    with pytest.raises(UserError, match=r"generator_head\.bias has shape \(7,\)"):
        load_true_state(module, state | {"generator_head.bias": torch.zeros(7)})
    del state["generator_head.bias"]
    with pytest.raises(UserError, match=r"missing \['generator_head.bias'\]"):
        load_true_state(module, state)


def test_a_model_without_a_vocabulary_is_refused():
    model, generator = configs()
    with pytest.raises(UserError, match="vocab_size"):
        ElectraObjective(
            model.model_copy(update={"vocab_size": None}), generator, ObjectiveConfig(), IDS
        )
