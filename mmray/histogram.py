"""Scores in equal bins, and how far two populations of them are apart."""

import math

import numpy as np
from numpy.typing import NDArray

HISTOGRAM_BINS = 20


def histogram_of(scores: NDArray[np.float64], score_range: tuple[float, float]) -> tuple[int, ...]:
    """Counts scores in equal bins over a range; what lies outside counts at the ends."""
    counts, _ = np.histogram(np.clip(scores, *score_range), bins=HISTOGRAM_BINS, range=score_range)
    return tuple(int(count) for count in counts)


def stability_index(expected: tuple[int, ...], found: tuple[int, ...]) -> float:
    """Returns the population stability index of two histograms: 0 alike, above 0.25 commonly called another population.

    Source: Siddiqi 2006, Credit Risk Scorecards; each bin counts one more, so that empty ones are no infinity, and of
    the larger population as many count as the smaller has: one more means the same to both.
    """
    rows = min(sum(expected), sum(found))
    pairs = zip(_shares(expected, rows), _shares(found, rows), strict=True)
    return math.fsum((q - p) * math.log(q / p) for p, q in pairs)


def _shares(histogram: tuple[int, ...], rows: int) -> list[float]:
    scale = rows / max(sum(histogram), 1)
    return [(count * scale + 1) / (rows + len(histogram)) for count in histogram]
