"""Presets: every shipped run is a complete file, has the published sizes, and fits every shipped engine file."""

import json

import pytest
from cost import step_flops

from electra_ds.common.errors import UserError
from electra_ds.common.section import Section
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import config_folder, load_run
from electra_ds.data.dataset import open_data
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import parameter_count
from electra_ds.reporting import check as check_module
from electra_ds.reporting.check import check
from electra_ds.reporting.memory import PRECISIONS, memory, model_state_bytes
from electra_ds.training.engine import zero_options

PRESETS = sorted(path.stem for path in config_folder("pretrain").glob("*.json"))
ENGINES = sorted(path.stem for path in config_folder("engine").glob("*.json"))
# What a preset leaves open: one of the two lengths, and what the data or the writer of a resolved config fills in.
OPEN = {"train.total_steps", "train.epochs", "model.vocab_size", "data.special_ids", "provenance"}


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """The same model is counted once: the checks below see each preset 51 times."""
    with pytest.MonkeyPatch.context() as patch:
        counts = {}

        def counted(config):
            key = repr((config.model, config.generator))
            counts[key] = counts.get(key) or parameter_count(config)
            return counts[key]

        patch.setattr(check_module, "parameter_count", counted)
        yield


def left_to_a_default(section, prefix=""):
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            yield prefix + name
        elif isinstance(value, Section):
            yield from left_to_a_default(value, f"{prefix}{name}.")


def test_the_shipped_files_are_those_that_the_pages_name():
    assert PRESETS == ["base", "large", "small", "small++", "tiny"]
    assert {"zero0", "zero1", "zero2", "zero3"} <= set(ENGINES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_nothing_to_a_default(preset):
    assert set(left_to_a_default(load_run(preset))) <= OPEN


def test_a_field_left_out_would_be_seen(tmp_path):
    values = json.loads((config_folder("pretrain") / "tiny.json").read_text())
    del values["optimizer"]["beta1"], values["logging"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    assert set(left_to_a_default(load_run(str(path)))) - OPEN == {"optimizer.beta1", "logging"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_with_every_engine_on_1_2_and_8_ranks(preset, engine):
    for world_size in (1, 2, 8):
        run = load_run(preset, engine=engine)
        if run.train.global_batch_size % (world_size * run.train.micro_batch_size):
            run = load_run(preset, ["train.micro_batch_size=1"], engine)
        derived = {line.key: line.value for line in check(run, world_size).derived}
        rows = int(derived["accumulation"]) * world_size * run.train.micro_batch_size
        assert rows == run.train.global_batch_size


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_a_shipped_engine(preset):
    assert load_run(preset).engine in ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_file_is_what_its_name_says(engine):
    values = load_engine(engine)
    stage, _, kind = engine.removeprefix("zero").partition("-")
    assert values["zero_optimization"]["stage"] == int(stage)
    enabled = {
        key: values[key]["enabled"] for key in ("bf16", "fp16", "torch_autocast") if key in values
    }
    automatic = {"bf16": "auto"}
    special = {
        "": automatic,
        "offload": automatic,
        "fp32": {},
        "autocast": {"torch_autocast": True},
    }
    assert enabled == special.get(kind, {kind: True})
    zero = values["zero_optimization"]
    assert ("offload_optimizer" in zero) == (kind == "offload")
    # one rank alone overlaps nothing, but for gradients on their way to the host
    assert (zero_options(zero, 1) == zero) == (stage in "03" or kind == "offload") and zero_options(
        zero, 2
    ) == zero


@pytest.mark.parametrize(
    ("preset", "discriminator", "joint"),
    [
        ("small", 13_549_057, 14_196_219),
        ("base", 109_483_009, 119_386_427),
        ("large", 335_142_913, 354_655_291),
        ("small++", 13_549_057, 23_122_875),
    ],
)
def test_check_reports_the_parameters_of_the_authors_models(preset, discriminator, joint):
    derived = {line.key: line.value for line in check(load_run(preset), 1).derived}
    assert (derived["discriminator"], derived["trained"]) == (f"{discriminator:,}", f"{joint:,}")
    assert derived["vocab_size"] == "30,522"


@pytest.mark.parametrize(
    ("preset", "length", "batch", "steps", "chosen", "rate", "warmup"),
    [
        ("small", 128, 128, 1_000_000, 19, 5e-4, 10_000),
        ("base", 512, 256, 766_000, 79, 2e-4, 10_000),
        ("large", 512, 2048, 400_000, 130, 2e-4, 10_000),
        ("small++", 512, 128, 4_000_000, 79, 5e-4, 10_000),
    ],
)
def test_a_preset_trains_as_published(preset, length, batch, steps, chosen, rate, warmup):
    run = load_run(preset)
    derived = {line.key: line.value for line in check(run, 1).derived}
    assert (run.data.sequence_length, run.train.global_batch_size, run.train.total_steps) == (
        length,
        batch,
        steps,
    )
    assert (run.optimizer.peak_lr, run.optimizer.warmup_steps) == (rate, warmup)
    assert (derived["chosen"], derived["total_steps"]) == (str(chosen), f"{steps:,}")
    assert derived["tokens"] == f"{steps * batch * length:,}"
    adam = run.optimizer
    assert (adam.beta1, adam.beta2, adam.eps, adam.weight_decay) == (0.9, 0.999, 1e-6, 0.01)
    assert (adam.bias_correction, adam.gradient_clipping) == (False, 1.0)


# -------------------------------------------------------------------------------------------------------------- check


def test_check_lists_every_field_with_its_scope_and_meaning():
    lines = {line.key: line for line in check(load_run("tiny"), 1).fields}
    assert (
        lines["train.global_batch_size"][1:3] == ("32", "science")
        and lines["engine"].scope == "machine"
    )
    assert all(line.meaning for line in lines.values()) and len(lines) > 40


def test_check_with_data_counts_epochs_and_the_vocabulary(data):
    source = open_data(data)  # 300 rows of 32, vocabulary 600
    derived = {line.key: line.value for line in check(load_run("tiny"), 2, source).derived}
    assert (derived["epochs"], derived["vocab_size"]) == (
        "320.000",
        "600",
    )  # 3000 steps x 32 rows / 300
    by_epochs = load_run("tiny", ["train.total_steps=null", "train.epochs=75"])
    derived = {line.key: line.value for line in check(by_epochs, 2, source).derived}
    assert (derived["total_steps"], derived["epochs"]) == ("703", "74.987")  # 75 x 300 / 32 = 703.1
    with pytest.raises(UserError, match="prepare with --sequence-length 128"):
        check(load_run("small"), 1, source)


def test_model_states_shrink_with_the_stage_and_the_ranks():
    one = model_state_bytes([[1000]], 1)
    assert one[0, "fp32"] == (
        16_004,
        4000,
    )  # weights, gradients and two moments, 4 bytes each, and a step counter
    assert one[0, "half (bf16, fp16)"] == (
        16_004,
        2000,
    )  # 2 + 2 bytes, and 12 of fp32 master weights and moments
    eight = model_state_bytes([[1000] * 8], 8)
    assert eight[3, "half (bf16, fp16)"][0] == 16_004  # all of it in eight shares
    for precision in PRECISIONS:
        states = [eight[stage, precision][0] for stage in range(4)]
        assert states == sorted(states, reverse=True)


def test_rows_cost_activations_and_recomputing_spares_them():
    def needs(*sets):
        return memory(load_run("tiny", ["data.sequence_length=128", *sets]), 1, [1], ["fp32"])[
            1, "fp32"
        ]

    plain, half = needs(), needs("train.micro_batch_size=8")
    spared = needs("train.activation_checkpointing=true")
    assert plain.states == half.states == spared.states and plain.buckets == spared.buckets
    assert plain.activations > half.activations and plain.activations > spared.activations
    assert plain.peak - half.peak == plain.activations - half.activations


def test_a_step_costs_the_products_that_its_kind_makes():
    sets = ["data.sequence_length=128", "train.global_batch_size=4", "train.micro_batch_size=2"]
    cost = {
        kind: step_flops(load_run("tiny", [*sets, f"objective.kind={kind}"]))
        for kind in ("electra", "mlm")
    }
    cost["all"] = step_flops(load_run("tiny", [*sets, "objective.kind=all_tokens_mlm"]))
    cost["uniform"] = step_flops(load_run("tiny", [*sets, "objective.generator=uniform"]))
    run = load_run("tiny", sets)
    main, small, width = run.model, run.generator, run.model.embedding_size

    def encoder(e):  # multiply-adds a token
        project = 0 if e.hidden_size == width else width * e.hidden_size
        layer = 4 * e.hidden_size**2 + 2 * e.hidden_size * e.ffn_size + 2 * 128 * e.hidden_size
        return e.num_layers * layer + project

    def words(e):  # a place
        return (e.hidden_size + 30528) * width

    places, binary = (
        max_masked_positions(run.objective.mask_prob, 128),
        (main.hidden_size + 1) * main.hidden_size,
    )
    alone = 128 * (encoder(main) + binary)
    written = {
        "electra": alone + 128 * encoder(small) + places * words(small),
        "mlm": 128 * encoder(main) + places * words(main),
        "all": 128 * (encoder(main) + encoder(small) + words(main) + main.hidden_size)
        + places * words(small),
        "uniform": alone,
    }
    assert cost == pytest.approx({kind: 4 * 3 * 2 * row for kind, row in written.items()}, rel=1e-4)
