"""Measures scoring against an object store whose every answer takes its time: does the model wait for it?

The store is a small server on loopback that speaks as much of S3 as a run needs: read, look up, list, create if absent.
"""

import asyncio
import hashlib
import multiprocessing
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from benchmark_process import run_mmray

from mmray.serve.haproxy import free_port

DELAY_S = 0.05
Answer = tuple[int, dict[str, str], bytes]


class SlowStore:
    """A bucket in memory; each answer waits for `delay_s` first."""

    def __init__(self, objects: dict[str, bytes], delay_s: float) -> None:
        self._objects, self._delay_s = objects, delay_s

    async def serve(self, port: int) -> None:
        """Answers until it is cancelled."""
        server = await asyncio.start_server(self._talk, "127.0.0.1", port, limit=2**20)
        async with server:
            await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, target, _ = line.decode().split(" ", 2)
                headers = dict[str, str]()
                while (field := (await reader.readline()).decode().strip()) != "":
                    name, _, value = field.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self._delay_s)
                status, more, data = self._answer(method, target, headers, body)
                more |= {"Content-Length": str(len(data))} if "Content-Length" not in more else {}
                lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in more.items()), "", ""]
                writer.write("\r\n".join(lines).encode() + (b"" if method == "HEAD" else data))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(target)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        if method == "PUT":
            if "if-none-match" in headers and key in self._objects:
                return 412, {}, b""
            self._objects[key] = body
            return 200, {"ETag": _tag(body)}, b""
        if method == "DELETE":
            self._objects.pop(key, None)
            return 204, {}, b""
        if method == "GET" and not key:
            return 200, {"Content-Type": "application/xml"}, self._list(parse_qs(parts.query).get("prefix", [""])[0])
        if key not in self._objects:
            return 404, {}, b""
        return self._read(self._objects[key], headers.get("range"))

    def _read(self, data: bytes, wanted: str | None) -> Answer:
        headers = {"ETag": _tag(data), "Last-Modified": "Tue, 24 Nov 2026 00:00:00 GMT"}
        if wanted is None:
            return 200, headers, data
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = (int(first), min(int(last or len(data)), len(data) - 1)) if first else (len(data) - int(last), -1)
        end = end if end >= 0 else len(data) - 1
        return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]

    def _list(self, prefix: str) -> bytes:
        found = (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(_tag(data))}</ETag>"
            "<LastModified>2026-11-24T00:00:00.000Z</LastModified></Contents>"
            for key, data in sorted(self._objects.items())
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>".encode()


def _tag(data: bytes) -> str:
    return f'"{hashlib.blake2b(data[:64] + data[-64:] + len(data).to_bytes(8, "big"), digest_size=8).hexdigest()}"'


def measure_store(folder: Path, bundle: Path, repeats: int, processes: int) -> dict[str, Any]:
    """Returns rates of `mmray score` with everything in a store, at no latency and at `DELAY_S`, taken in turns.

    Args:
        folder: holds `table` and the bundle.
        bundle: scores.
        repeats: runs of each.
        processes: that score.
    """
    rates: dict[float, list[float]] = {0.0: [], DELAY_S: []}
    for _ in range(repeats):
        for delay_s, found in rates.items():
            with running(folder, delay_s) as environment:
                os.environ.update(environment)
                where = (f"s3://b/{bundle.name}", "s3://b/table", "s3://b/out")
                run = run_mmray("score", *where, "--actors", processes, "--no-local")
            found.append(float(re.findall(r"steady ([\d,]+) rows/s", run["output"])[0].replace(",", "")))
    ratios = [slow / quick for quick, slow in zip(*rates.values(), strict=True)]
    steady = {f"{1000 * delay_s:.0f} ms": [round(rate) for rate in found] for delay_s, found in rates.items()}
    return {
        "steady_rows_per_s": steady,
        "slow_to_quick": [round(ratio, 2) for ratio in ratios],
        "median": round(statistics.median(ratios), 2),
    }


@contextmanager
def running(folder: Path, delay_s: float) -> Iterator[dict[str, str]]:
    """Runs a store with the files of a folder, in a process of its own; yields the environment that leads there."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(folder, delay_s, port), daemon=True)
    process.start()
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", **keys}
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, delay_s: float, port: int) -> None:
    files = (path for path in folder.rglob("*") if path.is_file())
    objects = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    asyncio.run(SlowStore(objects, delay_s).serve(port))
