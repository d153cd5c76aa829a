"""Checks of names that are read from files and become paths below a known folder."""

from pathlib import Path, PurePosixPath

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened

MAX_NAME_BYTES = 255  # of one component on the usual file systems


def check_name(name: object, where: str, what: str) -> str:
    """Return `name` if it is a plain file name: one component, without control characters.

    where: file and key of the name, for messages. what: its meaning, for messages.
    Raises UserError for a value that is not text, an empty name, `.`, `..`, a separator, a colon,
    white space at an end, a character that `printable` escapes, or more than 255 bytes of UTF-8.
    """
    text = name if isinstance(name, str) else ""
    if (
        text in ("", ".", "..")
        or any(character in text for character in "/\\:\0")
        or printable(text) != text
        or text != text.strip()
        or len(text.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES
    ):
        raise UserError(
            f"{where}: {shortened(name)} is not {what}; expected a plain file name without "
            "'/', '\\', ':', '..' or control characters"
        )
    return text


def check_relative(name: object, where: str, what: str) -> str:
    """Return `name` if it is a relative path: plain names with `/` between them.

    Arguments and UserError as in `check_name`.
    """
    text = name if isinstance(name, str) else ""
    if not text or PurePosixPath(text).is_absolute():
        check_name(name, where, what)
    for part in text.split("/"):
        check_name(part, where, what)
    return text


def check_inside(path: str | Path, folder: str | Path, where: str) -> Path:
    """Return `path` if it is inside `folder` after all symbolic links are resolved.

    where: the file or option that holds the path, for messages. Raises UserError otherwise.
    """
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"{where}: {printable(path)} leads out of {printable(folder)}; expected a path inside "
            "that folder, also after symbolic links"
        )
    return Path(path)
