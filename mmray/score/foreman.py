"""Knows who is at which slice: begins no more of them when the run should stop, and has those redone that never end.

An actor of the run without work of its own. A process that is stopped as a whole, or whose machine hangs, cannot end
itself as one does that hangs at a row (`watchdog.py`). It is killed from here, and Ray starts another, where there is
room: that one does its slices, and whatever the first had left to say finds them committed.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from mmray.options import ScoreConfig

PACE = 10  # times as long as the slowest slice took for as many rows
SLOWEST_S = 1.0  # for a row, as long as no slice has come back
POLL_S, THREADS = 0.1, 8
LOOKS = 4  # in the time that any slice is given


@dataclass
class Attempt:
    """A process at a slice."""

    actor: Any
    rows: int
    since: float


class Foreman:
    """Hands out slices, and looks after them."""

    def __init__(self, floor_s: float) -> None:
        """Takes the seconds that any slice is given."""
        self._floor_s, self._pace_s = floor_s, 0.0
        self._out: dict[str, Attempt] = {}
        self._stopping = False
        self._lock = threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self, attempt: str, rows: int, actor: Any) -> bool:
        """Notes that an actor begins a slice of so many rows; False where it should not."""
        with self._lock:
            if not self._stopping:
                self._out[attempt] = Attempt(actor, rows, time.monotonic())
            return not self._stopping

    def spare(self, attempt: str) -> None:
        """Gives it all the time it takes."""
        with self._lock:
            if attempt in self._out:
                self._out[attempt].since = math.inf

    def end(self, attempt: str, committed: bool) -> None:
        """Notes that it is at an end."""
        with self._lock:
            out = self._out.pop(attempt, None)  # none, where it was taken for dead
            if out is not None and committed:
                self._pace_s = max(self._pace_s, (time.monotonic() - out.since) / out.rows)

    def finish(self) -> None:
        """Lets no more slices begin, and returns when none is at work."""
        self._stopping = True
        while self._out:
            time.sleep(POLL_S)

    def _look(self) -> None:
        while True:
            time.sleep(self._floor_s / LOOKS)
            with self._lock:
                pace_s, now = PACE * self._pace_s or SLOWEST_S, time.monotonic()
                late = {a: o for a, o in self._out.items() if now - o.since > max(self._floor_s, pace_s * o.rows)}
                self._out = {a: o for a, o in self._out.items() if a not in late}
            for actor in {out.actor._actor_id: out.actor for out in late.values()}.values():
                ray.kill(actor, no_restart=False)


class Hired:
    """A foreman at work."""

    def __init__(self, options: ScoreConfig) -> None:
        # Where its node is lost it begins anew, and knows of what begins from then on.
        more = {"num_cpus": 0, "max_concurrency": THREADS, "max_restarts": -1, "max_task_retries": -1}
        self.actor: Any = ray.remote(Foreman).options(**more).remote(options.stuck_after_s)

    def finish(self) -> None:
        """See `Foreman.finish`."""
        ray.get(self.actor.finish.remote())


@contextmanager
def foreman_of(options: ScoreConfig) -> Iterator[Hired]:
    """Yields a foreman, for the duration of a `with` block."""
    hired = Hired(options)
    try:
        yield hired
    finally:
        ray.kill(hired.actor)
