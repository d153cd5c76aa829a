"""The encoder: sizes, initial weights, documents, padding in memory, precisions, compilation."""

import math
from typing import NamedTuple

import pytest
import small_objective
import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import ElectraGeneratorConfig, ElectraModelConfig
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.model.electra import DiscriminatorHead, Encoder
from electra_ds.model.encoder import encode
from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import load_true_state, true_rows, true_state

IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


def configs(vocab_size=101, dropout=0.0, generator=24, sharing="shared", **more):
    sizes = dict(
        num_layers=2, num_heads=2, ffn_size=64, hidden_dropout=dropout, attention_dropout=dropout
    )
    model = ElectraModelConfig(
        hidden_size=48,
        embedding_size=32,
        max_positions=40,
        vocab_size=vocab_size,
        sharing=sharing,
        **sizes,
        **more,
    )
    return model, ElectraGeneratorConfig(hidden_size=48 if sharing == "all" else generator, **sizes)


def of_electra(seed=1, **options):
    return ElectraObjective(*configs(**options), ObjectiveConfig(), IDS, seed=seed)


def test_the_rows_that_pad_a_table_are_zero_and_not_part_of_the_state():
    padded, whole = true_state(of_electra(vocab_size=101)), true_state(of_electra(vocab_size=128))
    assert true_rows(of_electra(vocab_size=101)) == {
        "embeddings.word.weight": 101,
        "generator_head.bias": 101,
    }
    assert padded["embeddings.word.weight"].shape == (101, 32)
    torch.manual_seed(0)
    wide = of_electra(vocab_size=101)
    assert len(wide.embeddings.word.weight) == 128 and not wide.embeddings.word.weight[101:].any()
    assert padded.keys() == whole.keys()


def test_the_initialization_is_that_of_the_paper():
    state = true_state(of_electra(vocab_size=30_000))
    word, ffn = state["embeddings.word.weight"], state["discriminator.layers.0.ffn_in.weight"]
    for weight in (word, ffn):
        assert float(weight.abs().max()) <= 0.04  # truncated at two standard deviations
        assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.05)
    xavier = (6 / (48 + 32)) ** 0.5
    assert 0.9 * xavier < float(state["discriminator.project.weight"].abs().max()) <= xavier
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name


def test_fan_in_initializes_matrices_by_their_inputs_and_tables_by_their_own_deviation():
    state = true_state(of_electra(vocab_size=3000, init="fan_in", embedding_init_std=0.2))
    assert float(state["discriminator.layers.0.ffn_in.weight"].std()) == pytest.approx(
        48**-0.5, rel=0.1
    )
    assert float(state["discriminator.layers.0.ffn_out.weight"].std()) == pytest.approx(
        64**-0.5, rel=0.1
    )
    assert float(state["embeddings.word.weight"].std()) == pytest.approx(0.2, rel=0.05)


def modernbert(**options):
    model, generator = small_objective.modernbert_configs()
    sizes = {"num_layers": 8, "vocab_size": 30_000, "init": "normal", "embedding_init_std": 0.02}
    model = model.model_copy(update=sizes | options)
    return true_state(ElectraObjective(model, generator, ObjectiveConfig(), IDS, seed=1))


def test_the_initialization_of_modernbert_is_that_of_transformers():
    """Residual outputs and the dense layers of heads: .02 / sqrt(2 L); the last layer: H^-.5."""
    state = modernbert()
    assert not [name for name in state if name.endswith("bias") and state[name].any()]
    scaled, cut = 0.02 / 4, 0.8796  # L = 8; a normal distribution truncated at 2 sigma
    stds = {
        "embeddings.word.weight": 0.02,
        "discriminator.layers.1.qkv.weight": 0.02,
        "discriminator.layers.1.ffn_in.weight": 0.02,
        "discriminator.layers.1.out.weight": scaled,
        "discriminator.layers.1.ffn_out.weight": scaled,
        "discriminator_head.dense.weight": scaled,
        "generator_head.dense.weight": scaled,
        "generator.layers.1.out.weight": scaled,
    }
    for name, std in stds.items():
        assert float(state[name].abs().max()) <= 2 * std, name
        assert float(state[name].std()) == pytest.approx(std * cut, rel=0.05), name
    classify = state["discriminator_head.classify.weight"]
    assert 48**-0.5 < float(classify.abs().max()) <= 2 * 48**-0.5
    assert all((value == 1).all() for name, value in state.items() if "norm" in name)


def test_fan_in_of_modernbert_divides_residual_outputs():
    state = modernbert(init="fan_in")
    layer = "discriminator.layers.1."
    assert float(state[f"{layer}ffn_in.weight"].std()) == pytest.approx(48**-0.5, rel=0.1)
    assert float(state[f"{layer}ffn_out.weight"].std()) == pytest.approx(40**-0.5 / 4, rel=0.1)
    assert float(state[f"{layer}out.weight"].std()) == pytest.approx(48**-0.5 / 4, rel=0.1)


def test_modernbert_has_biases_in_the_last_layers_of_heads_only():
    biases = {name for name in modernbert() if name.endswith("bias")}
    assert biases == {"generator_head.bias", "discriminator_head.classify.bias"}
    state = modernbert()
    # The embeddings end with a LayerNorm, so the first layer has none before its attention.
    assert "discriminator.layers.0.attention_norm.weight" not in state
    assert "discriminator.layers.1.attention_norm.weight" in state
    assert "discriminator.final_norm.weight" in state


def test_the_weights_depend_only_on_the_seed():
    first = true_state(of_electra(seed=7))
    torch.manual_seed(123)
    again, other = true_state(of_electra(seed=7)), true_state(of_electra(seed=8))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embeddings.word.weight"], other["embeddings.word.weight"])


def test_a_shared_tensor_is_named_once():
    shared, untied, all_shared = (
        set(true_state(of_electra(sharing=sharing))) for sharing in ("shared", "untied", "all")
    )
    assert untied - shared == {
        name.replace("embeddings", "generator_embeddings", 1)
        for name in shared
        if name.startswith("embeddings.")
    }
    # untied embeddings are as wide as the generator and need no projection
    assert shared - untied == {"generator.project.weight", "generator.project.bias"}
    assert all_shared == {name for name in shared if not name.startswith("generator.")}


class Inputs(NamedTuple):
    """The fields of a batch that `encode` uses, of B rows with documents of these lengths."""

    input_ids: Tensor
    segment_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = None

    @classmethod
    def of_documents(cls, *lengths, rows=1, seed=0):
        """Rows with documents of these lengths; the last one is padding (0)."""
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 101, (rows, sum(lengths)), generator=random)
        numbers = [*range(1, len(lengths)), 0]
        documents = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(
            ids, torch.zeros_like(ids), documents.expand(rows, -1), positions.expand(rows, -1)
        )

    def columns(self, part):
        """These columns of the rows, without cu_seqlens."""
        return Inputs(*(tensor[:, part] for tensor in self[:4]))


# The second row is longer than the blocks of the local layers of modernbert.
@pytest.mark.parametrize("lengths", [(8, 9, 3), (30, 7, 39, 3)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_packed_documents_are_encoded_as_separate_rows(with_lengths, lengths, build):
    module = build().eval()
    inputs = Inputs.of_documents(*lengths)

    def encoded(inputs, **options):
        parts = module.embeddings, module.discriminator
        return encode(*parts, inputs.input_ids, inputs, **options)

    batch = with_cu_seqlens(inputs) if with_lengths else inputs
    packed = encoded(batch)
    positions = torch.tensor([16, 0])
    at_positions = encoded(batch, positions=positions)
    torch.testing.assert_close(at_positions, packed[0, positions], rtol=1e-5, atol=1e-5)
    start = 0
    for length in lengths[:-1]:
        document = slice(start, start + length)
        alone = encoded(inputs.columns(document))
        torch.testing.assert_close(packed[:, document], alone, rtol=1e-4, atol=2e-5)
        start += length


def test_compiled_layers_are_not_recompiled_for_other_lengths_of_documents(monkeypatch, build):
    """A CPU passes the lengths of documents of a single row to plain layers only."""
    compiled = []

    def count_graphs(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend=count_graphs, **options),
    )
    torch.compiler.reset()
    plain, module = build().eval(), build().eval()
    module.compile_layers()
    for lengths in ((8, 29, 23), (25, 12, 23), (2, 2, 3, 11, 32, 10)):
        inputs = with_cu_seqlens(Inputs.of_documents(*lengths))
        hidden, expected = (
            encode(part.embeddings, part.discriminator, inputs.input_ids, inputs)
            for part in (module, plain)
        )
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    # One graph for all layers of electra and deberta_v2. modernbert: the first layer, which has no
    # LayerNorm before its attention, the local layers, and the other global layer.
    expected = 3 if hasattr(module.discriminator, "kinds") else 1
    assert len(compiled) == expected
    torch.compiler.reset()


def test_compiled_layers_have_no_graph_break_and_the_gradients_of_plain_ones(build):
    """Local layers by blocks and with a mask."""
    torch.compiler.reset()
    plain, module = build(), build()
    for layer in module.discriminator.layers:
        layer.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    module.discriminator.layers_are_compiled = True
    for inputs in (Inputs.of_documents(8, 9, 3), Inputs.of_documents(8, 29, 23)):
        found = []
        for part in (module, plain):
            part.zero_grad()
            hidden = encode(part.embeddings, part.discriminator, inputs.input_ids, inputs)
            hidden.square().sum().backward()
            found.append([hidden, *(p.grad for p in part.discriminator.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def deberta(**options):
    model, generator = small_objective.deberta_configs()
    sizes = {"vocab_size": 30_000, "init": "normal", "embedding_init_std": 0.02}
    sizes |= {"position_buckets": 200, "max_positions": 512}
    model = model.model_copy(update=sizes | options)
    return true_state(ElectraObjective(model, generator, ObjectiveConfig(), IDS, seed=1))


def test_the_initialization_of_deberta_v2_is_a_truncated_normal_everywhere():
    state = deberta()
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert float(value.abs().max()) <= 0.04, name
            if value.numel() > 2000:
                assert float(value.std()) == pytest.approx(0.02 * 0.8796, rel=0.1), name
    assert "discriminator.relative.weight" in state and "generator.relative.weight" in state
    assert not any("position" in name or "token_type" in name for name in state)
    tables = deberta(init="fan_in", embedding_init_std=0.2)
    assert float(tables["discriminator.relative.weight"].std()) == pytest.approx(0.2, rel=0.05)
    assert float(tables["discriminator.layers.0.out.weight"].std()) == pytest.approx(
        48**-0.5, rel=0.1
    )


def test_dropout_of_deberta_v2_is_applied_to_the_relative_embeddings_of_each_layer(monkeypatch):
    module = small_objective.build(dropout=0.3, architecture="deberta_v2")
    seen = []
    for place in ("encoder", "deberta_v2"):
        monkeypatch.setattr(
            f"electra_ds.model.{place}.dropout",
            lambda x, p, training: seen.append((tuple(x.shape), p, training)) or x,
        )
    inputs = Inputs.of_documents(20)
    for training in (True, False):
        module.train(training)
        seen.clear()
        encode(module.embeddings, module.discriminator, inputs.input_ids, inputs)
        embeddings = ((1, 20, 48), 0.3, training)
        layer = [((16, 48), 0.3, training), embeddings, embeddings]  # relative, then sublayers
        assert seen == [embeddings, *layer * 3]


def test_local_and_global_layers_have_their_own_window_and_rotary_positions(monkeypatch):
    module = small_objective.build(architecture="modernbert").eval()
    seen = []

    def record(qkv, num_heads, mask, dropout, rotary):
        seen.append((mask.bias is not None, float(rotary.cos[0, 1, 1])))
        return attention(qkv, num_heads, mask, dropout, rotary=rotary)

    monkeypatch.setattr("electra_ds.model.modernbert.attention", record)
    inputs = Inputs.of_documents(20)
    inputs = inputs._replace(document_ids=inputs.document_ids + 1)
    encode(module.embeddings, module.discriminator, inputs.input_ids, inputs)
    # Half a head has 12 frequencies; the second one is theta ** (-1 / 12).
    thetas = (500.0, 100.0, 100.0, 500.0)
    windows = (False, True, True, False)
    cosines = [math.cos(theta ** (-1 / 12)) for theta in thetas]
    assert [local for local, _ in seen] == list(windows)
    assert [cosine for _, cosine in seen] == pytest.approx(cosines, rel=1e-5)


def test_dropout_is_applied_in_training_only():
    encoder = Encoder(configs(dropout=0.3)[0], 32, 1e-12)
    x = torch.randn(2, 9, 32)
    ones = torch.ones(2, 9).long()
    assert not torch.equal(encoder(x, ones), encoder(x, ones))
    encoder.eval()
    assert torch.equal(encoder(x, ones), encoder(x, ones))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "autocast"])
def test_half_precisions_are_close_to_fp32(kind):
    encoder = Encoder(configs()[0], 32, 1e-12)
    head = DiscriminatorHead(48)
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


def test_weights_that_do_not_fit_are_refused_with_their_names():
    module = of_electra()
    state = {name: value.clone() for name, value in true_state(module).items()}
    load_true_state(module, state)
    with pytest.raises(UserError, match=r"unknown \['other'\]"):
        load_true_state(module, state | {"other": torch.zeros(1)})
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
