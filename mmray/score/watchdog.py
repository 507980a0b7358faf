"""Ends a process that hangs: whoever waits for it sees it die, and takes up its work elsewhere.

A thread that is at a slice says so as it gets on. Where one has not for much longer than it ever took, the stacks of
all threads go to the process's log and the process exits; also where a decoder hangs that lets no other thread run.
"""

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PACE = 20  # times the longest step so far
SOONEST_S = 0.001


class Watchdog:
    """Watches the threads of this process; only one can."""

    def __init__(self, floor_s: float) -> None:
        """Takes the seconds that any step is given."""
        self._floor_s, self._longest_s = floor_s, 0.0
        self._since: dict[int, float] = {}
        self._until = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the thread that calls it for the duration of a `with` block."""
        with self._lock:
            self._since[threading.get_ident()] = time.monotonic()
            self._arm()
        try:
            yield
        finally:
            with self._lock:
                del self._since[threading.get_ident()]
                self._arm()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the thread alone for the duration of a `with` block."""
        with self._lock:
            del self._since[threading.get_ident()]
            self._arm()
        try:
            yield
        finally:
            with self._lock:
                self._since[threading.get_ident()] = time.monotonic()
                self._arm()

    def progress(self) -> None:
        """Notes that the thread that calls it gets on; a thread that is not watched may call it too."""
        now, me = time.monotonic(), threading.get_ident()
        with self._lock:
            if me in self._since:
                self._longest_s = max(self._longest_s, now - self._since[me])
                self._since[me] = now
                self._arm()

    def _arm(self) -> None:
        """Sets the timer; not at every step, for that takes a thread: it goes off up to a third later than due."""
        if not self._since:
            self._until = 0.0
            faulthandler.cancel_dump_traceback_later()
            return
        limit_s = max(self._floor_s, PACE * self._longest_s)
        due = min(self._since.values()) + limit_s
        if due > self._until:
            self._until = due + limit_s / 3
            faulthandler.dump_traceback_later(max(self._until - time.monotonic(), SOONEST_S), exit=True)
