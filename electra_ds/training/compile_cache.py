"""The folder in which torch.compile keeps compiled code, /tmp/torchinductor_USER.

torch loads what lies there, so another user of the machine who makes this folder first could run
code in the run. torch keeps headers there even if TORCHINDUCTOR_CACHE_DIR names another folder.
"""

import getpass
import os
import re
import stat
import tempfile
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

HINT = "; remove it, or set TMPDIR to a folder of your own"


def compile_cache() -> Path:
    """Return the folder that torch uses by default."""
    try:
        name = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a number without a name, in a container
        name = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", name))


def secure_compile_cache() -> None:
    """Make the folder if it is missing, for this user alone.

    An own folder that the group can write to, as a umask of 002 makes it, loses this permission.
    Raises UserError when it cannot be made, when another user owns it, when every user can write to
    it, and for a link.
    """
    folder = compile_cache()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if is_own and found.st_mode & stat.S_IWGRP and not found.st_mode & stat.S_IWOTH:
            folder.chmod(stat.S_IMODE(found.st_mode) & ~stat.S_IWGRP)
    except OSError as error:
        raise UserError(
            f"{printable(folder)}: torch.compile cannot keep its code there ({error.strerror}){HINT}"
        ) from None
    if not is_own or found.st_mode & stat.S_IWOTH:
        raise UserError(
            f"{printable(folder)}: another user owns it or can write to it, and torch.compile runs "
            f"code from it; expected a folder of this user{HINT}"
        )
