"""The process that those which score on this machine without Ray are forked from; asked for them by `spawn.py`.

    python -m mmray.score.nursery DESCRIPTOR REQUESTS ASKING

It imports what they need, which takes seconds of a CPU, once for all of them and for those that replace them. It does
no more: a thread, a model or a GPU in use would not survive a fork. A fork is what a program would be, in a process
group of its own and without the descriptors of others, whose ends would not be heard otherwise; it ends where the
nursery does, which alone can say how it ended. When the driver is gone, so is the nursery, after the last of its forks.

Multiprocessing has a fork server too, which imports the script of the caller anew in each fork, is one for all that the
caller does, and stays in the environment of its first use.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from mmray.score import child, local_worker
from mmray.score.spawn import forked, spawned

REQUEST = 2**16  # bytes, at most
RUNS = {module.__name__: module.main for module in (child, local_worker)}
PR_SET_PDEATHSIG = 1  # see prctl(2)


class Birth(NamedTuple):
    """What a fork is to run."""

    connection: Connection
    module: str
    environment: dict[str, str]


class Nursery:
    """Forks processes, and tells of them."""

    def __init__(self, driver: Connection, requests: socket.socket) -> None:
        self._driver, self._requests = driver, requests
        self._tells: dict[int, Connection] = {}
        self._ended, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # nothing wakes without a handler
        signal.set_wakeup_fd(self._bell.fileno())

    def serve(self) -> Birth | None:
        """Returns what to run, in each fork; None in the nursery itself, when nobody needs it any more."""
        sources: list[Any] = [self._driver, self._requests, self._ended]
        while self._driver in sources or self._tells:
            for source in wait(sources):
                if source is self._driver:  # it says nothing, so that was its end
                    sources.remove(source)
                elif source is self._ended:
                    self._bury()
                elif birth := self._fork():
                    return birth
        return None

    def _fork(self) -> Birth | None:
        request, descriptors, *_ = socket.recv_fds(self._requests, REQUEST, 2)
        connection, tells = (Connection(descriptor) for descriptor in descriptors)
        nursery = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # no room for another
            traceback.print_exc()
            _tell(tells, "returncode", 1)
            return None
        if not pid:
            tells.close()
            self._leave(nursery)
            return Birth(connection, *json.loads(request))
        self._tells[pid] = tells
        _tell(tells, "pid", pid)
        return None

    def _bury(self) -> None:
        self._ended.recv(REQUEST)
        while self._tells:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self._tells.pop(pid) as tells:
                _tell(tells, "returncode", os.waitstatus_to_exitcode(status))

    def _leave(self, nursery: int) -> None:
        """Makes a fork a process of its own."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != nursery:  # it ended before that
            os.kill(os.getpid(), signal.SIGKILL)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for mine in (self._requests, self._ended, self._bell):
            mine.close()
        for connection in (self._driver, *self._tells.values()):
            connection.close()


def _tell(tells: Connection, *what: object) -> None:
    with suppress(BrokenPipeError):  # who asked is no more
        tells.send(what)


def main() -> None:
    """Serves the connection and the sockets whose descriptors the command line gives, and runs what it forks."""
    driver = spawned()
    requests, asking = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[2:])
    gc.freeze()  # a collector that looks at what was imported would have it copied into each fork
    birth = Nursery(driver, requests).serve()
    if birth is not None:
        os.environ.update(birth.environment)
        with suppress(OSError):  # it is for `top` alone
            Path("/proc/self/comm").write_text(birth.module.rpartition(".")[2])
        forked(asking, birth.environment)
        RUNS[birth.module](birth.connection)


if __name__ == "__main__":
    main()
