"""Engine files: an allow-list of keys with types and limits, below the top level as well."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.common.errors import UserError
from electra_ds.config.engine_files import load_engine
from electra_ds.config.engine_keys import REFUSED, EngineKeys
from electra_ds.config.loading import load_run

ZERO = "zero_optimization"
# A file that makes DeepSpeed import, write or connect, and a part of the reason that is given.
DANGEROUS = [
    ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["os.X"]}}, "imports"),
    ({ZERO: {"stage": 3, "leaf_module": {"classes": ["os.X"]}}}, "imports"),
    ({"tensorboard": {"enabled": True, "output_path": "/"}}, "any folder"),
    ({"csv_monitor": {"enabled": True, "output_path": "/"}}, "any folder"),
    ({"wandb": {"enabled": True}}, "network"),
    ({"comet": {"enabled": True}}, "network"),
    ({"flops_profiler": {"enabled": True, "output_file": "/x"}}, "any file"),
    ({ZERO: {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "NVMe"),
    ({"aio": {"block_size": 1}}, "NVMe"),
]
WRONG = [
    {ZERO: {"stage": True}},
    {ZERO: {"stage": [1]}},
    {ZERO: {"stage": 2, "overlap_com": True}},
    {ZERO: {"stage": 2, "overlap_comm": "true"}},
    {ZERO: {"stage": 2, "reduce_bucket_size": "auto"}},
    {ZERO: {"stage": 2, "reduce_bucket_size": -5}},
    {ZERO: {"stage": 2, "reduce_bucket_size": 0}},
    {ZERO: {"stage": 2, "reduce_bucket_size": 1e18}},
    {ZERO: {"stage": 2, "reduce_bucket_size": 1.5}},
    {ZERO: {"stage": 1, "allgather_bucket_size": 3}},
    {ZERO: {"stage": 1, "round_robin_gradients": True}},
    {ZERO: {"stage": 2, "offload_optimizer": "cpu"}},
    {ZERO: {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
    {ZERO: {"stage": 2, "offload_optimizer": {}}},
    {ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
    {ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    {ZERO: {"stage": 2, "offload_param": {"device": "cpu"}}},
    {ZERO: None},
    {"fp16": {"enabled": True, "loss_scale": -1}},
    {"fp16": {"enabled": True, "initial_scale_power": 10**6}},
    {"fp16": {"enabled": True, "loss_scale_window": 0}},
    {"bf16": {"enabled": 1}},
    {"prescale_gradients": True, ZERO: {"stage": 3}},
    {"data_types": {"grad_accum_dtype": "bf16"}},
    {"communication_data_type": "int8"},
    {"steps_per_print": 0},
    {"flops_profiler": {"enabled": True, "module_depth": 1000}},
    {"comms_logger": True},
    {"zero_optimization\x1b[31m": {}},
]


@pytest.mark.parametrize(("values", "reason"), DANGEROUS)
def test_keys_that_import_write_or_connect_are_refused(values, reason, tmp_path):
    with pytest.raises(UserError, match=rf"is not accepted, because .*{reason}"):
        load_engine(values)
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"engine\.json: .*is not accepted"):
        load_engine(str(path))


@pytest.mark.parametrize("values", WRONG, ids=json.dumps)
def test_values_of_another_type_or_out_of_range_are_refused_in_one_message(values):
    with pytest.raises(UserError, match=r"^engine: ") as caught:
        load_engine(values)
    assert str(caught.value).isprintable()


def test_large_whole_numbers_may_be_written_as_floats():
    assert load_engine({ZERO: {"stage": 2, "reduce_bucket_size": 5e8}})


def test_the_allow_list_has_no_field_for_a_path_or_a_name_of_code():
    """A field of type str would reach DeepSpeed unchecked; only names of collectives are text."""

    def text_fields(model, prefix=""):
        for name, info in model.model_fields.items():
            kinds = getattr(info.annotation, "__args__", (info.annotation,))
            if any(kind is str for kind in kinds):
                yield prefix + name
            for kind in kinds:
                if isinstance(kind, type) and hasattr(kind, "model_fields"):
                    yield from text_fields(kind, f"{prefix}{name}.")

    assert list(text_fields(EngineKeys)) == ["comms_logger.prof_ops"]
    assert not set(EngineKeys.model_fields) & set(REFUSED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted({*EngineKeys.model_fields, *REFUSED, "stage", "enabled", "device", "dtype", "x"})
KEYS = st.sampled_from(NAMES)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, JSON, max_size=3) | JSON, max_size=3))
def test_any_json_is_loaded_or_refused_with_a_user_error(values):
    try:
        assert load_engine(values) is values
    except UserError as error:
        assert str(error).startswith("engine: ")


@pytest.mark.parametrize(
    "setting",
    [
        "model.vocab_size=1000000000000000",
        "model.num_layers=10000000",
        "model.max_positions=1000000000000000",
        "train.total_steps=1000000000000",
        "train.timeout_minutes=1e300",
        "train.silence_seconds=1e300",
        "optimizer.peak_lr=NaN",
        "optimizer.peak_lr=Infinity",
        "optimizer.peak_lr=1e999",
        'engine={"tensorboard": {}, "tensorboard": {}}',
    ],
)
def test_sizes_times_and_rates_have_limits(setting):
    with pytest.raises(UserError):
        load_engine(load_run("tiny", [setting]).engine)
