"""URLs: allowed protocols, file systems, and removal of secrets."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from electra_ds.common.bounded_http import client_options
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

# Protocols that are opened. Some of the other protocols of fsspec execute templates, run shell
# commands over ssh or mount archives.
PROTOCOLS = ("file", "gs", "hf", "http", "https", "memory", "s3")
# The place in a URL after its protocol. Path() makes one slash of two.
START = re.compile(r":/+")
RUN = re.compile(r"\S*")
# Packages that open a protocol; fsspec itself opens the other ones.
PACKAGES = {
    "gs": "gcsfs",
    "hf": "'electra_ds[hf]'",
    "http": "'electra_ds[remote]'",
    "https": "'electra_ds[remote]'",
    "s3": "'electra_ds[remote]'",
}
CREDENTIALS = {
    "gs": "`gcloud auth application-default login`",
    "hf": "HF_TOKEN or `hf auth login`",
    "s3": "`aws configure` or AWS_ACCESS_KEY_ID",
}
# Forms of the place of a data folder.
FOLDER_FORMS = (
    "a folder, https://HOST/FOLDER, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or "
    "hf://datasets/OWNER/NAME/FOLDER"
)
# A text in which parameters are looked for: what follows a protocol or a question mark.
PARAMETERS = re.compile(r"(?::/|\?)\S*")
PARAMETER = re.compile(r"([^\s?&=;#/]+)=([^&\s]+)")
SECRET_NAME = re.compile("(?i)token|key|secret|sig|pass|pwd|credential|auth|session|jwt|code")
MOST_CREDENTIALS = 1 << 12  # characters of a user name and a password, which bounds the search
SPELLINGS = 3  # levels of percent-encoding of the name of a parameter


def is_url(place: str) -> bool:
    """Return whether `place` has a protocol, or a chain of protocols, and is not a local path."""
    return "://" in place or "::" in place or place.startswith("data:")


def protocol_of(place: str) -> str:
    """Return the protocol of a URL in lower case; `file` for a path.

    Raises UserError for a chain of protocols (`a::b`), for a protocol that is not in `PROTOCOLS`,
    and for an http URL without a valid host and port.
    """
    if not is_url(place):
        return "file"
    name = place.partition("://")[0].lower()
    if "::" in place or name not in PROTOCOLS:
        raise UserError(
            f"{printable(redacted(place))}: this kind of URL is not opened; expected a path or one of "
            f"the protocols {', '.join(f'{known}://' for known in PROTOCOLS)}, without '::'"
        )
    if name in ("http", "https") and not _has_host(place):
        raise UserError(
            f"{printable(redacted(place))}: found no valid host and port; expected a URL such as "
            "https://host/folder"
        )
    return name


def _has_host(url: str) -> bool:
    """Return whether a URL has a host without white space, and no port or one from 0 to 65535."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for an invalid port
    except ValueError:
        return False
    return bool(parts.hostname) and not re.search(r"\s", parts.netloc)


def file_system(place: str) -> tuple[Any, str]:
    """Return (fsspec file system, path in it) of a folder or URL.

    Raises UserError when the protocol is not allowed, or when its package is not installed.
    """
    import fsspec

    protocol = protocol_of(place)
    if is_url(place):  # fsspec accepts protocol names in lower case only
        place = f"{protocol}://{place.partition('://')[2]}"
    is_http = protocol in ("http", "https")
    try:
        options = {"client_kwargs": client_options()} if is_http else {}
        return fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        is_missing = isinstance(error, ImportError) and protocol in PACKAGES
        install = f"; pip install {PACKAGES[protocol]}" if is_missing else ""
        raise UserError(
            f"{redacted(place)}: {redacted(str(error))}; expected {FOLDER_FORMS}{install}"
        ) from None


def what_to_check(place: str) -> str:
    """What a user can check when the URL of a data folder cannot be read or written."""
    protocol = protocol_of(place)
    credentials = f" ({CREDENTIALS[protocol]})" if protocol in CREDENTIALS else ""
    text = f"check the URL, the network and the credentials{credentials}; expected {FOLDER_FORMS}"
    if protocol == "hf":
        text += (
            " that `prepare` wrote; a dataset of texts is an input of `prepare` instead: --input "
            "dataset:OWNER/NAME"
        )
    return text


def read_bounded(system: Any, path: str, limit: int) -> bytes:
    """Return the content of a file of an fsspec file system, at most `limit` bytes.

    Raises ValueError when the file is larger; no more than limit + 1 bytes are requested. Errors of
    the file system are passed on.
    """
    content = system.cat_file(path, start=0, end=limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return content


def url_name(place: str) -> str:
    """Return the last component of a path, or of a URL without query and fragment.

    Query and fragment may contain secrets.
    """
    return Path(re.split("[?#]", place, maxsplit=1)[0] if is_url(place) else place).name


def redacted(text: str) -> str:
    """Return `text` with `***` for the user names, passwords and secret query values of its URLs.

    text: a URL, or a message or command line that contains URLs.
    """
    parts = []
    position = 0
    while start := START.search(text, position):
        end = _end_of_credentials(text, start.end())
        parts += [text[position : start.end()], "***@" if end else ""]
        position = end or start.end()
    without = "".join(parts) + text[position:]
    return PARAMETERS.sub(lambda found: PARAMETER.sub(_redacted_parameter, found.group()), without)


def _end_of_credentials(text: str, begin: int) -> int:
    """Return the position after the user name and the password of a URL, 0 without them.

    begin: position after the protocol. Both may contain "@", "/" and blanks that are not escaped,
    so they are taken to reach to the last "@" that can belong to them.
    """
    limit = min(len(text), begin + MOST_CREDENTIALS)
    line_end = text.find("\n", begin, limit)
    line_end = limit if line_end < 0 else line_end
    run = RUN.match(text, begin, line_end)
    assert run is not None
    path = re.split(r"[?#]", run.group(), maxsplit=1)[0]
    authority = path.partition("/")[0]
    user, _, password = authority.partition(":")
    is_port = password.strip(":,;.)'\"").isdigit() or not password
    if not is_port and "@" not in authority and not user.startswith("["):
        return text.rfind("@", begin, line_end) + 1
    if "@" in path and ("@" in authority or ":" in authority):
        return begin + path.rindex("@") + 1
    slash = text.find("/", begin, line_end)
    return text.rfind("@", begin, line_end if slash < 0 else slash) + 1


def _redacted_parameter(parameter: re.Match[str]) -> str:
    name = parameter[1]
    for _ in range(SPELLINGS):
        name = unquote(name)
    return f"{parameter[1]}=***" if SECRET_NAME.search(name) else parameter.group()
