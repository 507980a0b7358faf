"""How fast a run went: rows over time, and what its processes spent theirs on.

Reads receipts as they come -> gives figures for a terminal and for the run's report. They are of one call of a command
and no part of what is scored: where they are lost nothing else is.
"""

import math
import time
from collections import Counter
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
    """Rows per second since the first slice was begun: processes start before that, which says nothing of the rest."""

    def __init__(self) -> None:
        self.times = list[float]()
        """When each slice came, in seconds."""
        self.rows = list[int]()
        """How many rows there were by then."""
        self._begun, self._before = math.inf, 0
        self._sent = Counter[str | None]()

    def add(self, rows: int, at_s: float, took_s: float | None = None, process: str | None = None) -> None:
        """Counts the rows of a slice, how long it took, and who did it; one that was not timed may be the start."""
        self.times.append(at_s)
        self.rows.append(rows + (self.rows[-1] if self.rows else 0))
        self._sent[process] += 1
        if took_s is not None:  # a slower process may have begun before that of which the first came
            self._begun = min(self._begun, at_s - took_s)
        elif self._begun == math.inf:
            self._begun, self._before = at_s, rows

    def per_s(self) -> float | None:
        """Returns it; None where nothing has been timed."""
        if not self.times or self.times[-1] <= self._begun:
            return None
        return (self.rows[-1] - self._before) / (self.times[-1] - self._begun)

    def is_settled(self) -> bool:
        """Whether somebody has sent more than processes begin with: that comes at about the same time, late."""
        return max(self._sent.values(), default=0) > CALLS_PER_PROCESS


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
        at_s = time.perf_counter() - self._started
        self._rate.add(receipt.ledger.rows, at_s, receipt.took_s, receipt.process)
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
