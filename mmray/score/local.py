"""Scores slices by processes of this machine, without Ray: a small run is done before a cluster would have started.

Reads slices -> gives receipts as they come. A process that dies is replaced, and its slices are scored anew where a row
that kills is named, as on a cluster.
"""

import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import IO, Any

from mmray.errors import EnvironmentFaultError, MmrayError, named
from mmray.machine import KEEP_MEMORY, cluster_at_hand, local_cpus, missing_gpus
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.score.carry import Carry
from mmray.score.commit import Receipt
from mmray.score.spawn import Fork, Nursery
from mmray.slices import Slice
from mmray.stop import RESUMES

MAX_ROWS = 100_000  # minutes of work, beside which it does not matter that a cluster starts
MAX_STARTS = 3  # of processes that end before they could begin a slice
POLL_S, LOOK_S, END_S = 0.1, 1.0, 10.0
ON_CPU = {**KEEP_MEMORY, "OMP_NUM_THREADS": "1"}
MODULE = "mmray.score.local_worker"


def scores_here(slices: Sequence[Slice], options: ScoreConfig) -> bool:
    """Whether slices are scored without Ray: as asked, or else where they are few and no cluster is at hand."""
    if options.local is not None:
        return options.local
    return not (cluster_at_hand() or options.needs_cluster) and sum(piece.num_rows for piece in slices) <= MAX_ROWS


def places(options: ScoreConfig) -> list[dict[str, str]]:
    """Returns the environment of each process that there is room for: with GPUs, as many as these allow.

    Raises:
        ConfigError: this machine has not the GPUs of one.
    """
    if not options.gpus_per_actor:
        return [ON_CPU] * (options.num_actors or local_cpus())
    names = share(_gpus(), options.gpus_per_actor)
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: options.num_actors]]


def share(gpus: Sequence[str], each: float) -> list[str]:
    """Returns the GPU of each process, where each holds so many of them, or such a fraction of one.

    Raises:
        ConfigError: there are too few for one process.
    """
    apart = [gpus[int(k * each)] for k in range(int(len(gpus) / each))]
    names = apart if each >= 1 else [*gpus] * int(1 / each + 1e-9)  # in turns: few are spread, none lies across two
    if not names:
        raise missing_gpus(each, len(gpus))
    return names


def settled(options: ScoreConfig, processes: int) -> ScoreConfig:
    """Returns the options with the threads that decode beside a GPU: the CPUs, shared among the processes."""
    if not options.gpus_per_actor or options.decode_threads:
        return options
    return options.model_copy(update={"decode_threads": max(local_cpus() // processes, 1)})


def _gpus() -> list[str]:
    """Returns the name of each GPU that this process may use, as its children are told of it."""
    import torch  # seconds, for the sake of which those without GPUs do not wait

    count, told = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return told.split(",")[:count] if told else [str(k) for k in range(count)]


@dataclass
class _Process:
    """A process, where it is from, and the slices that it is at."""

    process: Fork
    connection: Connection
    place: dict[str, str]
    nursery: Nursery
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
        self,
        slices: Sequence[Slice],
        arguments: tuple[Any, ...],
        options: ScoreConfig,
        carry: Carry | None,
        max_deaths: int,
        log: Any,
    ) -> None:
        """Takes what there is to do.

        Args:
            slices: the work.
            arguments: of a scorer, before its options.
            options: how many processes, on what, and how long one may stand still; of a scorer too.
            carry: of a scorer too.
            max_deaths: of processes at slices, which rows may explain.
            log: file for what they print.
        """
        self._left, self._log = deque(slices), log
        self._stuck_after_s = options.stuck_after_s
        self._stopping, self._idle = False, threading.Event()
        self._max_deaths, self._failed_starts, self._deaths = max_deaths, 0, 0
        self.failed = False
        """Whether a process died, or raised what is not an error of ours."""
        self._processes: dict[Connection, _Process] = {}
        self._nursery: Nursery | None = None
        self._stopped: dict[Popen[bytes] | Fork, float] = {}
        self._places = places(options)[: len(slices)]
        self._arguments = (*arguments, settled(options, len(self._places))), {"carry": carry}

    def receipts(self) -> Iterator[Receipt]:
        """Yields the receipt of each slice as it is committed.

        Raises:
            MmrayError: what stopped a slice.
            EnvironmentFaultError: processes do not start, or too many die.
        """
        for place in self._places:
            self._start(place)
        for process in CALLS_PER_PROCESS * list(self._processes.values()):  # two each, if there are so many
            self._give(process)
        while any(process.slices for process in self._processes.values()):
            for connection in wait(list(self._processes), LOOK_S):
                receipt = self._hear(self._processes[connection])  # type: ignore[index]
                if receipt is not None:
                    yield receipt
            self._look()
        while self._stopping:  # until the signal comes that says what that means
            self._idle.set()
            time.sleep(POLL_S)

    def finish(self) -> None:
        """Lets no more slices begin, and returns when none is at work."""
        self._stopping = True
        self._idle.wait()

    def end(self) -> None:
        """Ends the processes."""
        begun = [each.process for each in self._processes.values() if each.process.poll() is None and each.process.pid]
        for process in begun:
            process.kill()
        for process in begun:
            with suppress(TimeoutExpired):  # the nursery stands still
                process.wait(END_S)
        if self._nursery:
            self._nursery.end()  # and with it what it has not begun
        for connection in self._processes:
            connection.close()

    def _start(self, place: dict[str, str]) -> _Process:
        if self._nursery is None:
            self._nursery = Nursery(place, self._log)  # each fork puts its own place over it
        process = _Process(*self._nursery.fork(MODULE, place), place, self._nursery)
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

    def _look(self) -> None:
        """Kills what has been stopped for so long: from outside, for what hangs within ends itself."""
        now, watched = time.monotonic(), list[Popen[bytes] | Fork]()
        watched += [each.process for each in self._processes.values()]
        if self._nursery:
            watched.append(self._nursery.process)
        self._stopped = {process: self._stopped.get(process, now) for process in watched if _is_stopped(process)}
        for process, since in self._stopped.items():
            if now - since > self._stuck_after_s:
                process.kill()

    def _replace(self, dead: _Process) -> None:
        del self._processes[dead.connection]
        dead.connection.close()
        code = self._code(dead)
        if self._stopping:
            return
        self._left.extend(dead.slices.values())  # last, in case it was one of them
        self.failed = True
        if dead.nursery is self._nursery:  # those that die with one count as one
            self._failed_starts += not dead.is_ready
            self._deaths += 1
            if dead.nursery.process.poll() is not None:
                dead.nursery.end()
                self._nursery = None
        if self._failed_starts >= MAX_STARTS or self._deaths > self._max_deaths:
            when = "at a slice" if dead.is_ready else "before its first slice"
            raise EnvironmentFaultError(
                f"{self._deaths} processes ended, the last {when} with exit code {code}; {RESUMES}"
            )
        if self._left:
            process = self._start(dead.place)
            for _ in range(CALLS_PER_PROCESS):
                self._give(process)

    def _code(self, dead: _Process) -> int:
        """Returns the exit code of a process that has ended, of which its nursery tells unless that stands still."""
        try:
            return dead.process.wait(self._stuck_after_s)
        except TimeoutExpired:
            dead.nursery.process.kill()
            return dead.process.wait()


def _is_stopped(process: Popen[bytes] | Fork) -> bool:
    """Whether a process stands still as after SIGSTOP; see proc_pid_stat(5)."""
    if process.poll() is not None or process.pid is None:
        return False
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has just ended
        return False


def _raised(name: str, text: str) -> MmrayError:
    """Returns the error that a process told of."""
    return named(name, text) or EnvironmentFaultError(f"scoring stopped: {name}: {text}; {RESUMES}")


@contextmanager
def local_pool(
    slices: Sequence[Slice], arguments: tuple[Any, ...], options: ScoreConfig, carry: Carry | None, max_deaths: int
) -> Iterator[LocalPool]:
    """Yields a pool at work, as `LocalPool` is made, for the duration of a `with` block.

    Raises:
        EnvironmentFaultError: of the block; names the file with what the processes printed, where one of them failed.
    """
    with tempfile.TemporaryFile() as log:
        pool = LocalPool(slices, arguments, options, carry, max_deaths, log)
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
