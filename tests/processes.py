"""What tests share that start processes and wait for them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

# A process of its own starts a cluster of its own: nothing of one in this process is handed down.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
COMMAND = [sys.executable, "-m", "mmray.cli"]


def mmray(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours to its end."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ALONE)


def wait_for(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Returns when a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
