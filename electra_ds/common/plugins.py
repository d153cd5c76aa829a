"""Import of user-defined functions by the name `package.module:function`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from electra_ds.common.errors import UserError


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """Import and return the function "package.module:function". This runs the module's code.

    The module is searched in sys.path. The current folder is appended to sys.path before.
    setting: the option or key that holds the name, for the error message.
    Raises UserError when the module or the function cannot be imported.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{setting} = {name!r}: {error}; expected package.module:function with the module in "
            "the current folder or on PYTHONPATH"
        ) from error
