"""model.architecture: one schema for each architecture, old files, and messages for mistakes."""

import json

import pytest
import torch

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    MAX_DROPOUT,
    MODELS,
    DebertaV2ModelConfig,
    ElectraModelConfig,
    ModelConfig,
    ModernBertModelConfig,
)
from electra_ds.config.loading import (
    config_names,
    differences,
    find_config,
    load_run,
    parse_config,
    parse_run,
)
from electra_ds.config.schema import RUNS, DebertaV2Run, ElectraRun, FactoryRun, ModernBertRun
from electra_ds.interop.hf import FORMATS
from electra_ds.model.kernels.dropout import dropout_factors
from electra_ds.model.registry import ARCHITECTURES

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


PRESETS_OF = {
    "electra": "electra (base, base-128-512, large, small, small++, small-128-512, tiny)",
    "modernbert": "modernbert (modern-base, modern-base-phases, modern-large, modern-small, "
    "modern-tiny)",
    "deberta_v2": "deberta_v2 (deberta-tiny, deberta-v3-base, deberta-v3-large, deberta-v3-small, "
    "deberta-v3-xsmall)",
}


def refusal(name, *settings):
    """The message with which load_run refuses a preset with settings."""
    with pytest.raises(UserError) as caught:
        load_run(name, settings)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize("preset", config_names("pretrain"))
def test_a_preset_is_of_the_architecture_in_its_name(preset):
    run = load_run(preset)
    kinds = {"modern": ModernBertRun, "deberta": DebertaV2Run}
    expected = kinds.get(preset.partition("-")[0], ElectraRun)
    assert type(run) is expected
    assert RUNS[run.model.architecture] is expected
    assert type(run.model) is MODELS[run.model.architecture]


def test_every_architecture_has_a_schema_modules_and_a_stock_format():
    formats = [form.architecture for form in FORMATS]
    assert list(MODELS) == list(RUNS) == list(ARCHITECTURES) == formats


def test_a_config_without_the_key_is_of_the_architecture_electra(tmp_path):
    values = json.loads(find_config("tiny", "pretrain").read_text())
    values["model"].pop("architecture", None)
    old = parse_run(values, "old")
    values["model"]["architecture"] = "electra"
    assert differences(old, parse_run(values, "new")) == ([], [])
    assert old.model.architecture == "electra" and isinstance(old.model, ElectraModelConfig)
    # The section `model` in meta.json of a fine-tuned model.
    del values["model"]["architecture"]
    assert parse_config(values["model"], "old", ModelConfig) == old.model


@pytest.mark.parametrize("preset", ["tiny", "modern-tiny", "deberta-tiny"])
def test_a_written_config_keeps_its_architecture(preset):
    run = load_run(preset, ["data.sequence_length=32"]).with_data(600, SPECIAL, 32)
    written = json.loads(json.dumps(run.model_dump(mode="json")))
    assert parse_run(written, "config.json") == run
    assert parse_config(written["model"], "meta.json", ModelConfig) == run.model


def test_a_factory_has_no_architecture():
    values = json.loads(find_config("tiny", "pretrain").read_text())
    values["model"] = {"factory": "own:build"}
    del values["generator"]
    assert type(parse_run(values, "own.json")) is FactoryRun


@pytest.mark.parametrize(
    ("preset", "name"), [("modern-tiny", "modernbert"), ("deberta-tiny", "deberta_v2")]
)
def test_two_architectures_differ_in_one_line_of_each_scope_and_section(preset, name):
    science, _ = differences(load_run("tiny"), load_run(preset))
    of_model = [line for line in science if line.startswith(("model.", "generator."))]
    assert of_model == [f"model.architecture: electra -> {name}"]


def test_the_layers_repeat_the_pattern():
    model = load_run("modern-tiny").model
    assert model.layer_kinds(7) == ["global", "local", "local"] * 2 + ["global"]
    assert model.layer_kinds(1) == ["global"]


@pytest.mark.parametrize("preset", ["tiny", "modern-tiny", "deberta-tiny"])
def test_dropout_fields_are_all_probabilities_of_dropout(preset):
    run = load_run(preset)
    expected = {
        "electra": {"hidden_dropout", "attention_dropout"},
        "modernbert": {"embedding_dropout", "attention_dropout", "mlp_dropout"},
        "deberta_v2": {"hidden_dropout", "attention_dropout"},
    }[run.model.architecture]
    assert set(run.model.dropout_fields()) == set(run.generator.dropout_fields()) == expected


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("preset", ["tiny", "modern-tiny"])
def test_a_dropout_close_to_1_is_refused_and_the_largest_one_has_finite_factors(preset):
    run = load_run(preset)
    for section in ("model", "generator"):
        for field in run.model.dropout_fields():
            key = f"{section}.{field}"
            assert key in refusal(preset, f"{key}=0.999999")
            assert getattr(getattr(load_run(preset, [f"{key}=0.9"]), section), field) == 0.9
    assert dropout_factors(torch.ones(100), MAX_DROPOUT).isfinite().all()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("modernbrt", 'model.architecture = "modernbrt": unknown architecture; did you mean'),
        ("deberta", "did you mean 'deberta_v2'?; there are electra, modernbert, deberta_v2"),
        ("bert", "there are electra, modernbert, deberta_v2"),
        ("3", "model.architecture = 3: unknown architecture; there are"),
        ("null", "model.architecture = null: unknown architecture"),
        ("{}", "unknown architecture; there are electra, modernbert"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(name, part):
    message = refusal("tiny", f"model.architecture={name}")
    assert part in message and "tiny.json: model.architecture" in message


@pytest.mark.parametrize(
    ("preset", "key", "other"),
    [
        ("tiny", "model.local_attention", "modernbert"),
        ("tiny", "generator.mlp_dropout", "modernbert"),
        ("modern-tiny", "model.embedding_size", "electra"),
        ("modern-tiny", "model.type_vocab_size", "electra"),
        ("modern-tiny", "generator.hidden_dropout", "electra"),
        ("tiny", "model.position_buckets", "deberta_v2"),
        ("modern-tiny", "model.position_buckets", "deberta_v2"),
        ("deberta-tiny", "model.embedding_size", "electra"),
        ("deberta-tiny", "model.type_vocab_size", "electra"),
        ("deberta-tiny", "model.local_attention", "modernbert"),
        ("deberta-tiny", "generator.mlp_dropout", "modernbert"),
    ],
)
def test_a_field_of_the_other_architecture_is_refused_with_a_suggestion(preset, key, other):
    message = refusal(preset, f"{key}=4")
    own = load_run(preset).model.architecture
    assert f"{key}: a field of the architecture {other}, but model.architecture = {own}" in message
    assert "leave it out, or start from a config of one architecture: " in message
    for name in (own, other):
        assert PRESETS_OF[name] in message


def test_a_misspelled_field_is_compared_with_those_of_its_own_architecture():
    assert "did you mean 'local_attention'?" in refusal("modern-tiny", "model.local_atention=4")
    assert "local_attention" not in refusal("tiny", "model.local_atention=4")


def test_the_generator_has_no_architecture_of_its_own():
    message = refusal("tiny", "generator.architecture=electra")
    assert "generator.architecture: unknown key; model.architecture is that of both" in message


def test_fields_of_another_architecture_are_named_before_missing_fields():
    values = json.loads(find_config("modern-tiny", "pretrain").read_text())
    del values["model"]["architecture"]
    with pytest.raises(UserError) as caught:
        parse_run(values, "own.json")
    first, *others = str(caught.value).split("\n")
    assert "of the architecture modernbert, but model.architecture = electra" in first
    assert any("model.embedding_size: missing" in line for line in others)


def test_setting_the_architecture_of_a_preset_names_the_presets_of_the_other_one():
    message = refusal("tiny", "model.architecture=modernbert")
    (line,) = [line for line in message.split("\n") if "of the architecture" in line]
    for key in ("model.embedding_size", "model.hidden_dropout", "generator.hidden_dropout"):
        assert key in line
    assert "fields of the architecture electra, but model.architecture = modernbert" in line
    assert PRESETS_OF["modernbert"] in line


def test_an_odd_width_of_a_head_is_refused():
    for section in ("model", "generator"):
        message = refusal("modern-tiny", f"{section}.num_heads=128")
        assert f"{section}: hidden_size 128 / num_heads 128 = 1 is odd" in message
        assert "even width of a head: choose another num_heads" in message


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        (
            "local_attention=0",
            "model.local_attention: 0: expected an even number of at least 2, such as 128",
        ),
        ("local_attention=-2", "model.local_attention: -2: expected an even number"),
        ("local_attention=7", "model.local_attention: 7: expected an even number"),
        ("global_theta=0", "model.global_theta: 0.0: expected a number from 1 on, such as 10000"),
        ("local_theta=-1", "model.local_theta: -1.0: expected a number from 1 on"),
        ("local_theta=1e-300", "model.local_theta: 1e-300: expected a number from 1 on"),
        ("global_theta=inf", "model.global_theta = "),
        ("attention_pattern=[]", "attention_pattern = [] gives 3 layers without a global one"),
        ('attention_pattern=["globl"]', "should be 'global' or 'local'"),
        ("attention_pattern=global", "model.attention_pattern = "),
    ],
)
def test_a_window_a_theta_or_a_pattern_out_of_range_is_refused(setting, part):
    assert part in refusal("modern-tiny", f"model.{setting}")


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (["local"], 'model: attention_pattern = ["local"] gives 3 layers without a global one'),
        (["local"] * 3 + ["global"], "gives 3 layers without a global one"),
        # The third layer is global; the generator has two.
        (["local", "local", "global"], "gives the generator's 2 layers no global one"),
    ],
)
def test_a_pattern_without_a_global_layer_is_refused(pattern, part):
    message = refusal("modern-tiny", f"model.attention_pattern={json.dumps(pattern)}")
    assert part in message and 'such as ["global", "local", "local"]' in message


def test_shared_embeddings_need_equal_widths():
    message = refusal("modern-tiny", "generator.hidden_size=64")
    assert "generator.hidden_size 64 differs from model.hidden_size 128" in message
    assert "model.sharing = untied" in message
    untied = load_run("modern-tiny", ["generator.hidden_size=64", "model.sharing=untied"])
    assert untied.generator.hidden_size == 64
    message = refusal("modern-tiny", "model.sharing=all")  # other numbers of layers
    assert "model.sharing = 'all' is one encoder" in message
    assert "num_layers is 2 in generator and 3 in model: set equal values" in message
    assert load_run("modern-tiny", ["model.sharing=all", "generator.num_layers=3"])


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("position_buckets=0", "model.position_buckets: 0: expected an even number of at least 2"),
        ("position_buckets=-1", "model.position_buckets: -1: expected an even number of at least"),
        ("position_buckets=7", "model.position_buckets: 7: expected an even number of at least 2"),
        ("position_buckets=many", "model.position_buckets = "),
        ("position_buckets=1022", "too small for position_buckets 1022; expected at least 513"),
        ("max_positions=17", "max_positions 17 is too small for position_buckets 32; expected at"),
        ("layer_norm_eps=0", "model.layer_norm_eps = "),
        ("hidden_dropout=1", "model.hidden_dropout = "),
        ("num_heads=3", "hidden_size 128 is not a multiple of num_heads 3"),
        ("hidden_size=0", "model.hidden_size = "),
    ],
)
def test_buckets_and_sizes_out_of_range_are_refused(setting, part):
    assert part in refusal("deberta-tiny", f"model.{setting}")


def test_deberta_v2_shares_embeddings_of_equal_widths_and_has_no_segments():
    message = refusal("deberta-tiny", "generator.hidden_size=64")
    assert "deberta_v2 has no projection after the embeddings" in message
    assert "model.sharing = untied" in message
    assert load_run("deberta-tiny", ["generator.hidden_size=64", "model.sharing=untied"])
    assert "is one encoder" in refusal("deberta-tiny", "model.sharing=all")
    assert load_run("deberta-tiny", ["model.sharing=all", "generator.num_layers=3"])
    run = load_run("deberta-tiny")
    assert isinstance(run.model, DebertaV2ModelConfig) and run.with_data(600, SPECIAL, 64, 1)
    with pytest.raises(UserError) as caught:
        run.with_data(600, SPECIAL, 64, segments=2)
    assert "model.architecture = deberta_v2 has no token types" in str(caught.value)
    assert "exceeds max_positions 512" in refusal("deberta-tiny", "data.sequence_length=513")


def test_a_row_longer_than_max_positions_is_refused():
    message = refusal("modern-tiny", "data.sequence_length=8193")
    assert "exceeds max_positions 8192: raise model.max_positions" in message
    longer = load_run("modern-tiny", ["data.sequence_length=8193", "model.max_positions=16384"])
    assert longer.model.max_positions == 16384


def test_rows_with_segments_are_refused():
    run = load_run("modern-tiny")
    assert isinstance(run.model, ModernBertModelConfig) and run.with_data(600, SPECIAL, 64, 1)
    with pytest.raises(UserError) as caught:
        run.with_data(600, SPECIAL, 64, segments=2)
    assert "model.architecture = modernbert has no token types" in str(caught.value)
    assert "prepare the data with another --packing, such as best_fit" in str(caught.value)
