"""Curves: the points are those of the definition, and few enough to draw."""

import numpy as np
import pytest

from mmray.curves import MAX_PAIRS, MAX_POINTS, against_the_rest, precision_recall, reliability, roc, scatter
from mmray.metrics import measure

PROBABILITIES, CARRIED = np.array([0.9, 0.8, 0.8, 0.1], np.float32), np.array([True, True, False, False])


def test_a_roc_curve_goes_through_each_distinct_threshold() -> None:
    assert roc((PROBABILITIES, CARRIED)) == [(0, 0), (0, 0.5), (0.5, 1), (1, 1)]


def test_a_precision_recall_curve_goes_through_each_distinct_threshold() -> None:
    assert precision_recall((PROBABILITIES, CARRIED)) == [(0, 1), (0.5, 1), (1, 0.66667), (1, 0.5)]


def test_rows_of_one_kind_have_no_curve() -> None:
    assert roc((PROBABILITIES, np.ones(4, bool))) == []
    assert precision_recall((PROBABILITIES, np.zeros(4, bool))) == []
    assert roc((PROBABILITIES[:0], CARRIED[:0])) == precision_recall((PROBABILITIES[:0], CARRIED[:0])) == []


def test_a_curve_of_many_rows_keeps_its_area_in_few_points() -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, 5000)
    positive = np.clip(0.3 * targets + generator.random(5000) * 0.7, 0, 1).astype(np.float32)
    outputs = np.stack([1 - positive, positive], axis=1)
    points = roc(against_the_rest("binary", outputs, targets))
    assert len(points) <= MAX_POINTS + 2
    x, y = np.array(points).T
    assert np.trapezoid(y, x) == pytest.approx(measure("binary", outputs, targets)["auroc"], abs=1e-3)


def test_labels_are_pooled_one_against_the_rest() -> None:
    outputs = np.array([[0.2, 0.8], [0.6, 0.4]], np.float32)
    for task, targets in (("multiclass", np.array([1, 1])), ("multilabel", np.array([[0, 1], [0, 1]], np.float32))):
        probabilities, carried = against_the_rest(task, outputs, targets)
        assert probabilities.tolist() == outputs.ravel().tolist()
        assert carried.tolist() == [False, True, False, True]


def test_reliability_is_what_the_calibration_error_sums_up() -> None:
    generator = np.random.default_rng(1)
    outputs = generator.dirichlet([1, 1, 1], 400).astype(np.float32)
    targets = generator.integers(0, 3, 400)
    bins = reliability("multiclass", outputs, targets, 15)
    error = sum(b["rows"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 400
    assert error == pytest.approx(measure("multiclass", outputs, targets)["calibration_error"], abs=1e-4)
    assert [b["confidence"] for b in bins] == sorted(b["confidence"] for b in bins)
    (certain,) = reliability("binary", np.array([[0.0, 1.0]] * 4, np.float32), np.array([1, 1, 1, 0]), 15)
    assert certain == {"confidence": 1.0, "accuracy": 0.75, "rows": 4}


def test_a_scatter_covers_the_range_and_leaves_out_what_is_not_finite() -> None:
    targets = np.arange(10_000, dtype=np.float32)
    values = np.where(targets == 5000, np.nan, -targets)
    points = scatter(values, targets)
    assert len(points) == 300
    assert points[0] == (0, 0)
    assert points[-1] == (9999, -9999)
    assert all(np.isfinite(points).ravel())


def test_what_is_pooled_is_bounded() -> None:
    outputs = np.broadcast_to(np.float32(0.5), (MAX_PAIRS // 2, 3))
    probabilities, carried = against_the_rest("multilabel", outputs, outputs)
    assert len(probabilities) == len(carried)
    assert MAX_PAIRS / 2 < len(probabilities) <= MAX_PAIRS + 3
    assert roc(against_the_rest("multilabel", outputs[:0], outputs[:0])) == []
