"""Scales of charts. Positions are per cent of the plot's side, so that a chart stretches with the page while its text
keeps its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Axis:
    """A linear scale from [low, high] to [0, 100], with a mark at each multiple of `step`."""

    low: float
    high: float
    step: float

    def place(self, value: float) -> float:
        """Returns where a value lies, in per cent from the low end."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns the place and the text of each mark."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        values = [index * self.step for index in range(first, last + 1)]
        return [(self.place(value), self._text(value)) for value in values]

    def _text(self, value: float) -> str:
        units = ((1e9, " B"), (1e6, " M"), (1e3, " k"))
        scale, unit = next(((scale, unit) for scale, unit in units if self.step >= scale), (1, ""))
        decimals = max(0, -math.floor(math.log10(self.step / scale)))
        return "0" if value == 0 else f"{value / scale:,.{decimals}f}{unit}".replace("-", "\u2212")


def axis(low: float, high: float, *, whole: bool = False, extend: bool = True) -> Axis:
    """Returns an axis over [low, high] with about five steps of 1, 2 or 5 times a power of ten.

    Round steps are Heckbert's (1990, "Nice numbers for graph labels"). `whole` allows whole steps only;
    `extend` moves both ends out to a mark.
    """
    if low == high:  # one value throughout lies in the middle
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 5 * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    if extend:
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
    return Axis(low, high, step)


class Line(NamedTuple):
    """One series."""

    name: str
    points: list[tuple[float, float]]
    """(x, y), where there is a value."""


def lines(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], x: str = "epoch") -> dict[str, Line]:
    """Returns a line over the rows' `x` for each key of `names` (key -> name) that has values."""
    found = {
        key: Line(name, [(row[x], row[key]) for row in rows if row.get(key) is not None]) for key, name in names.items()
    }
    return {key: line for key, line in found.items() if line.points}
