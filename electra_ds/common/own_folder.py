"""Files of an own folder, such as a run folder, without following links out of the folder.

A folder that another person made may have symbolic links at the names that a command writes or
removes. The folder itself, which the user named, may be reached through links. A single file is
written by `files.write_bytes`, which replaces a link.
"""

import contextlib
import os
import shutil
import stat
from io import FileIO
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.files import TEMPORARY
from electra_ds.common.json_files import set_aside
from electra_ds.common.printable import printable


def is_own(folder: Path, *names: str) -> bool:
    """Return whether folder/NAME/... is inside `folder` after all links are resolved.

    The path may be missing.
    """
    path = os.path.realpath(folder.joinpath(*names))
    return Path(path).is_relative_to(os.path.realpath(folder))


def own_path(folder: Path, *names: str) -> Path:
    """Return folder/NAME/... Raises UserError when a link leads out of `folder`."""
    path = folder.joinpath(*names)
    if not is_own(folder, *names):
        raise UserError(
            f"{printable(path)}: a symbolic link leads to {printable(os.path.realpath(path))}, out "
            f"of {printable(folder)}; expected a path inside that folder: remove the link"
        )
    return path


def own_folder(folder: Path, *names: str) -> Path:
    """Create the folder folder/NAME/... and return it. Raises UserError as `own_path`, OSError."""
    path = own_path(folder, *names)
    path.mkdir(parents=True, exist_ok=True)
    return path


def open_to_append(path: Path) -> FileIO:
    """Open a regular file to append to it, without a buffer. Raises OSError.

    Anything else at `path`, such as a link, a FIFO or a folder, is renamed by `set_aside`.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        set_aside(path)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    return open(path, "ab", buffering=0, opener=opener)


def remove_temporary_files(folder: Path, *names: str) -> None:
    """Remove the temporary files that killed writes left in folder/NAME/...; other files are kept.

    Nothing is removed in a folder to which a link leads out of `folder`.
    """
    if not is_own(folder, *names):
        return
    for path in folder.joinpath(*names).glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)  # a heartbeat thread may rename its own file meanwhile


def remove_own(folder: Path, *names: str) -> None:
    """Remove folder/NAME/..., a file or a folder with its content. Errors are ignored.

    A link is removed itself. Nothing is removed in a folder to which a link leads out of `folder`.
    """
    path = folder.joinpath(*names)
    if not is_own(folder, *names[:-1]):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # does not follow links
    else:
        with contextlib.suppress(OSError):
            path.unlink()
