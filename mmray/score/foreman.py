"""Knows who is at which slice: lets none begin when the run should stop, and has those redone that take too long.

An actor of the run without work of its own. Where others have nothing left to do, a slice that takes much longer than
the others did is begun again beside the first (Dean and Ghemawat 2004, backup tasks); whoever commits it first has done
it. A process that is stopped as a whole, or whose machine hangs, cannot end itself as one does that hangs at a row
(`watchdog.py`). It is killed from here, and Ray starts another, where there is room: that one does its slices, and
finds those committed whose receipts the first had yet to send.
"""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from mmray.options import ScoreConfig
from mmray.slices import Slice, slices_from_arrow, slices_to_arrow

PACE = 10  # times as long as the slowest slice took for as many rows
LATE, LATE_S = 2, 1.0  # times as long as slices took in the mean, and seconds at least
APART_S = 30.0  # more where rows are scored apart: a child has to start, and some may kill it
SLOWEST_S = 1.0  # for a row, as long as no slice has come back
POLL_S, THREADS = 0.1, 8
LOOKS = 4  # in the time that any slice is given


@dataclass
class Attempt:
    """A process at a slice."""

    actor: Any
    piece: Slice
    since: float
    is_apart: bool = False


class Foreman:
    """Hands out slices, and looks after them."""

    def __init__(self, slices: pa.Table, floor_s: float) -> None:
        """Takes the slices of the run that are left, and the seconds that any slice is given."""
        self._left = {piece.index: piece for piece in slices_from_arrow(slices)}
        self._doubled = set[int]()
        self._floor_s, self._pace_s = floor_s, 0.0
        self._rows, self._seconds = 0, 0.0
        self._out: dict[str, Attempt] = {}
        self._sent: dict[int, Attempt] = {}
        self._begun = time.monotonic()
        self._stopping = False
        self._lock = threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self, attempt: str, piece: Slice, actor: Any) -> bool:
        """Notes that an actor begins a slice; False where it should not."""
        with self._lock:
            if not self._stopping:
                self._begun = time.monotonic()
                self._out[attempt] = Attempt(actor, piece, self._begun)
            return not self._stopping

    def late(self, actor: Any) -> tuple[Slice, int] | bool:
        """Returns a slice for an actor to begin, each only once, and how many are at it; else whether to ask again.

        Asked where all slices are handed out: one that nobody is at is with a process that does not get to it, or whose
        receipt does not come.
        """
        with self._lock:
            if self._stopping or not self._left:
                return False
            beside = self._late_of_others(actor)
            found = beside or self._with_nobody()
            if found is None:
                return True
            self._doubled.add(found.index)
            return found, int(beside is not None)

    def _late_of_others(self, actor: Any) -> Slice | None:
        now, mean_s = time.monotonic(), self._seconds / max(self._rows, 1) or SLOWEST_S
        for out in self._out.values():
            limit_s = max(LATE_S, LATE * mean_s * out.piece.num_rows) + APART_S * out.is_apart
            is_other = out.actor._actor_id != actor._actor_id
            if is_other and now - out.since > limit_s and out.piece.index not in self._doubled:
                return out.piece
        return None

    def _with_nobody(self) -> Slice | None:
        if time.monotonic() - self._begun < LATE_S:
            return None
        at_work = {out.piece.index for out in self._out.values()} | self._doubled
        return next((piece for piece in self._left.values() if piece.index not in at_work), None)

    def forget(self, actor: Any) -> None:
        """Notes that what an actor has begun will not come to an end."""
        with self._lock:
            for attempt, out in list(self._out.items()):
                if out.actor._actor_id == actor._actor_id:
                    del self._out[attempt]
                    self._doubled.discard(out.piece.index)

    def apart(self, attempt: str) -> None:
        """Notes that its rows are scored apart, and gives it all the time it takes."""
        with self._lock:
            if attempt in self._out:
                self._out[attempt].is_apart = True

    def end(self, attempt: str, committed: bool) -> None:
        """Notes that it is at an end."""
        with self._lock:
            out = self._out.pop(attempt, None)  # none, where it was taken for dead
            if out is not None and committed and out.piece.index in self._left:
                self._sent.setdefault(out.piece.index, Attempt(out.actor, out.piece, time.monotonic()))
            if out is not None and committed and not out.is_apart:
                seconds, rows = time.monotonic() - out.since, out.piece.num_rows
                self._pace_s = max(self._pace_s, seconds / rows)
                self._seconds, self._rows = self._seconds + seconds, self._rows + rows

    def received(self, index: int) -> None:
        """Notes that the driver has a slice's receipt; that of one that is committed may be with a stopped process."""
        with self._lock:
            self._left.pop(index, None)
            self._sent.pop(index, None)

    def finish(self) -> None:
        """Lets no more slices begin, and returns when none is at work that is not done yet."""
        with self._lock:
            self._stopping = True
        while any(out.piece.index in self._left for out in list(self._out.values())):
            time.sleep(POLL_S)

    def _look(self) -> None:
        while True:
            time.sleep(self._floor_s / LOOKS)
            with self._lock:
                stuck = {out.actor._actor_id: out.actor for out in self._stuck()}
            for actor in stuck.values():
                self.forget(actor)
                ray.kill(actor, no_restart=False)

    def _stuck(self) -> Iterator[Attempt]:
        yield from (out for out in self._out.values() if self._is_stuck(out))
        late = [sent for sent in self._sent.values() if time.monotonic() - sent.since > self._floor_s]
        killed = {sent.actor._actor_id for sent in late}
        for sent in self._sent.values():
            if sent.actor._actor_id in killed:
                sent.since = math.inf  # once for all that it sent: it may be the driver that stands still
        yield from late

    def _is_stuck(self, out: Attempt) -> bool:
        limit_s = max(self._floor_s, (PACE * self._pace_s or SLOWEST_S) * out.piece.num_rows)
        return not out.is_apart and time.monotonic() - out.since > limit_s


class Hired:
    """A foreman at work."""

    def __init__(self, slices: Sequence[Slice], options: ScoreConfig) -> None:
        # Where its node is lost it begins anew, and knows of what begins from then on.
        more = {"num_cpus": 0, "max_concurrency": THREADS, "max_restarts": -1, "max_task_retries": -1}
        self.actor: Any = ray.remote(Foreman).options(**more).remote(slices_to_arrow(slices), options.stuck_after_s)
        self._finishing = False

    def finish(self) -> None:
        """See `Foreman.finish`."""
        self._finishing = True
        ray.get(self.actor.finish.remote())

    def received(self, index: int) -> None:
        """See `Foreman.received`; does not wait."""
        self.actor.received.remote(index)

    def wait_if_finishing(self) -> None:
        """Where slices were left undone on request, waits for the signal that says what that means."""
        while self._finishing:
            time.sleep(POLL_S)


@contextmanager
def foreman_of(slices: Sequence[Slice], options: ScoreConfig) -> Iterator[Hired]:
    """Yields a foreman for some slices, for the duration of a `with` block."""
    hired = Hired(slices, options)
    try:
        yield hired
    finally:
        ray.kill(hired.actor)
