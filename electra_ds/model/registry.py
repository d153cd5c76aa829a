"""The architecture of a model config."""

from collections.abc import Callable
from typing import Any

from electra_ds.config.architectures import ModelConfig
from electra_ds.model.architecture import Architecture
from electra_ds.model.deberta_v2 import DebertaV2Architecture
from electra_ds.model.electra import ElectraArchitecture
from electra_ds.model.modernbert import ModernBertArchitecture

ARCHITECTURES: dict[str, Callable[[Any], Architecture]] = {
    "electra": ElectraArchitecture,
    "modernbert": ModernBertArchitecture,
    "deberta_v2": DebertaV2Architecture,
}


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the architecture that makes the modules of a config."""
    return ARCHITECTURES[model.architecture](model)
