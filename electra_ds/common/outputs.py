"""Checks of output paths before the work, and folders that are written whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import fsync_folder, is_device
from electra_ds.common.printable import printable

# Open files of this process, which may be pipes, such as those of `>(command)` in bash.
STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


def check_output_file(path: Path, option: str, inputs: tuple[Path | None, ...] = ()) -> None:
    """Check that a file can be written at `path`. Creates its folder.

    option: the option that holds the path, for messages. inputs: files that the command reads.
    Raises UserError when `path` is a folder, a named pipe, a socket, a disk or one of `inputs`, or
    when its folder cannot be written. Character devices and open files of this process are accepted.
    """
    with _explained(path, option, "a file"):
        if path.is_dir():
            raise UserError(f"{option} {printable(path)}: is a folder; expected a file")
        if path.exists() and not (path.is_file() or _is_stream(path)):
            raise UserError(
                f"{option} {printable(path)}: is a named pipe, a socket or a disk, where writing "
                "could wait for ever or destroy data; expected a file, /dev/stdout or /dev/null"
            )
        for read in inputs:
            if read is not None and path.exists() and read.exists() and path.samefile(read):
                raise UserError(
                    f"{option} {printable(path)}: is also an input and would be overwritten; "
                    "choose another file"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_device(path):
            _try_writing(path.parent, path.name)


def check_outside(path: Path, option: str, inputs: Mapping[str, Path | None]) -> None:
    """Raise UserError when an output is an input folder, or lies below one.

    option: the option that holds the output `path`, which may be missing. inputs: name of an
    argument -> a path that the command reads, or None; only folders are compared, links resolved.
    """
    with _explained(path, option, "a path outside of the inputs"):
        target = Path(os.path.realpath(path))
        above = [folder for folder in (target, *target.parents) if folder.exists()]
        for name, read in inputs.items():
            if read is None or not read.is_dir():
                continue
            if any(folder.samefile(read) for folder in above):
                raise UserError(
                    f"{option} {printable(path)}: lies in the folder that the command reads "
                    f"({name} {printable(read)}); choose a path outside of it"
                )


def check_output_folder(path: Path, option: str) -> None:
    """Create the folder `path` if it is missing, and check that files can be written to it.

    Raises UserError with the option, the path and the reason.
    """
    with _explained(path, option, "a folder"):
        if path.exists() and not path.is_dir():
            raise UserError(f"{option} {printable(path)}: is a file; expected a folder")
        path.mkdir(parents=True, exist_ok=True)
        _try_writing(path, "write")


@contextlib.contextmanager
def new_folder(path: Path, option: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block succeeds.

    `path` must be missing or empty. It is unchanged when the block fails, so the command can be
    repeated. Raises UserError when `path` is a file, is not empty or cannot be created, and
    RunFailure when the block cannot write to it, such as on a full disk.
    """
    with _explained(path, option, "a new folder"):
        if path.exists() and not path.is_dir():
            raise UserError(f"{option} {printable(path)}: is a file; expected a new folder")
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{option} {printable(path)}: not empty; choose a new folder")
        check_output_folder(path.parent, option)
        if path.exists():
            _try_writing(path, "write")
        unfinished = path.parent / f".{secrets.token_hex(6)}.tmp"
        unfinished.mkdir()
    try:
        yield unfinished
        _publish(unfinished, path)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(unfinished)):
            raise  # the error is about a file that the block read
        reason = str(error.strerror or error).replace(str(unfinished), str(path))
        raise RunFailure(
            f"{option} {printable(path)}: cannot be written ({reason}); nothing is left there: "
            "free some space or choose another folder, and repeat the command"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, path: Path) -> None:
    """Rename `unfinished` to `path`, or move its content into `path` if that is a mount point."""
    try:
        os.replace(unfinished, path)
    except OSError:
        if not path.is_dir():
            raise
        for child in sorted(unfinished.iterdir()):
            shutil.move(child, path / child.name)
    fsync_folder(path.parent)


def _is_stream(path: Path) -> bool:
    """Whether a path is a character device, or a standard stream or open file of this process."""
    return path.is_char_device() or str(path).startswith(STREAMS)


def _try_writing(folder: Path, name: str) -> None:
    """Create and remove a file in `folder`, and look up `name`, the name of the later file.

    Raises OSError when the folder is not writable, or the name is too long.
    """
    trial = folder / f".{secrets.token_hex(6)}.tmp"
    try:
        with open(trial, "wb") as file:
            file.write(b"x")
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.stat(folder / name)  # OSError for a name that is too long


@contextlib.contextmanager
def _explained(path: Path, option: str, expected: str) -> Iterator[None]:
    """Raise the OSError of a block as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        where = printable(getattr(error, "filename", None) or path)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{option} {printable(path)}: cannot be written ({where}: {reason}); expected "
            f"{expected} in a place with free space and write permission"
        ) from None
