"""Scores slices by processes of this machine, without Ray: a small run is done before a cluster would have started.

Reads slices -> gives receipts as they come. A process that dies is replaced, and its slices are scored anew where a row
that kills is named, as on a cluster.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from mmray.errors import EnvironmentFaultError, MmrayError, named
from mmray.machine import KEEP_MEMORY, given_address, local_cpus
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.score.commit import Receipt
from mmray.score.spawn import spawn
from mmray.slices import Slice
from mmray.stop import RESUMES

MAX_ROWS = 100_000  # minutes of work, beside which it does not matter that a cluster starts
MAX_STARTS = 3  # of processes that end before they could begin a slice
POLL_S = 0.1
ENVIRONMENT = {**KEEP_MEMORY, "OMP_NUM_THREADS": "1"}
MODULE = "mmray.score.local_worker"


def scores_here(slices: Sequence[Slice], options: ScoreConfig) -> bool:
    """Whether slices are scored without Ray: as asked, or else where they are few and no cluster is at hand."""
    if options.local is not None:
        return options.local
    at_hand = given_address() is not None or ("ray" in sys.modules and sys.modules["ray"].is_initialized())
    return not (at_hand or options.needs_cluster) and sum(piece.num_rows for piece in slices) <= MAX_ROWS


@dataclass
class _Process:
    """A process, and the slices that it is at."""

    process: subprocess.Popen[bytes]
    connection: Connection
    slices: dict[int, Slice] = field(default_factory=dict)
    is_ready: bool = False

    def give(self, piece: Slice) -> None:
        self.slices[piece.index] = piece
        self.send(piece)

    def send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # it is dead, which is heard as the connection's end
            self.connection.send(message)


class LocalPool:
    """Processes of this machine at some slices."""

    def __init__(
        self, slices: Sequence[Slice], arguments: tuple[Any, ...], options: ScoreConfig, max_deaths: int, log: Any
    ) -> None:
        """Takes what there is to do.

        Args:
            slices: the work.
            arguments: of a scorer, positional ones and others.
            options: how many processes.
            max_deaths: of processes at slices, which rows may explain.
            log: file for what they print.
        """
        self._left, self._arguments, self._log = deque(slices), arguments, log
        self._stopping, self._idle = False, threading.Event()
        self._max_deaths, self._failed_starts, self._deaths = max_deaths, 0, 0
        self.failed = False
        """Whether a process died, or raised what is not an error of ours."""
        self._processes: dict[Connection, _Process] = {}
        self._size = min(options.num_actors or local_cpus(), len(slices))

    def receipts(self) -> Iterator[Receipt]:
        """Yields the receipt of each slice as it is committed.

        Raises:
            MmrayError: what stopped a slice.
            EnvironmentFaultError: processes do not start, or too many die.
        """
        for _ in range(self._size):
            self._start()
        for process in CALLS_PER_PROCESS * list(self._processes.values()):  # two each, if there are so many
            self._give(process)
        while any(process.slices for process in self._processes.values()):
            for connection in wait(list(self._processes)):
                receipt = self._hear(self._processes[connection])  # type: ignore[index]
                if receipt is not None:
                    yield receipt
        while self._stopping:  # until the signal comes that says what that means
            self._idle.set()
            time.sleep(POLL_S)

    def finish(self) -> None:
        """Lets no more slices begin, and returns when none is at work."""
        self._stopping = True
        self._idle.wait()

    def end(self) -> None:
        """Ends the processes."""
        for process in self._processes.values():
            process.process.kill()
        for process in self._processes.values():
            process.process.wait()
            process.connection.close()

    def _start(self) -> _Process:
        process = _Process(*spawn(MODULE, environment=ENVIRONMENT, output=self._log))
        self._processes[process.connection] = process
        process.send(self._arguments)
        return process

    def _give(self, process: _Process) -> None:
        if self._left and not self._stopping:
            process.give(self._left.popleft())

    def _hear(self, process: _Process) -> Receipt | None:
        try:
            message = process.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(process)
            return None
        if message is None:
            process.is_ready, self._failed_starts = True, 0
            return None
        if not isinstance(message, Receipt):
            self.failed |= named(*message) is None
            raise _raised(*message)
        del process.slices[message.slice]
        self._give(process)
        return message

    def _replace(self, dead: _Process) -> None:
        del self._processes[dead.connection]
        dead.connection.close()
        code = dead.process.wait()
        if self._stopping:
            return
        self._left.extend(dead.slices.values())  # last, in case it was one of them
        self._failed_starts += not dead.is_ready
        self._deaths, self.failed = self._deaths + 1, True
        if self._failed_starts >= MAX_STARTS or self._deaths > self._max_deaths:
            when = "at a slice" if dead.is_ready else "before its first slice"
            raise EnvironmentFaultError(
                f"{self._deaths} processes ended, the last {when} with exit code {code}; {RESUMES}"
            )
        if self._left:
            process = self._start()
            for _ in range(CALLS_PER_PROCESS):
                self._give(process)


def _raised(name: str, text: str) -> MmrayError:
    """Returns the error that a process told of."""
    return named(name, text) or EnvironmentFaultError(f"scoring stopped: {name}: {text}; {RESUMES}")


@contextmanager
def local_pool(
    slices: Sequence[Slice], arguments: tuple[Any, ...], options: ScoreConfig, max_deaths: int
) -> Iterator[LocalPool]:
    """Yields a pool at work, as `LocalPool` is made, for the duration of a `with` block.

    Raises:
        EnvironmentFaultError: of the block; names the file with what the processes printed, where one of them failed.
    """
    with tempfile.TemporaryFile() as log:
        pool = LocalPool(slices, arguments, options, max_deaths, log)
        try:
            try:
                yield pool
            finally:
                pool.end()
        except EnvironmentFaultError as error:
            if pool.failed:
                raise EnvironmentFaultError(f"{error}; {_kept(log)} has what the processes said") from error
            raise


def _kept(log: IO[bytes]) -> str:
    """Copies what has no name to a file that has one."""
    with tempfile.NamedTemporaryFile(prefix="mmray-", suffix=".log", delete=False) as kept:
        log.seek(0)
        shutil.copyfileobj(log, kept)
    return kept.name
