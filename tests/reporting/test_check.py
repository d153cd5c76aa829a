"""Presets and check: complete files, published sizes, derived numbers, changed values, memory."""

import json

import pytest
from cost import step_flops

from electra_ds.common.errors import UserError
from electra_ds.common.section import Section
from electra_ds.config.engine_files import engine_names, load_engine
from electra_ds.config.loading import config_names, find_config, load_run
from electra_ds.data.dataset import open_data
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import parameter_count
from electra_ds.reporting import check as check_module
from electra_ds.reporting.check import check
from electra_ds.reporting.memory import PRECISIONS, memory, model_state_bytes
from electra_ds.reporting.optimizer_memory import GroupSizes
from electra_ds.training.engine import zero_options

PRESETS = config_names("pretrain")
ENGINES = config_names("engine")
# Fields that a preset leaves open: one of the two lengths, and values that are filled in later.
OPEN = {
    *("train.total_steps", "train.epochs", "model.vocab_size", "data.special_ids", "provenance"),
    "train.batch_schedule",  # []: every step has the same number of rows
    *("optimizer.decay_steps", "optimizer.decay_shape"),  # of the schedule wsd only
    "phases",  # of a run with phases only
    *("objective.temperature_decay", "generator.embedding_size"),  # null: no effect
    # Of the optimizer muon only.
    *(f"optimizer.muon_{name}" for name in ("momentum", "ns_steps", "adjust", "lr_scale")),
}


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """Count the parameters of each model once: the tests below check each preset many times."""
    with pytest.MonkeyPatch.context() as patch:
        counts = {}

        def counted(config):
            key = repr((config.model, config.generator, config.objective))
            counts[key] = counts.get(key) or parameter_count(config)
            return counts[key]

        patch.setattr(check_module, "parameter_count", counted)
        yield


def fields_with_default(section, prefix=""):
    """Names of the fields that a config file does not set."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            yield prefix + name
        elif isinstance(value, Section):
            yield from fields_with_default(value, f"{prefix}{name}.")


def test_the_shipped_files_are_those_that_the_docs_name():
    modern = {"modern-base", "modern-base-phases", "modern-large", "modern-small", "modern-tiny"}
    deberta = {f"deberta-v3-{size}" for size in ("xsmall", "small", "base", "large")}
    electra = {"base", "base-128-512", "large", "small", "small-128-512", "small++", "tiny"}
    assert set(PRESETS) == electra | modern | deberta | {"deberta-tiny"}
    assert ENGINES == ["zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_every_field(preset):
    assert set(fields_with_default(load_run(preset))) <= OPEN


def test_a_missing_field_is_detected(tmp_path):
    values = json.loads(find_config("tiny", "pretrain").read_text())
    del values["optimizer"]["beta1"], values["logging"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    assert set(fields_with_default(load_run(str(path)))) - OPEN == {"optimizer.beta1", "logging"}


@pytest.mark.parametrize("engine", engine_names())
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_engine_on_1_2_and_8_ranks(preset, engine):
    for world_size in (1, 2, 8):
        run = load_run(preset, engine=engine)
        if run.phases:  # each phase fits 8 ranks
            assert len(check(run, world_size).phases) == len(run.phases)
            continue
        if run.train.global_batch_size % (world_size * run.train.micro_batch_size):
            run = load_run(preset, ["train.micro_batch_size=1"], engine)
        derived = {line.key: line.value for line in check(run, world_size).derived}
        rows = int(derived["accumulation"]) * world_size * run.train.micro_batch_size
        assert rows == run.train.global_batch_size


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_a_shipped_engine(preset):
    assert load_run(preset).engine in ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_a_single_rank_overlaps_nothing_at_stages_1_and_2(engine):
    """Offload is the exception: gradients are copied to the host while backward runs."""
    zero = load_engine(engine)["zero_optimization"]
    is_unchanged = zero["stage"] in (0, 3) or "offload_optimizer" in zero
    assert (zero_options(zero, 1) == zero) == is_unchanged
    assert zero_options(zero, 2) == zero


@pytest.mark.parametrize(
    ("preset", "discriminator", "joint"),
    [
        ("small", 13_549_057, 14_196_219),
        ("base", 109_483_009, 119_386_427),
        ("large", 335_142_913, 354_655_291),
        ("small++", 13_549_057, 23_122_875),
        ("modern-tiny", 4_526_465, 4_975_419),
        ("modern-small", 26_918_785, 32_113_723),
        ("modern-base", 134_363_905, 170_090_299),
        ("modern-large", 375_510_017, 499_162_939),
        ("deberta-tiny", 4_526_977, 4_979_259),
        ("deberta-v3-xsmall", 33_360_385, 44_383_675),
        ("deberta-v3-small", 66_955_777, 89_236_795),
        ("deberta-v3-base", 109_483_009, 153_027_643),
        ("deberta-v3-large", 335_142_913, 487_906_107),
    ],
)
def test_check_reports_the_parameters_of_every_size(preset, discriminator, joint):
    derived = {line.key: line.value for line in check(load_run(preset), 1).derived}
    assert (derived["discriminator"], derived["trained"]) == (f"{discriminator:,}", f"{joint:,}")
    assert derived["vocab_size"] == "30,522"


def test_a_frozen_generator_is_counted_apart():
    def rows(generator):
        sets = ["model.sharing=untied", f"objective.generator={generator}"]
        return {line.key: line.value for line in check(load_run("tiny", sets), 1).derived}

    trained, frozen = rows("model"), rows("frozen")
    assert "frozen" not in trained
    assert frozen["discriminator"] == frozen["trained"] == trained["discriminator"]
    counts = (int(x.replace(",", "")) for x in (frozen["frozen"], frozen["trained"]))
    assert f"{sum(counts):,}" == trained["trained"]


@pytest.mark.parametrize(
    ("preset", "encoder"), [("modern-base", 149_014_272), ("modern-large", 394_781_696)]
)
def test_a_modern_encoder_has_the_parameters_of_the_published_model(preset, encoder):
    """With ModernBERT's vocabulary and without the head."""
    run = load_run(preset, ["model.vocab_size=50368"])
    width = run.model.hidden_size
    head = width * width + width + width + 1  # dense, norm, classify
    assert parameter_count(run).discriminator == encoder + head


@pytest.mark.parametrize(
    ("preset", "encoder"),
    [
        ("deberta-v3-xsmall", 70_682_112),
        ("deberta-v3-small", 141_304_320),
        ("deberta-v3-base", 183_831_552),
        ("deberta-v3-large", 434_012_160),
    ],
)
def test_a_deberta_encoder_has_the_parameters_of_the_stock_class(preset, encoder):
    """With the vocabulary of DeBERTaV3 and without the head: DebertaV2Model has as many."""
    run = load_run(preset, ["model.vocab_size=128100"])
    width = run.model.hidden_size
    head = width * width + width + width + 1  # dense, classify
    assert parameter_count(run).discriminator == encoder + head


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


# -------------------------------------------------------------------------------------------- check


def test_check_lists_every_field_with_its_scope_and_meaning():
    lines = {line.key: line for line in check(load_run("tiny"), 1).fields}
    assert lines["train.global_batch_size"][1:3] == ("32", "science")
    assert lines["engine"].scope == "machine"
    assert all(line.meaning for line in lines.values()) and len(lines) > 40
    assert lines["objective.masking"].meaning.endswith("(token, whole_word, span)")


def test_check_lists_the_values_that_differ_from_the_baseline(tmp_path):
    preset = load_run("tiny")
    assert check(preset, 1, baseline=preset).changed == []
    other = load_run("tiny", ["train.seed=3", "objective.kind=mlm"], "zero2")
    changed = check(other, 1, baseline=preset).changed
    assert [(line.key, line.value) for line in changed] == [
        ("objective.kind", "mlm"),
        ("train.seed", "3"),
        ("engine", "zero2"),
    ]
    path = tmp_path / "run.json"
    path.write_text(find_config("tiny", "pretrain").read_text())
    keys = {line.key for line in check(load_run(str(path)), 1).changed}  # from the defaults
    assert {"model.init", "optimizer.beta2", "train.micro_batch_size"} <= keys
    assert not keys & {"model.sharing", "optimizer.eps", "checkpoint.every", "engine"}


def test_check_with_data_counts_epochs_and_the_vocabulary(data):
    source = open_data(data)  # 300 rows of 32 tokens, vocabulary of 600 entries
    derived = {line.key: line.value for line in check(load_run("tiny"), 2, source).derived}
    # 3000 steps x 32 rows / 300 rows
    assert (derived["epochs"], derived["vocab_size"]) == ("320.000", "600")
    by_epochs = load_run("tiny", ["train.total_steps=null", "train.epochs=75"])
    derived = {line.key: line.value for line in check(by_epochs, 2, source).derived}
    assert (derived["total_steps"], derived["epochs"]) == ("703", "74.987")  # 75 x 300 / 32 = 703.1
    with pytest.raises(UserError, match="prepare with --sequence-length 128"):
        check(load_run("small"), 1, source)


def test_model_states_shrink_with_the_stage_and_the_ranks():
    one = model_state_bytes([GroupSizes([1000])], 1)
    # Weights, gradients and two moments of 4 bytes each, and a step counter.
    assert one[0, "fp32"] == (16_004, 4000)
    # Weights and gradients of 2 bytes, fp32 master weights and moments of 12 bytes.
    assert one[0, "half (bf16, fp16)"] == (16_004, 2000)
    eight = model_state_bytes([GroupSizes([1000] * 8)], 8)
    assert eight[3, "half (bf16, fp16)"][0] == 16_004  # everything in eight shares
    for precision in PRECISIONS:
        states = [eight[stage, precision][0] for stage in range(4)]
        assert states == sorted(states, reverse=True)


def test_muon_has_one_moment_less_for_its_matrices_and_a_cost_per_update():
    sizes = ["model.num_layers=1", "generator.num_layers=1", "model.vocab_size=100"]
    adam, muon = (load_run("tiny", [*sizes, f"optimizer.kind={kind}"]) for kind in ("adam", "muon"))
    derived = {line.key: line.value for line in check(muon, 1).derived}
    # Of two layers of width 128: query, key, value, out, and two of the feed-forward layer.
    elements = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    assert derived["muon"] == f"{elements:,}"
    # Five steps with A = X X^T, A A and B X: 2 n^2 m, 2 n^3 and 2 n^2 m operations for [n, m].
    square, wide = 5 * 6 * 128**3, 5 * (4 * 128**2 * 512 + 2 * 128**3)
    assert derived["newton_schulz"] == f"{2 * (4 * square + 2 * wide) / 1e9:,.1f} GFLOP"
    assert "muon" not in {line.key for line in check(adam, 1).derived}
    for stage in range(4):
        states = [memory(run, 2, [stage], ["fp32"])[stage, "fp32"].states for run in (adam, muon)]
        shares = 1 if stage == 0 else 2
        # Within the gradients of parameters that lie on two ranks, which are kept whole.
        assert states[0] - states[1] == pytest.approx(4 * elements / shares, rel=0.01)


@pytest.mark.parametrize("kind", ["muon", "stable_adamw", "lamb"])
def test_updates_of_other_optimizers_hold_more_than_those_of_adam(kind):
    sizes = ["data.sequence_length=8", "train.micro_batch_size=1"]
    adam, other = (
        memory(load_run("tiny", [*sizes, f"optimizer.kind={name}"]), 1, [2], ["fp32"])[2, "fp32"]
        for name in ("adam", kind)
    )
    # Muon's largest group is smaller than Adam's, so it is compared with its own copy of gradients.
    own = 4 * 786_432 if kind == "muon" else adam.update
    assert other.update > own


@pytest.mark.parametrize("preset", ["tiny", "modern-tiny", "deberta-tiny"])
def test_activations_grow_with_the_rows_and_recomputation_reduces_them(preset):
    def needs(*sets):
        run = load_run(preset, ["data.sequence_length=128", *sets])
        return memory(run, 1, [1], ["fp32"])[1, "fp32"]

    plain, half = needs(), needs("train.micro_batch_size=8")
    recomputed = needs("train.activation_checkpointing=true")
    assert plain.states == half.states == recomputed.states
    assert plain.buckets == recomputed.buckets
    assert plain.activations > half.activations and plain.activations > recomputed.activations
    assert plain.peak - half.peak == plain.activations - half.activations


def test_activations_of_local_layers_grow_with_the_row_and_not_with_its_square():
    def activations(length, pattern):
        sets = [f"data.sequence_length={length}", "model.local_attention=16"]
        sets += [f"model.attention_pattern={json.dumps(pattern)}", "model.num_layers=6"]
        sets += ["train.micro_batch_size=1", "model.vocab_size=100", "objective.kind=mlm"]
        run = load_run("modern-tiny", sets)
        return memory(run, 1, [1], ["fp32"])[1, "fp32"].activations

    local = ["global"] + ["local"] * 5
    short, long = activations(512, local), activations(1024, local)
    assert 1.9 < long / short < 2.3
    assert activations(1024, ["global"]) > 1.5 * long


def test_the_operations_of_a_step_are_the_matrix_products_of_its_kind():
    sets = ["data.sequence_length=128", "train.global_batch_size=4", "train.micro_batch_size=2"]
    counted = {
        kind: step_flops(load_run("tiny", [*sets, f"objective.kind={kind}"]))
        for kind in ("electra", "mlm")
    }
    counted["all"] = step_flops(load_run("tiny", [*sets, "objective.kind=all_tokens_mlm"]))
    counted["uniform"] = step_flops(load_run("tiny", [*sets, "objective.generator=uniform"]))
    run = load_run("tiny", sets)
    main, small, width = run.model, run.generator, run.model.embedding_size

    # Multiply-adds per token (encoder) and per predicted position (vocab_head).
    def encoder(e):
        project = 0 if e.hidden_size == width else width * e.hidden_size
        layer = 4 * e.hidden_size**2 + 2 * e.hidden_size * e.ffn_size + 2 * 128 * e.hidden_size
        return e.num_layers * layer + project

    def vocab_head(e):
        return (e.hidden_size + 30528) * width

    masked = max_masked_positions(run.objective.mask_prob, 128)
    binary_head = (main.hidden_size + 1) * main.hidden_size
    discriminator = 128 * (encoder(main) + binary_head)
    generator = 128 * encoder(small) + masked * vocab_head(small)
    per_row = {
        "electra": discriminator + generator,
        "mlm": 128 * encoder(main) + masked * vocab_head(main),
        "all": 128 * (encoder(main) + vocab_head(main) + main.hidden_size) + generator,
        "uniform": discriminator,
    }
    # 4 rows, forward and twice as much in backward, 2 operations per multiply-add.
    expected = {kind: 4 * 3 * 2 * products for kind, products in per_row.items()}
    assert counted == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("length", "local_keys"), [(128, 128), (512, 192)])
def test_the_operations_of_local_layers_are_those_of_their_blocks(length, local_keys):
    """A block of 64 queries has the keys of three blocks, in rows that are longer than these."""
    sets = [f"data.sequence_length={length}", "train.global_batch_size=4"]
    run = load_run("modern-tiny", [*sets, "train.micro_batch_size=2"])
    width, ffn = run.model.hidden_size, run.model.ffn_size
    keys = {"global": length, "local": local_keys}

    def encoder(e):
        attended = sum(keys[kind] for kind in run.model.layer_kinds(e.num_layers))
        return e.num_layers * (4 * width**2 + 3 * width * ffn) + 2 * width * attended

    masked = max_masked_positions(run.objective.mask_prob, length)
    per_row = length * (encoder(run.model) + encoder(run.generator) + (width + 1) * width)
    per_row += masked * (width + 30528) * width
    assert step_flops(run) == pytest.approx(4 * 3 * 2 * per_row, rel=1e-4)


def test_check_shows_the_rate_where_the_schedule_changes():
    sets = ["optimizer.warmup_steps=10", "train.total_steps=101", "optimizer.peak_lr=0.5"]
    decay = ["optimizer.schedule=wsd", "optimizer.decay_steps=51", "optimizer.final_lr_ratio=0.2"]

    def shown(*more):
        lines = check(load_run("tiny", [*sets, *more]), 1).derived
        return {
            line.key: (line.value, line.meaning) for line in lines if line.key.startswith("lr(")
        }

    found = shown(*decay)
    assert list(found) == ["lr(0)", "lr(10)", "lr(50)", "lr(100)"]
    assert [value for value, _ in found.values()] == ["0", "0.5", "0.5", "0.107843"]
    assert found["lr(50)"][1].endswith("(wsd): middle of the run, start of the decay")
    assert list(shown()) == ["lr(0)", "lr(10)", "lr(50)", "lr(100)"]
    assert list(shown("optimizer.warmup_steps=0", "train.total_steps=1")) == ["lr(0)"]
    assert not shown("train.total_steps=null", "train.epochs=1")  # without data
