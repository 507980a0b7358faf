"""How fast a run went: rows over time, and what its processes spent theirs on.

Reads receipts as they come -> gives figures for a terminal and for the run's report. They are of one call of a command
and no part of what is scored: where they are lost nothing else is.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from mmray.options import CALLS_PER_PROCESS
from mmray.score.commit import Receipt

N = TypeVar("N", int, float)
MAX_POINTS = 200  # of a run, however many slices it has
LEAST_SHARE = 0.005  # that is worth a word
STAGES = {"read": "reading", "prepare": "preparing", "forward": "model", "commit": "writing", "isolated": "apart"}
"""Stage of a slice -> its name for people."""


def add_up(total: dict[str, N], more: Mapping[str, N]) -> None:
    """Adds values to those of the same name."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def shares(stages: Mapping[str, float]) -> str:
    """Returns the share of each stage in the seconds of all, for people."""
    total = sum(stages.values()) or 1.0
    found = {name: stages[key] / total for key, name in STAGES.items() if key in stages}
    return ", ".join(f"{name} {share:.0%}" for name, share in found.items() if share >= LEAST_SHARE)


class Rate:
    """Rows per second, start-up aside.

    Processes begin at about the same time, and so what they begin with comes at about the same time too: all of that is
    their start, and the rate is that of what comes after. From the first slice on, it would be too high.
    """

    def __init__(self) -> None:
        self.times = list[float]()
        """When each slice came, in seconds."""
        self.rows = list[int]()
        """How many rows there were by then."""
        self.processes = set[str]()
        """Of whom slices came."""

    def add(self, rows: int, at_s: float, process: str | None) -> None:
        """Counts the rows of a slice."""
        self.times.append(at_s)
        self.rows.append(rows + (self.rows[-1] if self.rows else 0))
        if process is not None:
            self.processes.add(process)

    def per_s(self) -> float | None:
        """Returns it; None until more has come than the processes began with."""
        first = max(CALLS_PER_PROCESS * len(self.processes), 1)
        if len(self.rows) <= first:
            return None
        seconds = self.times[-1] - self.times[first - 1]
        return (self.rows[-1] - self.rows[first - 1]) / seconds if seconds > 0 else None


@dataclass(frozen=True)
class Pace:
    """What one call of a command did, in how long."""

    seconds: float
    """Of the call, start-up included."""
    steady_rows_per_s: float | None
    """See `Rate`."""
    stages: Mapping[str, float]
    """Stage -> seconds, over all processes."""
    rows_over_time: list[tuple[float, int]]
    """(seconds since the start, rows scored by then), of some of the slices."""

    def to_dict(self) -> dict[str, object]:
        """Returns it in JSON's own types."""
        return asdict(self)


class Clock:
    """Measures a `Pace`."""

    def __init__(self) -> None:
        self._started, self._stages, self._rate = time.perf_counter(), dict[str, float](), Rate()

    def add(self, receipt: Receipt) -> None:
        """Counts a slice that has just been scored."""
        self._rate.add(receipt.ledger.rows, time.perf_counter() - self._started, receipt.process)
        add_up(self._stages, receipt.seconds)

    def read(self) -> Pace:
        """Returns the pace until now."""
        times, rows = self._rate.times, self._rate.rows
        some = np.unique(np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)) if rows else ()
        return Pace(
            seconds=time.perf_counter() - self._started,
            steady_rows_per_s=self._rate.per_s(),
            stages={stage: round(seconds, 2) for stage, seconds in self._stages.items()},
            rows_over_time=[(round(times[k], 2), rows[k]) for k in some],
        )
