"""What tests share that start processes and wait for them."""

import os
import time
from collections.abc import Callable

# A process of its own starts a cluster of its own: nothing of one in this process is handed down.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def wait_for(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Returns when a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
