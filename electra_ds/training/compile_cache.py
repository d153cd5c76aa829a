"""The folder in which torch.compile keeps compiled code.

By default it is /tmp/torchinductor_USER. torch loads what lies there, so another user of the
machine who makes this folder first could run code in the run.
"""

import os
import stat
import tempfile
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NAME = "electra_ds-compiled-{user}"  # in the folder of temporary files; user: its number


def set_compile_cache() -> None:
    """Set the folder of compiled code, if the environment does not: one of this user alone.

    Raises UserError when it cannot be made, or when another user owns it or can write to it.
    """
    if os.environ.get(VARIABLE):
        return
    folder = Path(tempfile.gettempdir()) / NAME.format(user=os.geteuid())
    hint = f"; remove it, or set {VARIABLE} to a folder of your own"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(
            f"{printable(folder)}: the folder of compiled code cannot be made "
            f"({error.strerror}){hint}"
        ) from None
    others = stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & others:
        raise UserError(
            f"{printable(folder)}: another user owns it or can write to it, and torch.compile runs "
            f"code from it; expected a folder of this user with mode 700{hint}"
        )
    os.environ[VARIABLE] = str(folder)
