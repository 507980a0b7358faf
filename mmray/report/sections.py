"""What a report page can show, as mappings: every section and most of their parts are optional.

Nothing here is computed but histograms; `mmray.summary` fills them in, `mmray.report.render` draws them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from mmray.curves import ReliabilityBin

if TYPE_CHECKING:  # a page is drawn without torch, which these are computed with
    from mmray.metrics import LabelQuality
    from mmray.mistakes import Mistake
    from mmray.score.samples import Sample


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


class Curve(TypedDict):
    """A line with a name."""

    name: str
    points: list[tuple[float, float]]


class Confusion(TypedDict):
    """`counts[i][j]` rows of label i were predicted as label j."""

    labels: list[str]
    counts: list[list[int]]


class Group(TypedDict):
    """Rows that have something in common; no metrics where none could be predicted."""

    name: str
    rows: int
    metrics: Mapping[str, float | None]


class ImageWeight(TypedDict, total=False):
    """The share of the image in the fusion, 0 to 1."""

    value: float
    """The one learned weight, or the mean over the rows."""
    rows: Histogram
    """The weights of single rows, where a gate sets them."""
    sweep: list[Mapping[str, float | None]]
    """`alpha`, the weight of the image in every row, and the metrics there."""
    sweep_metric: str
    """The metric of the sweep to draw."""


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
    per_label: NotRequired[list["LabelQuality"]]
    groups: NotRequired[Mapping[str, list[Group]]]
    """By what (`modalities used`, a column) -> groups of rows."""
    roc: NotRequired[list[Curve]]
    """Of each view: (false positive rate, true positive rate)."""
    precision_recall: NotRequired[list[Curve]]
    """Of each view: (recall, precision)."""
    reliability: NotRequired[list[ReliabilityBin]]
    scatter: NotRequired[list[tuple[float, float]]]
    """(target, prediction) of some rows of a regression."""
    mistakes: NotRequired[list["Mistake"]]
    """The worst first."""
    facts: NotRequired[Mapping[str, str | int | float]]
    """What was measured, in words: data and model."""
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
    """What it means, and what to do."""
    examples: NotRequired[list[str]]
    """Some of these rows, and what was wrong with them."""


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


class ScoredGroup(TypedDict):
    """Scored rows that have a value in common."""

    name: str
    rows: int
    ok: int
    degraded: int
    failed: int
    mean_score: float | None


class Speed(TypedDict):
    """How fast the command was that completed a run."""

    seconds: float
    rate: list[tuple[float, float]]
    """(seconds since its start, rows per second there)."""
    stages: list[tuple[str, float]]
    """Stage and its share of the time of all processes."""


class Scoring(TypedDict):
    """What became of each row of a scored table."""

    ledger: Ledger
    reasons: NotRequired[list[ReasonCount]]
    slices: NotRequired[int]
    seconds: NotRequired[float]
    rows_per_second: NotRequired[float]
    scores: NotRequired[Histogram]
    scores_elsewhere: NotRequired[list[Curve]]
    """Of this run and of others: (score, share of the rows)."""
    image_weight: NotRequired[ImageWeight]
    groups: NotRequired[Mapping[str, list[ScoredGroup]]]
    """Column -> rows by its values."""
    speed: NotRequired[Speed]
    samples: NotRequired[list["Sample"]]
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


def histogram(values: NDArray[np.floating[Any]], low: float, high: float, bins: int = 20) -> Histogram:
    """Counts values in `bins` bins of equal width over [low, high]; the rest are `outside`."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=bins, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "outside": int(values.size - counts.sum())}
