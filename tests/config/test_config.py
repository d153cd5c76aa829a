"""Run configs and engine files: scopes, messages for mistakes, settings, differences, precision."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from electra_ds.common import section
from electra_ds.common.errors import UserError
from electra_ds.common.section import Section
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config import engine_files, loading
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import differences, load_run, parse_run
from electra_ds.config.schema import RUNS, RunConfig
from electra_ds.training import precision

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
PRESETS = {  # of each architecture
    "electra": "tiny",
    "modernbert": "modern-tiny",
    "deberta_v2": "deberta-tiny",
}
LENGTH = ["data.sequence_length=32"]
each_architecture = pytest.mark.parametrize("architecture", RUNS)


def refusal(*arguments, **keywords):
    """The message with which load_run refuses its arguments."""
    with pytest.raises(UserError) as caught:
        load_run(*arguments, **keywords)
    return str(caught.value)


def fields(section=RUNS["electra"], prefix=""):
    """(name with sections, field) of every field of a schema that is not a section."""
    for name, info in section.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = next(
            (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None
        )
        if inner is None:
            yield prefix + name, info
        else:
            yield from fields(inner, f"{prefix}{name}.")


@pytest.fixture
def tiny_file(tmp_path):
    """Write a changed copy of the preset tiny: a function of its values -> path."""

    def write(change=lambda values: None, name="run.json"):
        values = json.loads(loading.find_config("tiny", "pretrain").read_text())
        change(values)
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return str(path)

    return write


# --------------------------------------------------------------------------------------------- keys


@each_architecture
def test_every_field_has_a_meaning_and_a_scope(architecture):
    found = dict(fields(RUNS[architecture]))
    assert (
        len(found) > 50 and "train.global_batch_size" in found and "data.special_ids.mask" in found
    )
    for name, info in found.items():
        assert info.description, name
        assert info.json_schema_extra["scope"] in ("science", "machine"), name


@each_architecture
def test_the_machine_scope_holds_no_field_that_changes_the_training(architecture):
    found = fields(RUNS[architecture])
    machine = {name for name, info in found if info.json_schema_extra["scope"] == "machine"}
    assert {"engine", "train.micro_batch_size", "logging.every", "checkpoint.every"} <= machine
    assert not machine & {
        "train.global_batch_size",
        "train.seed",
        "train.total_steps",
        "data.sequence_length",
    }
    assert not any(
        name.startswith(("model.", "generator.", "objective.", "optimizer.")) for name in machine
    )


@pytest.mark.parametrize(
    ("setting", "key", "meant"),
    [
        ("train.global_batchsize=8", "train.global_batchsize", "global_batch_size"),
        ("optimiser.peak_lr=1", "optimiser", "optimizer"),
        ("model.hiden_size=8", "model.hiden_size", "hidden_size"),
        ("data.special_ids.padd=0", "data.special_ids.padd", "pad"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(setting, key, meant):
    message = refusal("tiny", [setting])
    assert f"{key}: unknown key; did you mean {meant!r}?" in message and "tiny.json" in message


def test_one_message_lists_all_mistakes(tiny_file):
    def spoil(values):
        values["train"]["sead"] = 1
        del values["optimizer"]["peak_lr"]
        values["model"]["num_heads"] = 0

    message = refusal(tiny_file(spoil))
    assert "train.sead: unknown key; did you mean 'seed'?" in message
    assert "optimizer.peak_lr: missing" in message
    assert "model.num_heads = 0: input should be greater than or equal to 1" in message


def test_a_value_of_the_wrong_type_is_shown_with_its_key():
    assert 'model.hidden_size = "wide"' in refusal("tiny", ["model.hidden_size=wide"])
    assert "train.total_steps = 2.5" in refusal("tiny", ["train.total_steps=2.5"])
    assert "objective.mask_prob = 1.5" in refusal("tiny", ["objective.mask_prob=1.5"])


@pytest.mark.parametrize("fraction", ["1/4", "0.25"])
@pytest.mark.parametrize("size", ["hidden_size", "num_layers", "num_heads", "ffn_size"])
def test_a_fractional_generator_size_is_refused_with_an_example(size, fraction):
    message = refusal("tiny", [f"generator.{size}={fraction}"])
    assert f"generator.{size} = " in message and f"write the integer, such as {size}: 64" in message
    assert "write the integer" not in refusal("tiny", [f"model.{size}={fraction}"])


def test_contradicting_sections_are_refused():
    assert "exceeds max_positions 512" in refusal("tiny", ["data.sequence_length=1024"])
    assert "hidden_size 128 is not a multiple of num_heads 3" in refusal(
        "tiny", ["model.num_heads=3"]
    )
    same = ["model.sharing=all"]
    assert load_run("tiny", same).model.sharing == "all"  # equal sizes
    assert "tiny.json: model.sharing = 'all' is one encoder" in refusal(
        "tiny", [*same, "generator.num_layers=1"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["train.epochs=2"],
        ["train.total_steps=null"],
        ["train.total_steps=null", "train.epochs=null"],
    ],
)
def test_exactly_one_of_total_steps_and_epochs_is_required(settings):
    assert "give total_steps or epochs, exactly one" in refusal("tiny", settings)


def test_epochs_are_converted_to_steps():
    run = load_run("tiny", ["train.total_steps=null", "train.epochs=2.5"])
    assert run.total_steps(rows=6400) == 500  # 2.5 x 6400 rows / 32 rows per step
    assert run.total_steps(rows=3) == 1
    assert load_run("tiny").total_steps(rows=None) == 3000
    with pytest.raises(UserError, match=r"train\.epochs needs the data"):
        run.total_steps(rows=None)


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_run("tiny").train.seed = 1


# ------------------------------------------------------------------------------- names, --set, data


def test_a_setting_is_parsed_as_json_or_kept_as_text():
    run = load_run(
        "tiny",
        [
            "train.seed=7",
            "model.init=normal",
            "checkpoint.keep_steps=[5, 10]",
            "engine=zero3",
            "train.seed=8",
        ],
    )
    assert (run.train.seed, run.model.init, run.checkpoint.keep_steps, run.engine) == (
        8,
        "normal",
        [5, 10],
        "zero3",
    )
    assert load_run("tiny", ['engine={"bf16": {"enabled": false}}']).engine == {
        "bf16": {"enabled": False}
    }


@pytest.mark.parametrize("setting", ["train.seed", "=1", "train.=1", ".seed=1"])
def test_a_setting_without_key_or_value_is_refused_with_an_example(setting):
    assert "expected section.field=value, such as train.seed=1" in refusal("tiny", [setting])


def test_a_setting_inside_a_value_is_refused():
    assert "hidden_size is a value, not a section" in refusal("tiny", ["model.hidden_size.x=1"])


def test_the_engine_argument_overrides_the_file():
    assert load_run("tiny").engine == "zero1"
    assert load_run("tiny", ["engine=zero2"], engine="zero3").engine == "zero3"


def test_an_unknown_name_is_refused_with_the_list_of_names():
    message = refusal("smal")
    assert "did you mean 'small'?" in message
    assert "; there are base, base-128-512, deberta-tiny, " in message
    assert "small++, small-128-512, tiny; " in message
    assert "nowhere.json: not found" in refusal("nowhere.json")
    with pytest.raises(UserError, match="did you mean 'zero1'"):
        load_engine("zerol1")


@pytest.mark.parametrize("content", ["[1, 2]", '"tiny"', "{", ""])
def test_a_file_without_a_json_object_is_refused(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    for read in (load_run, load_engine):
        with pytest.raises(UserError, match=r"broken\.json: .*JSON"):
            read(str(path))


@each_architecture
def test_a_resolved_config_is_a_valid_run_config(tmp_path, architecture):
    run = load_run(PRESETS[architecture], LENGTH).with_data(600, SPECIAL, 32)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run.model_dump(mode="json") | {"provenance": {"host": "x"}}))
    assert differences(run, load_run(str(path))) == ([], [])


def test_values_of_the_data_are_filled_in_or_must_agree():
    run = load_run("tiny").with_data(600, SPECIAL, 32)
    assert (run.model.vocab_size, run.data.special_ids) == (600, SPECIAL)
    assert run.with_data(600, SPECIAL, 32) == run
    with pytest.raises(UserError, match=r"model\.vocab_size = 600, but the data has 700"):
        run.with_data(700, SPECIAL, 32)
    with pytest.raises(UserError, match=r"data\.special_ids"):
        run.with_data(600, SPECIAL.model_copy(update={"mask": 9}), 32)
    with pytest.raises(UserError, match="rows of 64: prepare with --sequence-length 32"):
        run.with_data(600, SPECIAL, 64)


# --------------------------------------------------------------------------------- resume and ranks


def test_differences_are_split_by_scope():
    old = load_run("tiny")
    settings = [
        "train.seed=1",
        "optimizer.peak_lr=0.002",
        "train.micro_batch_size=8",
        "logging.every=10",
    ]
    science, machine = differences(old, load_run("tiny", settings, engine="zero3"))
    assert science == ["train.seed: 0 -> 1", "optimizer.peak_lr: 0.001 -> 0.002"]
    assert machine == [
        "train.micro_batch_size: 16 -> 8",
        "logging.every: 50 -> 10",
        "engine: zero1 -> zero3",
    ]
    assert differences(old, old.model_copy(update={"provenance": {"host": "elsewhere"}})) == (
        [],
        [],
    )
    filled = old.with_data(600, SPECIAL, 32)
    assert "data.special_ids: None -> {'pad': 0, " in differences(old, filled)[0][1]


def test_differences_name_the_field_in_a_table_of_sections():
    class One(Section):
        epochs: float | None = section.science(None, "")
        rows: int = section.machine(8, "")

    class Table(Section):
        tasks: dict[str, One] = section.science({}, "")
        options: dict[str, int] = section.science({}, "")

    old = Table(
        tasks={"same": One(epochs=2.0), "gone": One(epochs=3.0), "rte": One(), "none": One()},
        options={"a": 1},
    )
    new = Table(
        tasks={"same": One(epochs=2.0), "rte": One(epochs=1.0, rows=4), "new": One(rows=9)},
        options={"a": 2},
    )
    assert differences(old, new) == (
        [
            "tasks.gone.epochs: 3.0 -> None",
            "tasks.rte.epochs: None -> 1.0",
            "options.a: 1 -> 2",
        ],
        ["tasks.rte.rows: 8 -> 4", "tasks.new.rows: 8 -> 9"],
    )


@each_architecture
def test_every_changed_field_is_reported_in_its_scope(architecture):
    def changed(section, names):
        first, *rest = names
        value = changed(getattr(section, first), rest) if rest else "something else"
        return section.model_copy(update={first: value})

    old = load_run(PRESETS[architecture], LENGTH).with_data(600, SPECIAL, 32)
    for name, info in fields(RUNS[architecture]):
        if name == "provenance" or name.startswith("phases."):  # those: test_phases.py
            continue
        found = dict(
            zip(
                ("science", "machine"), differences(old, changed(old, name.split("."))), strict=True
            )
        )
        assert [line.split(":")[0] for line in found.pop(info.json_schema_extra["scope"])] == [name]
        assert not any(found.values())


@pytest.mark.parametrize(
    ("world", "micro", "expected"), [(1, 16, 2), (2, 16, 1), (2, 4, 4), (1, 32, 1), (32, 1, 1)]
)
def test_accumulation_follows_from_the_batch_sizes(world, micro, expected):
    assert load_run("tiny", [f"train.micro_batch_size={micro}"]).accumulation(world) == expected


def test_a_batch_that_cannot_be_split_names_the_largest_fitting_micro_batch_size():
    def message(global_batch_size, micro_batch_size, world_size):
        sizes = [
            f"train.global_batch_size={global_batch_size}",
            f"train.micro_batch_size={micro_batch_size}",
        ]
        with pytest.raises(UserError) as caught:
            load_run("tiny", sizes).accumulation(world_size)
        return str(caught.value)

    assert "8 ranks x micro_batch_size 48; the largest micro_batch_size that fits is 32" in message(
        256, 48, 8
    )
    assert "--set train.micro_batch_size=4" in message(
        24, 5, 2
    )  # 12 rows a rank: 4 divides, 5 does not
    assert "--set train.micro_batch_size=1" in message(14, 4, 2)  # 7 rows a rank
    assert "over 3 ranks; choose a number of ranks that divides it" in message(32, 1, 3)


def test_the_named_micro_batch_size_is_the_largest_that_fits():
    for rows in range(1, 25):
        for world in (1, 2, 3):
            for micro in range(1, 9):
                run = load_run(
                    "tiny", [f"train.global_batch_size={rows}", f"train.micro_batch_size={micro}"]
                )
                try:
                    assert run.accumulation(world) * world * micro == rows
                except UserError as error:
                    if rows % world:
                        assert "choose a number of ranks" in str(error)
                        continue
                    named = int(str(error).rpartition("=")[2].rstrip(")"))
                    assert named == max(m for m in range(1, micro + 1) if rows // world % m == 0)


# ------------------------------------------------------------------------------------- engine files


NAMES = [
    *("zero0", "zero0-bf16", "zero0-fp16", "zero0-fp32"),
    *("zero1", "zero1-autocast", "zero1-bf16", "zero1-fp16", "zero1-fp32"),
    *("zero2", "zero2-bf16", "zero2-fp16", "zero2-fp32", "zero2-offload"),
    *("zero3", "zero3-bf16", "zero3-fp16", "zero3-fp32", "zero3-offload"),
]
# suffix of a name -> the precision section of its engine
PRECISION_OF_SUFFIX = {
    "": {"bf16": {"enabled": "auto"}},
    "offload": {"bf16": {"enabled": "auto"}},
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_name_is_a_stage_and_a_precision(name):
    stage, _, suffix = name.removeprefix("zero").partition("-")
    zero = {"stage": int(stage)}
    if stage != "0":
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5000000}
    if stage in "12" and suffix != "offload":
        zero |= {"reduce_scatter": True}
    if stage == "3":
        zero |= {"stage3_param_persistence_threshold": 0}
    if suffix == "offload":
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    expected = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    assert load_engine(name) == expected | PRECISION_OF_SUFFIX[suffix]


@pytest.mark.parametrize("name", ["zero1-bf17", "zero1-", "zero1-bf16-fp32", "zero4", "zero1_bf16"])
def test_an_engine_name_with_an_unknown_suffix_is_refused_with_the_list(name):
    with pytest.raises(UserError) as caught:
        load_engine(name)
    message = str(caught.value)
    assert "zero0, zero1, zero2, zero2-offload, zero3, zero3-offload" in message
    assert "each also with -fp32, -bf16, -fp16, -autocast" in message


@pytest.mark.parametrize("key", sorted(engine_files.ENGINE_OWNERS))
def test_engine_keys_of_the_run_config_are_refused(key):
    with pytest.raises(UserError) as caught:
        load_engine({key: 1})
    assert key in str(caught.value) and engine_files.ENGINE_OWNERS[key] in str(caught.value)


def test_the_named_owner_of_an_engine_key_exists():
    names = {name for name, _ in fields()} | set(RunConfig.model_fields)
    for owner in engine_files.ENGINE_OWNERS.values():
        assert owner.split()[-1] in names


@pytest.mark.parametrize(
    ("key", "meant"),
    [("zero_optimisation", "zero_optimization"), ("bfl6", "bf16"), ("fp_16", "fp16")],
)
def test_a_misspelled_engine_key_is_refused_with_the_nearest_known_one(key, meant):
    with pytest.raises(UserError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        load_engine({key: {}})


def test_deepspeed_reads_every_key_that_an_engine_file_may_hold():
    found = importlib.util.find_spec("deepspeed")
    sources = Path(found.origin).parent.rglob("*.py")
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in sources
        if re.search("config|constants", path.name)
    )
    keys = engine_files.ENGINE_KEYS | set(engine_files.ENGINE_OWNERS)
    assert [
        key for key in sorted(keys) if not re.search(rf"""["']{key}["']|^    {key}:""", text, re.M)
    ] == []


@pytest.mark.parametrize(
    "pair", [("bf16", "fp16"), ("bf16", "torch_autocast"), ("fp16", "torch_autocast")]
)
@pytest.mark.parametrize("first", [True, "auto"])
def test_two_precisions_are_refused(pair, first):
    with pytest.raises(UserError, match="choose one precision"):
        load_engine({pair[0]: {"enabled": first}, pair[1]: {"enabled": True}})
    load_engine({pair[0]: {"enabled": first}, pair[1]: {"enabled": False}})


@pytest.mark.parametrize(
    "values",
    [
        {"bf16": True},
        {"zero_optimization": 2},
        {"zero_optimization": {"stage": 4}},
        {"fp16": {"enabled": "yes"}},
        {"torch_autocast": {"enabled": "auto"}},
    ],
)
def test_an_engine_value_of_the_wrong_type_is_refused(values):
    with pytest.raises(UserError, match=r"engine: .*expected"):
        load_engine(values)


def test_an_engine_file_is_loaded_unchanged(tmp_path):
    values = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}, "bf16": {"enabled": True}}
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(values))
    assert load_engine(str(path)) == values == load_engine(values)


# ---------------------------------------------------------------------------------------- precision


def test_auto_precision_follows_the_device(monkeypatch):
    cpu, gpu, file = (
        torch.device("cpu"),
        torch.device("cuda"),
        {"bf16": {"enabled": "auto"}, "steps_per_print": 1},
    )
    for able, expected in ((True, "bf16 autocast"), (False, "fp32")):
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda able=able: able)
        resolved = precision.resolve_precision(file, cpu)
        assert precision.precision_name(resolved) == expected and "bf16" not in resolved
        assert resolved["steps_per_print"] == 1
    for able, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able
        )
        assert precision.precision_name(precision.resolve_precision(file, gpu)) == expected
        assert (
            precision.precision_name(
                precision.resolve_precision({"fp16": {"enabled": "auto"}}, gpu)
            )
            == expected
        )
    assert file == {"bf16": {"enabled": "auto"}, "steps_per_print": 1}


def test_an_explicit_precision_is_kept(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    for kind, name in (("bf16", "bf16"), ("torch_autocast", "bf16 autocast")):
        resolved = precision.resolve_precision({kind: {"enabled": True}}, torch.device("cpu"))
        assert resolved == {kind: {"enabled": True}} and precision.precision_name(resolved) == name
    assert precision.precision_name(precision.resolve_precision({}, torch.device("cpu"))) == "fp32"


def test_fp16_on_a_cpu_is_refused_with_an_alternative():
    with pytest.raises(UserError, match=r'"bf16": {"enabled": "auto"}'):
        precision.resolve_precision({"fp16": {"enabled": True}}, torch.device("cpu"))
    precision.resolve_precision({"fp16": {"enabled": False}}, torch.device("cpu"))


def test_parse_run_names_the_source_of_the_config():
    with pytest.raises(UserError, match=r"^OUT/ckpt/5/meta\.json: model: missing"):
        parse_run({}, "OUT/ckpt/5/meta.json")


def test_a_spike_factor_of_at_most_1_is_refused():
    with pytest.raises(UserError, match=r"spike_factor = 1\.0 makes average losses spikes"):
        load_run("tiny", ["train.spike_factor=1"])
    load_run("tiny", ["train.spike_factor=1.5"])


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (
            ["ckpt/latest", "ckpt/5/meta.json", "config.json"],
            "x",
            ": it is a run: give x/config.json",
        ),
        (["ckpt/latest", "ckpt/5/meta.json", "config.json"], "x/ckpt", "give .*/x/config.json$"),
        (["ckpt/latest", "ckpt/5/meta.json", "config.json"], "x/ckpt/5", "give .*/x/config.json$"),
        (["config.json", "model.safetensors"], "./x", "it is a Hugging Face folder .*import"),
        (["config.json"], "x", "expected a pretrain config: give x/config.json$"),
        (["manifest.json"], "x", "it is a folder of prepared data$"),
        ([], "x.json", "expected a pretrain config: it is an empty folder$"),
    ],
)
def test_a_folder_in_the_place_of_a_config_is_named(tmp_path, monkeypatch, files, given, message):
    monkeypatch.chdir(tmp_path)
    Path(given).mkdir(parents=True)
    for name in files:
        path = Path("x", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(UserError, match=rf"is a folder; .*{message}"):
        load_run(given)


def test_the_name_of_a_preset_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert load_run("tiny") == load_run(str(loading.find_config("tiny", "pretrain")))
