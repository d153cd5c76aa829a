"""Removal of the secrets of URLs from texts."""

import re
from urllib.parse import unquote

# The place in a URL after its protocol. Path() makes one slash of two.
START = re.compile(r":/+")
RUN = re.compile(r"\S*")
# A text in which parameters are looked for: what follows a protocol or a question mark.
PARAMETERS = re.compile(r"(?::/|\?)\S*")
PARAMETER = re.compile(r"([^\s?&=;#/]+)=([^&\s]+)")
SECRET_NAME = re.compile("(?i)token|key|secret|sig|pass|pwd|credential|auth|session|jwt|code")
MOST_CREDENTIALS = 1 << 12  # characters of a user name and a password, which bounds the search
SPELLINGS = 3  # levels of percent-encoding of the name of a parameter


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


def without_secrets_of(url: str, text: str) -> str:
    """Return `redacted(text)` without the user name and the password of `url`.

    text: an error of a library that opened `url`. Some libraries name the part of a URL after the
    protocol, in which `redacted` finds no secret.
    """
    without = redacted(text)
    start = START.search(url)
    end = _end_of_credentials(url, start.end()) if start else 0
    if start is None or not end:
        return without
    credentials = url[start.end() : end]
    for spelling in (credentials, unquote(credentials)):
        without = without.replace(spelling, "***@")
        if ":" in spelling.strip(":@"):  # a user name alone may be any word of the text
            without = without.replace(spelling[:-1], "***")
    return without


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
