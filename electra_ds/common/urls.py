"""URLs: allowed protocols, file systems, and what is no local path."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from electra_ds.common.bounded_http import client_options
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted, without_secrets_of

# Protocols that are opened. Some of the other protocols of fsspec execute templates, run shell
# commands over ssh or mount archives.
PROTOCOLS = ("file", "gs", "hf", "http", "https", "memory", "s3")
STARTS_AS_URL = re.compile(rf"(?i)({'|'.join(PROTOCOLS)}|ftp|ssh):/")
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


def is_url(place: str) -> bool:
    """Return whether `place` has a protocol, or a chain of protocols, and is not a local path."""
    return "://" in place or "::" in place or place.startswith("data:")


def check_local(place: str | Path, name: str) -> None:
    """Raise UserError if a URL is given in the place of a local path.

    place: as given. Path() makes one slash of two. name: of the option or argument, for the
    message.
    """
    text = str(place)
    if "://" in text or STARTS_AS_URL.match(text):
        raise UserError(
            f"{name} {printable(redacted(text))}: is a URL; expected a local path; download it first"
        )


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
            f"{redacted(place)}: {without_secrets_of(place, str(error))}; expected {FOLDER_FORMS}{install}"
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
