"""HTTP responses of a bounded size.

fsspec reads the body of a response into memory. A server may send more bytes than requested, an
endless body, or a small body that decompresses to a large one.
"""

import re
from typing import Any

CHUNK = 1 << 16  # bytes read at a time
LONGEST = 1 << 30  # bytes of a body for which no range was requested


def client_options() -> dict[str, Any]:
    """Return the options of an aiohttp session that reads at most a limited number of bytes.

    After a request for n bytes (header Range), at most n + 1 bytes of the body are read. Without
    that header, a body of more than LONGEST bytes raises ValueError.
    Raises ImportError without aiohttp.
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
