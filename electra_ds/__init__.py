"""Pretraining of text encoders by replaced token detection (ELECTRA) on DeepSpeed.

The public names are imported when they are used, so that `import electra_ds` loads no torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Detector": "electra_ds.evaluation.detect",
    "Electra": "electra_ds.model.wrapper",
    "load": "electra_ds.interop.load_model",
    "load_run": "electra_ds.config.loading",
    "pretrain": "electra_ds.training.api",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
