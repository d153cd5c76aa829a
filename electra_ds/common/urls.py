"""URLs: allowed protocols, file systems, and removal of secrets."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from electra_ds.common.bounded_http import client_options
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

# Protocols that are opened. Some of the other protocols of fsspec execute templates, run shell
# commands over ssh or mount archives.
PROTOCOLS = ("file", "gs", "hf", "http", "https", "memory", "s3")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*://\S*")
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
SECRET = re.compile(
    r"(?i)\b([\w.-]*(?:token|key|secret|signature|sig|password|passwd|pwd|credential|auth|session)"
    r"[\w.-]*=)[^&\s;#'\"]*"
)


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
    return URL.sub(lambda match: _redacted_url(match.group()), text)


def _redacted_url(url: str) -> str:
    head, slashes, rest = url.partition("://")
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = path.partition("/")[0]
    # A password may contain unescaped "/" and "@", so everything before the last "@" is hidden.
    if "@" in path and ("@" in authority or ":" in authority):
        authority = path.rpartition("@")[0] + "@"
        head, rest = f"{head}{slashes}***@", rest[len(authority) :]
    else:
        head = f"{head}{slashes}"
    return head + SECRET.sub(r"\1***", rest)
