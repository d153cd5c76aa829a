"""HTTP responses of a bounded size.

fsspec reads the body of a response into memory. A server may send more than was requested, a body
without an end, or a small body that decompresses to a large one.
"""

import re
from typing import Any

CHUNK = 1 << 16  # bytes read at a time
LONGEST = 1 << 30  # bytes of a body for which no range was requested


def client_options() -> dict[str, Any]:
    """Return the options of an aiohttp session with bounded responses. ImportError without aiohttp.

    The body of a response to a request for n bytes (header Range) has at most n + 1 bytes: the rest
    is not read. A body of more than LONGEST bytes without that header raises ValueError.
    """
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                self._body = await _read(self)
            return self._body

    return {"response_class": BoundedResponse, "headers": {"Accept-Encoding": "identity"}}


async def _read(response: Any) -> bytes:
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    most = int(asked[2]) - int(asked[1]) + 2 if asked else LONGEST + 1
    body = bytearray()
    while len(body) < most and (chunk := await response.content.read(min(CHUNK, most - len(body)))):
        body += chunk
    if len(body) > LONGEST and not asked:
        raise ValueError(f"the server sent more than {LONGEST:,} bytes")
    return bytes(body)
