"""How well probabilities rank and how far they can be trusted, as points to draw.

Reads the outputs of N rows and their targets -> gives ROC and precision-recall curves and a reliability diagram.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 100  # of a curve: more than can be told apart
MAX_DOTS = 300
MAX_PAIRS = 5_000_000  # sorted in a second
Points = list[tuple[float, float]]
Pooled = tuple[NDArray[np.floating], NDArray[np.bool_]]
"""[P] probabilities, and [P] whether what they promise is true."""


class ReliabilityBin(TypedDict):
    """Predictions of about the same probability: what they promise and what came true."""

    confidence: float
    """Mean probability."""
    accuracy: float
    """Share that came true."""
    rows: int


def against_the_rest(task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> Pooled:
    """Pools each (row, label) pair, which is the micro-average of one label against the rest; of binary the positive.

    Of more than `MAX_PAIRS` an even sample of the rows stands for all.

    Args:
        task: `binary`, `multiclass` or `multilabel`.
        outputs: [N, K] probabilities.
        targets: as `mmray.metrics.measure` takes them.
    """
    step = max(-(-outputs.size // MAX_PAIRS), 1)
    outputs, targets = outputs[::step], targets[::step]
    if task == "binary":
        return outputs[:, 1], targets == 1
    carried = targets != 0 if task == "multilabel" else np.eye(outputs.shape[1], dtype=bool)[targets.astype(np.int64)]
    return outputs.ravel(), carried.ravel()


def roc(pooled: Pooled) -> Points:
    """Returns (false positive rate, true positive rate) from the highest threshold down; none for one kind."""
    hits, misses = _cumulated(pooled)
    if not hits[-1] or not misses[-1]:
        return []
    return _thinned(misses / misses[-1], hits / hits[-1])


def precision_recall(pooled: Pooled) -> Points:
    """Returns (recall, precision) from the highest threshold down; nothing where nothing is to be found."""
    hits, misses = (counts[1:] for counts in _cumulated(pooled))
    if not len(hits) or not hits[-1]:
        return []
    recall, precision = hits / hits[-1], hits / (hits + misses)
    return _thinned(np.concatenate([[0.0], recall]), np.concatenate([precision[:1], precision]))


def reliability(
    task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic], bins: int
) -> list[ReliabilityBin]:
    """Returns the bins of the calibration error that have rows, by rising probability.

    Of multiclass it is the predicted label's probability, of binary the positive label's, of multilabel every label's.
    """
    if task == "multiclass":
        probability, right = outputs.max(axis=1), outputs.argmax(axis=1) == targets
    else:
        probability, right = against_the_rest(task, outputs, targets)
    index = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(probability[index == k].mean()),
            "accuracy": float(right[index == k].mean()),
            "rows": int((index == k).sum()),
        }
        for k in np.unique(index)
    ]


def scatter(values: NDArray[np.floating], targets: NDArray[np.generic]) -> Points:
    """Returns (target, value) of at most `MAX_DOTS` rows of a regression, from all over its range; finite ones only."""
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(targets[known], kind="stable")]
    kept = order[np.linspace(0, len(order) - 1, min(MAX_DOTS, len(order))).astype(int)]
    return [(float(target), float(value)) for target, value in zip(targets[kept], values[kept], strict=True)]


def _cumulated(pooled: Pooled) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns what is found, rightly and wrongly, at each distinct threshold from the highest down; first nothing."""
    probability, carried = pooled
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)[: len(order)]  # equal probabilities are found together
    hits = np.cumsum(carried[order])[last]
    found = np.arange(1, len(order) + 1)[last]
    return np.append(0.0, hits), np.append(0.0, found - hits)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Points:
    """Returns points at about equal distances along a curve, the first and the last among them."""
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], MAX_POINTS)).clip(max=len(x) - 1))
    kept = np.union1d(kept, [0, len(x) - 1])
    return [(float(a), float(b)) for a, b in zip(x[kept].round(5), y[kept].round(5), strict=True)]
