"""How fast a run went: rows over time, and what its processes spent theirs on.

Reads receipts as they come -> gives figures for a terminal and for the run's report. They are of one call of a command
and no part of what is scored: where they are lost nothing else is.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

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


@dataclass(frozen=True)
class Pace:
    """What one call of a command did, in how long."""

    seconds: float
    """Of the call, start-up included."""
    steady_rows_per_s: float | None
    """Rate between the first and the last slice."""
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
        self._started, self._stages = time.perf_counter(), dict[str, float]()
        self._times, self._rows = list[float](), list[int]()

    def add(self, receipt: Receipt) -> None:
        """Counts a slice that has just been scored."""
        self._times.append(time.perf_counter() - self._started)
        self._rows.append(receipt.ledger.rows)
        add_up(self._stages, receipt.seconds)

    def read(self) -> Pace:
        """Returns the pace until now."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        rows = np.cumsum(self._rows, dtype=np.int64)
        some = np.unique(np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)) if len(rows) else rows
        return Pace(
            seconds=time.perf_counter() - self._started,
            steady_rows_per_s=sum(self._rows[1:]) / seconds if seconds > 0 else None,
            stages={stage: round(seconds, 2) for stage, seconds in self._stages.items()},
            rows_over_time=[(round(self._times[k], 2), int(rows[k])) for k in some],
        )
