"""The process that scores rows which may have killed another: told which ones by `isolate.py`, and expendable.

    python -m mmray.score.child DESCRIPTOR

Reads rows from a socket -> gives the columns that scoring appends. Before each step it says which, so that whoever is
at the other end knows where it died; it ends by itself where a step does not. Where no GPU is at work, each set of rows
is scored in a fork of this process: what is loaded once can die often.
"""

import faulthandler
import json
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pandas  # noqa: F401  pyarrow imports it at the first array of a process, which would be in each fork
import pyarrow as pa

from mmray.bundle import load_bundle
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.score.spawn import spawned
from mmray.source import ImageSource
from mmray.table import Fault, Reason, cells

READ, PREPARE, FORWARD = "read", "prepare", "forward"
MEMORY_PER_PIXEL = 64  # bytes; a decoded image of 16 bits and four channels takes 28 on its way to 8 and three
MEMORY = 2**29  # bytes to prepare rows beside their pixels
LIMIT_S = 60.0  # to prepare rows, or to run the model on them; reading waits for stores and gets what a batch gets


class Child:
    """Scores rows, and says at what it is."""

    def __init__(self, connection: Connection, settings: dict[str, Any]) -> None:
        options = ScoreConfig.model_validate(settings["options"])
        bundle = load_bundle(settings["bundle"])
        self._source = ImageSource(settings["image_roots"], bundle.config.image.max_bytes, options.on_unavailable)
        # No threads of its own, which no fork would have: images are read before.
        alone = options.model_copy(update={"decode_threads": 1})
        self._predictor = Predictor.on_this_worker(bundle, ImageSource([], bundle.config.image.max_bytes), alone)
        self._memory = MEMORY + MEMORY_PER_PIXEL * bundle.config.image.max_pixels
        self._connection, self._options = connection, options

    def serve(self) -> None:
        """Scores what it is sent, until the connection closes."""
        say(self._connection, ready=True)
        while True:
            try:
                faults, rows = json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()
            except EOFError:
                return
            with telling(self._connection):
                columns = self._read(pa.ipc.open_stream(rows).read_all(), faults)
                if self._options.gpus_per_actor:  # a GPU does not survive a fork
                    self._score(columns)
                else:
                    self._score_in_fork(columns)

    def _score_in_fork(self, columns: dict[str, list[Any]]) -> None:
        fork = os.fork()
        if not fork:
            with telling(self._connection):
                self._score(columns)
            os._exit(0)
        _, status = os.waitpid(fork, 0)
        if status:
            say(self._connection, code=os.waitstatus_to_exitcode(status))

    def _read(self, rows: pa.Table, faults: Sequence[dict[str, tuple[str, str]]]) -> dict[str, list[Any]]:
        """Returns the cells of each modality: of images what was read, of what cannot be used why not."""
        self._step(READ, self._options.stuck_after_s)
        columns = {name: cells(rows[name]) for name in self._predictor.modalities}
        if "image" in columns:
            with ThreadPoolExecutor(self._options.reads) as pool:
                columns["image"] = list(pool.map(self._source.read, columns["image"]))
        for k, found in enumerate(faults):
            for name, (reason, detail) in found.items():
                columns[name][k] = Fault(Reason[reason], detail)
        faulthandler.cancel_dump_traceback_later()
        return columns

    def _score(self, columns: dict[str, list[Any]]) -> None:
        limit_s = min(LIMIT_S, self._options.stuck_after_s)
        with _memory_limit(self._memory):
            if len(next(iter(columns.values()))) == 1:  # of a single row it matters which modality it is
                for name in columns:
                    self._step(f"{PREPARE} {name}", limit_s)
                    self._predictor.prepare({other: columns[other] if other == name else [None] for other in columns})
            self._step(PREPARE, limit_s)
            features = self._predictor.prepare(columns)
        self._step(FORWARD, limit_s)
        scored = self._predictor.scores(self._predictor.predict_features(features))
        faulthandler.cancel_dump_traceback_later()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, scored.schema) as stream:
            stream.write_table(scored)
        say(self._connection, scored=True)
        self._connection.send_bytes(sink.getvalue())

    def _step(self, step: str, limit_s: float) -> None:
        say(self._connection, step=step, limit_s=limit_s)
        faulthandler.dump_traceback_later(limit_s, exit=True)


def say(connection: Connection, **message: Any) -> None:
    """Sends a message."""
    connection.send_bytes(json.dumps(message).encode())


@contextmanager
def telling(connection: Connection) -> Iterator[None]:
    """Sends what is raised in a `with` block, and lets it be."""
    try:
        yield
    except Exception as error:
        faulthandler.cancel_dump_traceback_later()
        say(connection, error=type(error).__name__, text=str(error))


@contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """Allows this process some more bytes of addresses than it has, for the duration of a `with` block."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(connection: Connection) -> None:
    """Serves a connection; the command line gives the descriptor of one."""
    with telling(connection):
        Child(connection, json.loads(connection.recv_bytes())).serve()


if __name__ == "__main__":
    main(spawned())
