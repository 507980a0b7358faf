"""A store that has bad days: a proxy before a real one that refuses, breaks off, or does as told and says nothing."""

import http.client
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mmray.store import open_store

KINDS = ("refused", "broken off", "unanswered")


class FaultyStore(ThreadingHTTPServer):
    """Answers as the store behind it does, but for a share of all requests."""

    daemon_threads = True

    def __init__(self, upstream: str, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self._share, self._random = upstream.removeprefix("http://"), share, random.Random(seed)
        self.faults: Counter[tuple[str, str]] = Counter()
        """Method and kind -> how often."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str) -> str | None:
        if self._random.random() >= self._share:
            return None
        kind = self._random.choice(KINDS)
        self.faults[method, kind] += 1
        return kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""


class OneFault(FaultyStore):
    """Answers as the store behind it does, but for one request that was chosen."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, share=0, seed=0)
        self.asked: Counter[str] = Counter()
        """Method -> requests since the last choice."""
        self._next: tuple[str, str, int] | None = None

    def next_fault(self, kind: str, method: str, number: int) -> None:
        """Chooses the number-th request from now with a method."""
        self.asked.clear()
        self._next = kind, method, number

    def fault(self, method: str) -> str | None:
        self.asked[method] += 1
        if self._next is None or (method, self.asked[method] - 1) != self._next[1:]:
            return None
        kind, self._next = self._next[0], None
        self.faults[method, kind] += 1
        return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyStore

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command)
        if fault in ("refused", "conflict"):
            self.send_response(503 if fault == "refused" else 409)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "broken off":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, {**self.headers, "Connection": "close"})
        answer = upstream.getresponse()
        data = answer.read()
        if fault == "unanswered":  # but done
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _relay

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""


@contextmanager
def s3_on_loopback() -> Iterator[str]:
    """URL of a real S3 server for the duration of a `with` block."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    # Its part for S3 alone: the whole looks into a hundred folders at each request, to know which services there are.
    app = create_backend_app("s3")
    with serving(make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)) as server:
        yield f"http://127.0.0.1:{server.port}"


@contextmanager
def faulty(upstream: str, share: float, seed: int = 0) -> Iterator[FaultyStore]:
    """A store before another for the duration of a `with` block."""
    with serving(FaultyStore(upstream, share, seed)) as server:
        yield server


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    """A store that answers for the duration of a `with` block."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def upload(folder: Path, uri: str, name: str) -> str:
    """Puts the files of a folder into a bucket, and returns where they are."""
    store = open_store(uri)  # of the bucket: those of folders in it are made when the store has its bad day
    for path in folder.rglob("*"):
        if path.is_file():
            store.create(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return store.child(name)
