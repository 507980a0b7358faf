"""Metrics: each is its definition, worked out by hand."""

import math

import numpy as np
import pytest

from mmray.metrics import confusion_matrix, measure, per_label


def rows(*values: list[float]) -> np.ndarray:
    return np.asarray(values, np.float32)


THREE = rows([0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6])
LABELS = np.array([0, 1, 1, 2])  # the third row is wrong


def test_binary() -> None:
    positive = np.array([0.9, 0.8, 0.35, 0.1])
    got = measure("binary", np.stack([1 - positive, positive], 1).astype(np.float32), np.array([1, 0, 1, 0]))
    assert got["accuracy"] == 0.5  # right: the first and the last
    assert got["f1"] == pytest.approx(0.5)
    assert got["macro_f1"] == pytest.approx(0.5)
    assert got["auroc"] == pytest.approx(3 / 4)  # of four pairs only (0.8, 0.35) is the wrong way round
    assert got["average_precision"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert got["log_loss"] == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.35, 0.9])), rel=1e-5)
    assert got["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.65 + 0.1) / 4, rel=1e-5)  # each in its own bin


def test_multiclass() -> None:
    got = measure("multiclass", THREE, LABELS)
    assert got["accuracy"] == 0.75
    assert got["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert got["auroc"] == pytest.approx((1 + 3.5 / 4 + 1) / 3)  # of label 1 the pair (0.3, 0.3) counts half
    assert got["average_precision"] == pytest.approx((1 + (1 / 2 + 1 / 2 * 2 / 3) + 1) / 3)
    assert got["log_loss"] == pytest.approx(-np.mean(np.log([0.7, 0.6, 0.3, 0.6])), rel=1e-5)
    # The two of 0.6 share a bin, in which both are right.
    assert got["calibration_error"] == pytest.approx((0.3 + 2 * 0.4 + 0.5) / 4, rel=1e-5)


def test_multilabel() -> None:
    outputs, targets = rows([0.9, 0.2], [0.4, 0.7], [0.8, 0.6]), rows([1, 0], [1, 1], [0, 0])
    got = measure("multilabel", outputs, targets)
    assert got["accuracy"] == pytest.approx(1 / 3)  # only the first row has all of its labels right
    assert got["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got["micro_f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert got["average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert got["auroc"] == pytest.approx((1 / 2 + 1) / 2)
    assert got["log_loss"] == pytest.approx(-np.mean(np.log([0.9, 0.8, 0.4, 0.7, 0.2, 0.4])), rel=1e-5)


def test_regression() -> None:
    got = measure("regression", rows([1.0], [2.0], [5.0]), np.array([1.0, 3.0, 2.0], np.float32))
    assert got["mae"] == pytest.approx(4 / 3)
    assert got["rmse"] == pytest.approx(math.sqrt(10 / 3))
    assert got["r2"] == pytest.approx(1 - 10 / 2)
    assert got["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8), rel=1e-5)


def test_what_the_rows_do_not_define_is_none() -> None:
    one_kind = measure("binary", rows([0.4, 0.6], [0.3, 0.7]), np.array([1, 1]))
    assert one_kind["auroc"] is None
    assert one_kind["accuracy"] == 1
    assert measure("multilabel", rows([0.9], [0.8]), rows([1], [1]))["average_precision"] is None
    constant = measure("regression", rows([1.0], [2.0]), np.array([3.0, 3.0], np.float32))
    assert constant["r2"] is constant["spearman"] is None
    assert constant["mae"] == 1.5


def test_the_quality_of_each_label() -> None:
    quality = per_label("multiclass", THREE, LABELS, ["a", "b", "c"])
    assert [q["support"] for q in quality] == [1, 2, 1]
    assert [q["precision"] for q in quality] == [0.5, 1.0, 1.0]
    assert [q["recall"] for q in quality] == [1.0, 0.5, 1.0]
    assert [q["f1"] for q in quality] == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert [q["average_precision"] for q in quality] == pytest.approx([1, 5 / 6, 1])
    nothing, _ = per_label("multilabel", rows([0.1, 0.9]), rows([0, 1]), ["never", "always"])
    assert nothing == {
        "label": "never", "support": 0, "precision": None, "recall": None, "f1": None, "average_precision": None
    }  # fmt: skip


def test_a_confusion_matrix_has_the_true_label_down_and_the_predicted_across() -> None:
    assert confusion_matrix(THREE, LABELS) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
