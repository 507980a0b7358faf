"""What scoring counts. Every Ray node exports it for Prometheus, as `ray_mmray_...`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram

from mmray.score.commit import Receipt
from mmray.table import Status

SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300]


class ActorMeters:
    """The counters of one scoring process."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._rows = Counter("mmray_rows", "Rows committed.", tag_keys=("status", "reason", "run"))
        self._slices = Counter("mmray_slices", "Slices committed, or found committed.", tag_keys=("state", "run"))
        self._in_flight = Gauge("mmray_slices_in_flight", "Slices that this process is at.", tag_keys=("run",))
        self._seconds = Histogram(
            "mmray_stage_seconds", "Seconds of a slice or batch in a stage.", SECONDS, tag_keys=("stage", "run")
        )
        self._restarts = Counter("mmray_actor_restarts", "Processes that were started again.", tag_keys=("run",))
        self._busy, self._lock = 0, threading.Lock()

    def stage(self, stage: str, seconds: float) -> None:
        """Counts the seconds that something took in a stage."""
        self._seconds.observe(seconds, {"stage": stage, **self._tags})

    def restarted(self) -> None:
        """Counts that this process stands in for one that died."""
        self._restarts.inc(1, self._tags)

    @contextmanager
    def slice(self) -> Iterator[None]:
        """Counts a slice as in flight for the duration of a `with` block."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        with self._lock:
            self._busy += by
            self._in_flight.set(self._busy, self._tags)

    def committed(self, receipt: Receipt) -> None:
        """Counts a slice, and its rows where it was not there already."""
        self._slices.inc(1, {"state": "committed" if receipt.created else "found", **self._tags})
        if not receipt.created:
            return
        ok = {f"{Status.OK.value}/": receipt.ledger.count(Status.OK)}
        for name, rows in {**ok, **receipt.ledger.reasons}.items():
            status, _, reason = name.partition("/")
            if rows:  # Ray refuses to count none
                self._rows.inc(rows, {"status": status, "reason": reason, **self._tags})


class RunMeters:
    """How far a run is; set by the process that started it."""

    def __init__(self, run: str, planned: int, done: int) -> None:
        self._slices = Gauge("mmray_run_slices", "Slices of the run.", tag_keys=("state", "run"))
        self._run, self._done = run, done
        self._slices.set(planned, {"state": "planned", "run": run})
        self._slices.set(done, {"state": "done", "run": run})

    def slice_done(self) -> None:
        """Counts a slice."""
        self._done += 1
        self._slices.set(self._done, {"state": "done", "run": self._run})
