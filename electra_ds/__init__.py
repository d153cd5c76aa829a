"""Pretraining of text encoders by replaced token detection (ELECTRA) on DeepSpeed.

Public names are imported at their first use, so `import electra_ds` does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from electra_ds.cli.api import pretrain
    from electra_ds.config.loading import load_run
    from electra_ds.evaluation.detect import Detector
    from electra_ds.interop.load_model import load
    from electra_ds.model.wrapper import Electra

__all__ = ["Detector", "Electra", "load", "load_run", "pretrain"]
_MODULES = {
    "Detector": "electra_ds.evaluation.detect",
    "Electra": "electra_ds.model.wrapper",
    "load": "electra_ds.interop.load_model",
    "load_run": "electra_ds.config.loading",
    "pretrain": "electra_ds.cli.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
