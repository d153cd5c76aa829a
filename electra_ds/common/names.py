"""Names from files that become paths: one component below a known folder, nothing else."""

from pathlib import Path, PurePosixPath

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened

MAX_NAME_BYTES = 255  # of one component on the usual file systems


def check_name(name: object, where: str, what: str) -> str:
    """`name` if it is a plain file name: one component, without control characters.

    where: the file and key that hold it. what: its meaning.
    UserError for an empty name, `.`, `..`, a separator, a drive letter, a control character, or
    more than 255 bytes of UTF-8.
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
    """`name` if it is a relative path of plain names, with `/` between them; UserError otherwise."""
    text = name if isinstance(name, str) else ""
    if not text or PurePosixPath(text).is_absolute():
        check_name(name, where, what)
    for part in text.split("/"):
        check_name(part, where, what)
    return text


def check_inside(path: str | Path, folder: str | Path, where: str) -> Path:
    """`path` if, after all symbolic links are resolved, it lies in `folder`; UserError otherwise."""
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"{where}: {printable(path)} leads out of {printable(folder)}; expected a path inside "
            "that folder, also after symbolic links"
        )
    return Path(path)
