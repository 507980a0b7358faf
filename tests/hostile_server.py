"""A web server of images that also sends back what no server should; it notes what reached it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from faults import serving

IMAGE = b"an image"


class HostileServer(ThreadingHTTPServer):
    """Answers by the last word of the path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[str] = []
        """Every target that was asked for."""
        self.failures = 0
        """How often `sometimes` fails still."""
        self.image = IMAGE
        self.elsewhere = f"{self.url}/redirected"
        """Where redirects lead to."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.close_connection = True
        what = self.path.partition("?")[0].rpartition("/")[2]
        if what.isdigit():
            self._answer(int(what), [("Location", self.server.elsewhere), ("Content-Length", "0")])
        elif what == "huge":
            self._answer(200, [("Content-Length", str(10**12))], b"x" * 100)
        elif what == "endless":
            self._answer(200, [("Transfer-Encoding", "chunked")])
            self._go_on(b"1000\r\n" + b"x" * 0x1000 + b"\r\n", 0)
        elif what == "drip":
            self._answer(200, [("Content-Length", "1000")])
            self._go_on(b"x", 0.05)
        elif what == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._go_on(b"X: y\r\n", 0.05)
        elif what == "short":
            self._answer(200, [("Content-Length", "1000")], b"x" * 10)
        elif what == "gzip":
            self._answer(200, [("Content-Encoding", "gzip"), ("Content-Length", "2")], b"\x1f\x8b")
        elif what == "nonsense":
            self.wfile.write(b"\x00\xff nonsense \r\n\r\n")
        elif what == "sometimes" and self.server.failures:
            self.server.failures -= 1
            if self.server.failures % 2:
                self._answer(503, [("Content-Length", "0")])
        else:
            self._answer(200, [("Content-Length", str(len(self.server.image)))], self.server.image)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _go_on(self, piece: bytes, pause_s: float) -> None:
        try:
            while True:
                self.wfile.write(piece)
                time.sleep(pause_s)
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """A server for the duration of a `with` block."""
    with serving(HostileServer()) as server:
        yield server
