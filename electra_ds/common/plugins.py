"""Functions of the user, loaded by the name `package.module:function`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from electra_ds.common.errors import UserError


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """Import the function of "package.module:function". This runs the module's code.

    The module is searched as Python does, and in the current folder.
    setting: the option or key that holds the name, for the UserError.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{setting} = {name!r}: {error}; expected package.module:function, found from the "
            "current folder or by PYTHONPATH"
        ) from error
