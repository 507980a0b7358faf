"""A run as one page: `report.json` for programs, `report.html` for people.

Reads a `Report` (a mapping, every section optional) -> gives both in one folder.
The page fetches nothing and runs nothing: it can be mailed, printed and kept.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import jinja2
import numpy as np
from numpy.typing import NDArray

from mmray.errors import EnvironmentFaultError


class Headline(TypedDict):
    """One tile at the top of the page."""

    label: str
    value: str | int | float


class Histogram(TypedDict):
    """Counts of values in bins of equal width, `edges[i] <= value < edges[i + 1]`; the last bin is closed."""

    edges: list[float]
    counts: list[int]
    outside: int
    """Values in no bin: below, above, or not finite."""


class Confusion(TypedDict):
    """`counts[i][j]` rows of label i were predicted as label j."""

    labels: list[str]
    counts: list[list[int]]


class LabelQuality(TypedDict):
    """How well one label is told apart from all others; None where a quotient has no denominator."""

    label: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None


class ImageWeight(TypedDict, total=False):
    """The share of the image in the fusion, 0 to 1."""

    value: float
    """The one learned weight, or the mean over the rows."""
    rows: Histogram
    """The weights of single rows, where a gate sets them."""


class Epoch(TypedDict):
    """What one epoch of training gave."""

    epoch: int
    train_loss: float | None
    validation_loss: NotRequired[float | None]
    validation_metric: NotRequired[float | None]
    image_weight: NotRequired[float | None]


class Evaluation(TypedDict):
    """How well the model does on labelled rows."""

    task: str
    rows: int
    metrics: Mapping[str, Mapping[str, float | None]]
    """View (`image and text`, `image only`, `text only`) -> metric -> value."""
    confusion: NotRequired[Confusion]
    per_label: NotRequired[list[LabelQuality]]
    alpha: NotRequired[ImageWeight]
    training: NotRequired[list[Epoch]]
    training_metric: NotRequired[str]
    """Name of each epoch's `validation_metric`."""


class Ledger(TypedDict):
    """Every row, once: `rows == ok + degraded + failed`."""

    rows: int
    ok: int
    degraded: int
    failed: int


class ReasonCount(TypedDict):
    """Rows of one status that share one reason."""

    status: str
    reason: str
    count: int
    meaning: str


class Check(TypedDict):
    """One thing that verification looked at."""

    name: str
    passed: bool
    detail: str


class Verification(TypedDict):
    """What `mmray verify` found at its level."""

    level: int
    passed: bool
    checks: list[Check]


class Scoring(TypedDict):
    """What became of each row of a scored table."""

    ledger: Ledger
    reasons: NotRequired[list[ReasonCount]]
    slices: NotRequired[int]
    seconds: NotRequired[float]
    rows_per_second: NotRequired[float]
    scores: NotRequired[Histogram]
    modalities: NotRequired[Mapping[str, int]]
    """`modalities_used` -> rows."""
    verify: NotRequired[Verification]


class Provenance(TypedDict, total=False):
    """What it takes to get the same numbers again."""

    fingerprint: str
    bundle: str
    command: str
    machine: Mapping[str, str | int | float]
    versions: Mapping[str, str]
    config: Mapping[str, object]


class Report(TypedDict, total=False):
    """Everything a page can show; what is absent is left out."""

    title: str
    subtitle: str
    created: str
    """ISO 8601."""
    summary: list[Headline]
    evaluation: Evaluation
    scoring: Scoring
    provenance: Provenance


def write_report(folder: Path | str, report: Report) -> None:
    """Writes `report.json` and `report.html` into a folder, which is made where it is missing.

    Numbers that are not finite become `null` in the JSON and a dash on the page: JSON has no word for them.

    Raises:
        EnvironmentFaultError: the folder cannot be written.
    """
    if "scoring" in report:
        _assert_balance(report["scoring"])
    plain = _plain(report)
    pages = {
        "report.json": json.dumps(plain, ensure_ascii=False, indent=2, sort_keys=True) + "\n",
        "report.html": _render(plain),
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            # A command line may hold bytes that are not UTF-8; as \udcXX escapes they are valid JSON.
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise EnvironmentFaultError(
            f"cannot write the report to {str(folder)!r}: {error}; name a folder that can be written"
        ) from error


def histogram(values: NDArray[np.floating[Any]], low: float, high: float, bins: int = 20) -> Histogram:
    """Counts values in `bins` bins of equal width over [low, high]; the rest are `outside`."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=bins, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "outside": int(values.size - counts.sum())}


def _assert_balance(scoring: Scoring) -> None:
    ledger = scoring["ledger"]
    assert ledger["rows"] == ledger["ok"] + ledger["degraded"] + ledger["failed"], f"rows are lost: {ledger}"
    if "reasons" in scoring:
        for status, rows in (("degraded", ledger["degraded"]), ("failed", ledger["failed"])):
            explained = sum(item["count"] for item in scoring["reasons"] if item["status"] == status)
            assert explained == rows, f"{rows} rows are {status}, reasons explain {explained}"


def _plain(value: Any) -> Any:
    """Returns the value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _render(report: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "fixed": _fixed,
        "percent": _percent,
        "duration": _duration,
        "moment": _moment,
        "indented": lambda value: json.dumps(value, ensure_ascii=False, indent=2),
    }
    environment.globals |= {"axis": _axis, "lines": _lines}
    template = files("mmray").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


# Numbers as people read them.

_NOTHING = "\u2013"  # en dash: no number, which is not the number zero


def _number(value: str | float | None) -> str:
    """Thousands separators for whole numbers, about three digits for others; text stays as it is."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int):
        return _NOTHING if value is None else f"{value:,}"
    digits = 0 if value == 0 or abs(value) >= 100 else min(6, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _fixed(value: float | None) -> str:
    """Three decimals, so that a column of them lines up."""
    return _NOTHING if value is None else f"{value:,.3f}"


def _percent(part: int, whole: int) -> str:
    """One decimal, but never 0.0 % of some rows or 100.0 % of not quite all."""
    if whole == 0:
        return _NOTHING
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= share < 100 else f"{share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _moment(iso: str) -> str:
    return datetime.fromisoformat(iso).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")


# Charts: the template draws them; here are their scales. Positions are per cent of the plot's side, so that
# a chart stretches with the page while its text keeps its size.


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


def _axis(low: float, high: float, *, whole: bool = False, extend: bool = True) -> Axis:
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
    """One series over the epochs."""

    name: str
    points: list[tuple[int, float]]
    """(epoch, value), where there is a value."""


def _lines(epochs: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Line]:
    """Returns a line for each key of `names` (key -> name) that has values."""
    lines = {
        key: Line(name, [(epoch["epoch"], epoch[key]) for epoch in epochs if epoch.get(key) is not None])
        for key, name in names.items()
    }
    return {key: line for key, line in lines.items() if line.points}
