"""Labels: which there are, and label cells as targets."""

import numpy as np
import pytest
from models import small_config

from mmray.errors import ConfigError, TableError
from mmray.labels import encode_targets, is_label, label_name, label_names, labels_of
from mmray.metrics import measure


def test_integers_that_a_null_made_floats_keep_their_names() -> None:
    assert [label_name(value) for value in (1, 1.0, 2.5, True, "1", np.float64(3))] == [
        "1",
        "1",
        "2.5",
        "True",
        "1",
        "3",
    ]


def test_null_and_nan_are_no_labels_and_a_label_that_no_training_row_has_is_left_out() -> None:
    cells = ["a", None, float("nan"), "b", "c"]
    assert [is_label(cell, "multiclass", ("a", "b")) for cell in cells] == [True, False, False, True, False]
    assert [is_label(cell, "multiclass") for cell in cells] == [True, False, False, True, True]
    assert [is_label(cell, "regression", ()) for cell in (1.5, float("nan"))] == [True, False]


def test_a_multilabel_cell_names_each_label_once_and_unknown_ones_not_at_all() -> None:
    assert label_names(["x", None, "x", 1.0]) == ["x", "1"]
    targets = encode_targets([["x", "x", "new"], [], ["y", None]], "multilabel", ("x", "y"), "label")
    assert targets.tolist() == [[1, 0], [0, 0], [0, 1]]


def test_a_column_without_any_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no label"):
        labels_of(small_config(task={"kind": "multilabel"}), {})


def test_a_regression_names_the_cell_that_is_no_number() -> None:
    with pytest.raises(TableError, match="holds 'cheap'"):
        encode_targets(["cheap"], "regression", (), "price")


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_multilabel_task_of_few_labels_is_measured(num_labels: int) -> None:
    outputs = np.asarray([[0.9, 0.2], [0.1, 0.3], [0.7, 0.1]], np.float32)[:, :num_labels]
    targets = np.asarray([[1, 0], [0, 0], [1, 0]], np.float32)[:, :num_labels]
    metrics = measure("multilabel", outputs, targets)
    assert metrics["average_precision"] == metrics["auroc"] == 1.0
    assert metrics["accuracy"] == 1.0
