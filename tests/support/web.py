"""A folder served over http with byte ranges, as by an object store, and with faults on demand."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Web(ThreadingHTTPServer):
    """The server.

    asked: (path, first byte) of every request.
    change(path, content): the content or the status that is sent instead.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.knows_ranges = folder, True
        self.asked: list[tuple[str, int]] = []
        self.change: Callable[[str, bytes], bytes | int] = lambda path, content: content
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Web

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        asked = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if self.server.knows_ranges
            else None
        )
        start = int(asked[1]) if asked else 0
        content = 404
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(int(asked[2]) + 1 - start if asked and asked[2] else -1)
        self.server.asked.append((self.path, start))
        content = content if content == 404 else self.server.change(self.path, content)
        self.send_response(content if isinstance(content, int) else 206 if asked else 200)
        content = b"" if isinstance(content, int) else content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[Web]:
    """Serve a folder until the end of the block."""
    with Web(folder, port) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()
