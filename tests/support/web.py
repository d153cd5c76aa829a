"""A folder served over http with byte ranges, as object stores serve them, and with faults."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Web(ThreadingHTTPServer):
    """An http server of a folder.

    requests:        (path, first byte) of every request
    supports_ranges: whether the header Range has an effect
    change:          change(path, content) returns the content to send instead, or a status
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.supports_ranges = True
        self.requests: list[tuple[str, int]] = []
        self.change: Callable[[str, bytes], bytes | int] = lambda path, content: content
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Web

    def do_GET(self) -> None:
        range_header = self.headers.get("Range", "") if self.server.supports_ranges else ""
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", range_header)
        start = int(byte_range[1]) if byte_range else 0
        size = int(byte_range[2]) + 1 - start if byte_range and byte_range[2] else -1
        path = self.server.folder / self.path.lstrip("/")
        self.server.requests.append((self.path, start))
        answer: bytes | int = 404
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(size)
            answer = self.server.change(self.path, content)
        if isinstance(answer, int):
            status, content = answer, b""
        else:
            status, content = 206 if byte_range else 200, answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Write no log."""


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[Web]:
    """Serve a folder until the end of the block."""
    with Web(folder, port) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()
