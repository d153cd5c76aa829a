"""DeepSpeed engine files: names with a precision, checks, keys that the run config owns.

An engine is named by a file in ds_configs/engine, such as zero1, with an optional precision as
suffix (zero1-bf16), by a path, or it is the JSON object itself.
"""

from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_json
from electra_ds.common.suggestions import nearest
from electra_ds.config.loading import config_names, find_config

# Keys of a DeepSpeed file. DeepSpeed ignores an unknown top-level key, so a misspelled one is
# refused here.
ENGINE_KEYS = {
    "aio",
    "bf16",
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
PRECISIONS = ("fp16", "bf16", "torch_autocast")
# The section that a suffix of an engine's name puts in the place of the file's own precision.
SUFFIXES: dict[str, dict[str, Any]] = {
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
# Numbers that the run config owns: the same key in both files would have two owners.
ENGINE_OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "derived from train.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "section optimizer",
    "scheduler": "section optimizer",
    "activation_checkpointing": "train.activation_checkpointing",
}


def load_engine(engine: str | dict[str, Any]) -> dict[str, Any]:
    """The checked DeepSpeed config of a name, a path or an object.

    What the run owns (batch sizes, clipping) is merged later. UserError for an unknown name,
    unknown keys, keys that the run owns, and values that cannot work.
    """
    if isinstance(engine, str):
        where, values = _read(engine)
    else:
        where, values = "engine", engine
    _check_keys(values, where)
    _check_sections(values, where)
    _check_precision(values, where)
    return values


def engine_names() -> list[str]:
    """The names of shipped engines, without and with a precision."""
    files = config_names("engine")
    with_precision = [f"{name}-{suffix}" for name in files for suffix in SUFFIXES]
    return [*files, *with_precision]


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """(description for messages, values) of an engine by name or path."""
    base, _, suffix = name.rpartition("-")
    if base in config_names("engine") and suffix in SUFFIXES:
        path = find_config(base, "engine")
        values = read_json(path, "a DeepSpeed config")
        without = {key: value for key, value in values.items() if key not in PRECISIONS}
        return f"{path} with {suffix}", without | SUFFIXES[suffix]
    is_path = name.endswith(".json") or "/" in name
    if not is_path and name not in config_names("engine"):
        raise UserError(
            f"no engine config named {name!r}{nearest(name, engine_names())}; there are "
            f"{', '.join(config_names('engine'))}, each also with -{', -'.join(SUFFIXES)}; "
            "or give a path (x.json)"
        )
    path = find_config(name, "engine")
    return str(path), read_json(path, "a DeepSpeed config")


def _check_keys(values: dict[str, Any], where: str) -> None:
    for key in values:
        if key in ENGINE_OWNERS:
            owner = ENGINE_OWNERS[key]
            raise UserError(f"{where}: {key} belongs to the run config ({owner}): remove it here")
        if key not in ENGINE_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, sorted(ENGINE_KEYS))}")


def _check_sections(values: dict[str, Any], where: str) -> None:
    for key in ("zero_optimization", *PRECISIONS):
        if not isinstance(values.get(key, {}), dict):
            raise UserError(f"{where}: {key} = {values[key]!r}; expected a JSON object")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage = {stage!r}; expected 0, 1, 2 or 3")
    autocast = values.get("torch_autocast", {}).get("dtype", "bfloat16")
    if autocast not in ("bfloat16", "torch.bfloat16"):
        raise UserError(
            f'{where}: torch_autocast.dtype must be "bfloat16"; for fp16 use the fp16 block'
        )
    for block, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if values.get(block, {}).get(key) is False:
            raise UserError(
                f"{where}: {block}.{key} must stay true, or gradients that are not finite would "
                "reach the weights"
            )


def _check_precision(values: dict[str, Any], where: str) -> None:
    switches = {kind: values.get(kind, {}).get("enabled", False) for kind in PRECISIONS}
    for kind, enabled in switches.items():
        allows_auto = kind != "torch_autocast"
        if not (isinstance(enabled, bool) or (enabled == "auto" and allows_auto)):
            raise UserError(
                f"{where}: {kind}.enabled = {enabled!r}; "
                'expected true, false or (bf16, fp16) "auto"'
            )
    enabled_kinds = [kind for kind, enabled in switches.items() if enabled]
    # Two "auto" are one choice: the device decides.
    if len(enabled_kinds) > 1 and any(enabled is True for enabled in switches.values()):
        raise UserError(
            f"{where}: {' and '.join(enabled_kinds)} are both enabled; choose one precision"
        )
