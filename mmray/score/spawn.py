"""Starts a process of ours that reads what it is told from a socket; whoever holds the other end sees it die.

It is out of reach of a terminal's Ctrl-C: what that means, its driver says. Nor does it import what lies in the current
folder, as `python -m` would.
"""

import faulthandler
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any


def spawn(
    module: str, *, environment: Mapping[str, str] | None = None, output: Any = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Runs a module, whose first argument is the descriptor of its end; returns the process and this end.

    Args:
        module: what to run.
        environment: variables beside those of this process.
        output: file for what it prints; by default where this process prints.
    """
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            process_group=0,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path, **(environment or {})},
        )
    return process, Connection(ours.detach())


def spawned() -> Connection:
    """Returns the other end, in the process that was started; comes first there.

    What kills the process is said where it prints, and its memory, which is somebody's data, goes to no file.
    """
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return Connection(int(sys.argv[1]))
