"""Precision of an engine file on a device: fp32, bf16, fp16 or bf16 autocast."""

from pathlib import Path
from typing import Any

import torch

from electra_ds.common.errors import UserError

EngineConfig = dict[str, Any]  # a DeepSpeed JSON file as Python values
NAMES = {"bf16": "bf16", "fp16": "fp16", "torch_autocast": "bf16 autocast"}


def resolve_precision(engine_config: EngineConfig, device: torch.device) -> EngineConfig:
    """Return a copy of the config with `"enabled": "auto"` replaced by a precision of the device.

    On CUDA this is bf16 if the device supports it, else fp16. On a CPU it is bf16 autocast if the
    processor has bf16 matrix instructions, else fp32.
    Raises UserError for fp16 on a CPU.
    """
    resolved = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in engine_config.items()
    }
    auto = {
        kind: resolved.pop(kind)
        for kind in ("bf16", "fp16")
        if resolved.get(kind, {}).get("enabled") == "auto"
    }
    if auto and device.type == "cuda":
        kind = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        resolved[kind] = auto.get(kind, {}) | {"enabled": True}
    elif auto and cpu_multiplies_bf16():
        resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if resolved.get("fp16", {}).get("enabled") and device.type == "cpu":
        raise UserError(
            "fp16.enabled = true, but this run is on a CPU, which does not support fp16 training: "
            'use bf16 or fp32, or write "bf16": {"enabled": "auto"} (engine files zero0 to zero3)'
        )
    return resolved


def cpu_multiplies_bf16() -> bool:
    """Return whether this processor has bf16 matrix instructions (Linux only, else False).

    DeepSpeed's CPU accelerator is not used for this: it reports bf16 on every processor.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text()
    return "avx512_bf16" in text or "amx_bf16" in text


def precision_name(engine_config: EngineConfig) -> str:
    """Return "fp32", "bf16", "fp16" or "bf16 autocast" for a resolved engine config."""
    for key, name in NAMES.items():
        if engine_config.get(key, {}).get("enabled") is True:
            return name
    return "fp32"
