"""Starts a process of ours that reads what it is told from a socket; whoever holds the other end sees it die."""

import os
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
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
        )
    return process, Connection(ours.detach())
