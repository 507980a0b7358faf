"""Starts a process of ours that reads what it is told from a socket; whoever holds the other end sees it die.

It is out of reach of a terminal's Ctrl-C: what that means, its driver says. Nor does it import what lies in the current
folder, as `python -m` would. A driver without Ray has a nursery, which has imported once what all need and forks them
(`nursery.py`); elsewhere each is a program of its own.
"""

import faulthandler
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

_ask: "Callable[[str], tuple[Fork, Connection]] | None" = None


def spawn(module: str) -> "tuple[subprocess.Popen[bytes] | Fork, Connection]":
    """Runs a module, forked where this process was; returns the process and this end."""
    return _ask(module) if _ask else execute(module)


def execute(
    module: str, *inherited: int, environment: Mapping[str, str] | None = None, output: Any = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Runs a module as a program, whose first argument is the descriptor of its end; returns the process and this end.

    Args:
        module: what to run.
        inherited: descriptors that it has too, its other arguments.
        environment: variables beside those of this process.
        output: file for what it prints; by default where this process prints.
    """
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno(), *inherited],
            process_group=0,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path, **(environment or {})},
        )
    return process, Connection(ours.detach())


def spawned() -> Connection:
    """Returns the other end, in the program that was started; comes first there.

    What kills the process is said where it prints, and its memory, which is somebody's data, goes to no file.
    """
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return Connection(int(sys.argv[1]))


class Nursery:
    """A process that forks others, all of which end where it does."""

    def __init__(self, environment: Mapping[str, str], output: Any) -> None:
        """Starts it.

        Args:
            environment: variables beside those of this process, for it and its forks.
            output: file for what they print.
        """
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends = theirs.fileno(), self._requests.fileno()
        with theirs:
            self.process, self._driver = execute("mmray.score.nursery", *ends, environment=environment, output=output)

    def fork(self, module: str, environment: Mapping[str, str]) -> "tuple[Fork, Connection]":
        """Has a module run, with variables beside those of the nursery; returns the process and this end."""
        return _fork(self._requests, environment, self.process.wait, module)

    def end(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self._requests.close()
        self._driver.close()


class Fork:
    """A process of a nursery, for whoever asked for it: much as `Popen` is."""

    def __init__(self, told: Connection, died: Callable[[], int]) -> None:
        """Takes the connection by which the nursery tells of it.

        Args:
            told: gives its `pid` once there is one, and its `returncode` as it ends.
            died: gives the exit code where the nursery is no more, and so neither is the fork.
        """
        self._told, self._died = told, died
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, None of one that has not ended."""
        while self._hear(0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, as there is one.

        Raises:
            subprocess.TimeoutExpired: there is none in time.
        """
        while self._hear(timeout):
            pass
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self.returncode

    def kill(self) -> None:
        """Kills it, as soon as it is there."""
        while self.pid is None and self._hear(None):
            pass
        if self.poll() is None and self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _hear(self, timeout: float | None) -> bool:
        """Notes what there is to hear next; False where that is nothing, so far or ever."""
        if self.returncode is not None or not self._told.poll(timeout):
            return False
        try:
            setattr(self, *self._told.recv())
        except (EOFError, ConnectionResetError):
            self.returncode = self._died()
        return True


def forked(requests: socket.socket, environment: Mapping[str, str]) -> None:
    """Has `spawn` ask the nursery that this process is from, for forks with the variables that this one has."""
    global _ask
    _ask = partial(_fork, requests, environment, lambda: -signal.SIGKILL)


def _fork(
    requests: socket.socket, environment: Mapping[str, str], died: Callable[[], int], module: str
) -> tuple[Fork, Connection]:
    ours, theirs = socket.socketpair()
    told, tells = socket.socketpair()
    with theirs, tells, suppress(ConnectionError):  # the nursery is dead, which is heard as the connections' end
        request = json.dumps([module, dict(environment)]).encode()
        socket.send_fds(requests, [request], [theirs.fileno(), tells.fileno()])
    return Fork(Connection(told.detach()), died), Connection(ours.detach())
