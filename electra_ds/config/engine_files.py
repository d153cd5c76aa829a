"""DeepSpeed engine files: loading by name, checks, keys that belong to the run config.

An engine is given by name, by path or as a JSON object. A name is that of a file in
ds_configs/engine (zero1), with an optional precision as suffix (zero1-bf16).
"""

from collections.abc import Iterator
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_json
from electra_ds.common.printable import printable, shortened
from electra_ds.common.suggestions import nearest
from electra_ds.config.engine_keys import REFUSED, EngineKeys
from electra_ds.config.loading import config_names, find_config, parse_config

ENGINE_KEYS = set(EngineKeys.model_fields)
PRECISIONS = ("fp16", "bf16", "torch_autocast")
# Suffix of an engine's name -> precision section. It replaces the precision sections of the file.
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
# Keys that are set from the run config, and the place of each there. An engine file must not have
# them, so that no setting has two values.
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
    """Return the checked DeepSpeed config of a name, a path or an object.

    Batch sizes and clipping are not in it; `Engine` adds them from the run config.
    Raises UserError for an unknown name, unknown keys, keys that belong to the run config, and
    values that are not supported.
    """
    if isinstance(engine, str):
        where, values = _read(engine)
    else:
        where, values = "engine", engine
    _check_keys(values, where)
    _check_sections(values, where)
    _check_precision(values, where)
    parse_config(values, where, EngineKeys)
    return values


def engine_names() -> list[str]:
    """Return the names of the shipped engines, each without and with a precision suffix."""
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
            f"no engine config named {shortened(name)}{nearest(name, engine_names())}; there are "
            f"{', '.join(config_names('engine'))}, each also with -{', -'.join(SUFFIXES)}; "
            "or give a path (x.json)"
        )
    path = find_config(name, "engine")
    return printable(path), read_json(path, "a DeepSpeed config")


def _check_keys(values: dict[str, Any], where: str) -> None:
    """Raise UserError for keys that another place owns, keys that are refused, and unknown keys."""
    for key in values:
        if key in ENGINE_OWNERS:
            owner = ENGINE_OWNERS[key]
            raise UserError(f"{where}: {key} belongs to the run config ({owner}): remove it here")
        if key not in ENGINE_KEYS and key not in REFUSED:
            raise UserError(
                f"{where}: unknown key {shortened(key)}{nearest(key, sorted(ENGINE_KEYS))}"
            )
    for path in _paths(values):
        if path[-1] in REFUSED:
            raise UserError(
                f"{where}: {printable('.'.join(path))} is not accepted, because "
                f"{REFUSED[path[-1]]}: remove the key"
            )


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _check_sections(values: dict[str, Any], where: str) -> None:
    """Raise UserError for values of a wrong type or out of range, and for unsupported values."""
    for key in ("zero_optimization", *PRECISIONS):
        if not isinstance(values.get(key, {}), dict):
            raise UserError(f"{where}: {key} = {shortened(values[key])}; expected a JSON object")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(
            f"{where}: zero_optimization.stage = {shortened(stage)}; expected 0, 1, 2 or 3"
        )
    autocast = values.get("torch_autocast", {}).get("dtype", "bfloat16")
    if autocast not in ("bfloat16", "torch.bfloat16"):
        raise UserError(
            f"{where}: torch_autocast.dtype = {shortened(autocast)}; "
            'expected "bfloat16"; for fp16 use the section fp16'
        )
    for block, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if values.get(block, {}).get(key) is False:
            raise UserError(
                f"{where}: {block}.{key} = false; expected true, because otherwise gradients that "
                "are not finite change the weights; remove the key"
            )


def _check_precision(values: dict[str, Any], where: str) -> None:
    switches = {kind: values.get(kind, {}).get("enabled", False) for kind in PRECISIONS}
    for kind, enabled in switches.items():
        allows_auto = kind != "torch_autocast"
        if not (isinstance(enabled, bool) or (enabled == "auto" and allows_auto)):
            raise UserError(
                f"{where}: {kind}.enabled = {shortened(enabled)}; "
                'expected true or false, for bf16 and fp16 also "auto"'
            )
    enabled_kinds = [kind for kind, enabled in switches.items() if enabled]
    # bf16 and fp16 may both be "auto": `resolve_precision` then selects one for the device.
    if len(enabled_kinds) > 1 and any(enabled is True for enabled in switches.values()):
        raise UserError(
            f"{where}: {' and '.join(enabled_kinds)} are both enabled; choose one precision"
        )


def offloads_optimizer(engine: dict[str, Any]) -> bool:
    """Return whether the optimizer of a DeepSpeed config is on the CPU (`offload_optimizer`)."""
    section = engine.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(section.get("device", "none") != "none")
