"""What is measured for each task, by the field's own definitions (torchmetrics).

Reads the outputs of N rows and their targets -> gives named numbers.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmray.model.vision import torchvision

NAN = torch.tensor(torch.nan)


class LabelQuality(TypedDict):
    """How well one label is told apart from all others; None where a quotient has no denominator."""

    label: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None


PRIMARY = {"binary": "auroc", "multiclass": "accuracy", "multilabel": "average_precision", "regression": "r2"}
"""The metric that stands for each task where there is room for one; larger is better for all of them."""


def measure(task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> dict[str, float | None]:
    """Measures N rows; None is a metric that these rows do not define.

    Args:
        task: `binary`, `multiclass`, `multilabel` or `regression`.
        outputs: [N, K] probabilities, or [N, 1] values of a regression.
        targets: binary [N] 0 or 1; multiclass [N] label index; multilabel [N, K] 0 or 1; regression [N] values.
    """
    got, want = torch.from_numpy(np.ascontiguousarray(outputs)), torch.from_numpy(np.ascontiguousarray(targets))
    values = _MEASURES[task](got, want)
    return {name: float(value) if torch.isfinite(value) else None for name, value in values.items()}


@cache
def _functional() -> Any:
    """Returns `torchmetrics.functional`, which imports torchvision if it is installed: ours has to come first."""
    torchvision()
    import torchmetrics.functional.classification

    return torchmetrics.functional


def _binary(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    positive, targets = probabilities[:, 1], targets.long()
    return {
        "accuracy": functional.binary_accuracy(positive, targets),
        "f1": functional.binary_f1_score(positive, targets),
        "auroc": functional.binary_auroc(positive, targets) if bool((targets != targets[0]).any()) else NAN,
        "average_precision": functional.binary_average_precision(positive, targets) if targets.any() else NAN,
        "log_loss": _log_loss(probabilities, targets),
    }


def _multiclass(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    targets, num_labels = targets.long(), probabilities.shape[1]
    # One against the rest, over the labels that have rows: one without has no curve.
    present = [int(k) for k in range(num_labels) if bool((targets == k).any())]
    curves = [functional.binary_auroc(probabilities[:, k], targets == k) for k in present]
    return {
        "accuracy": functional.multiclass_accuracy(probabilities, targets, num_labels, average="micro"),
        "macro_f1": functional.multiclass_f1_score(probabilities, targets, num_labels, average="macro"),
        "auroc": _mean(curves) if len(present) > 1 else NAN,
        "log_loss": _log_loss(probabilities, targets),
    }


def _multilabel(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    targets, num_labels = targets.long(), probabilities.shape[1]
    # The mean over the labels that some rows carry and some do not: the others have no curve.
    mixed = (targets.any(0) & ~targets.all(0)).nonzero().flatten().tolist()
    columns = [(probabilities[:, k], targets[:, k]) for k in mixed]
    f1 = [functional.binary_f1_score(probabilities[:, k], targets[:, k]) for k in range(num_labels)]
    return {
        "average_precision": _mean([functional.binary_average_precision(*column) for column in columns]),
        "auroc": _mean([functional.binary_auroc(*column) for column in columns]),
        "macro_f1": _mean(f1),
        "accuracy": ((probabilities >= 0.5).long() == targets).all(1).float().mean(),
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([*values]).mean() if values else NAN


def _regression(values: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional()
    got, want = values[:, 0].double(), targets.double()
    varied = len(want) > 1 and bool(want.std() > 0)
    return {
        "mae": functional.mean_absolute_error(got, want),
        "rmse": functional.mean_squared_error(got, want, squared=False),
        "r2": functional.r2_score(got, want) if varied else NAN,
        "spearman": functional.spearman_corrcoef(got, want) if varied and bool(got.std() > 0) else NAN,
    }


_MEASURES = {"binary": _binary, "multiclass": _multiclass, "multilabel": _multilabel, "regression": _regression}


def _log_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    chosen = probabilities.double().gather(1, targets[:, None]).squeeze(1)
    return -chosen.clamp_min(1e-15).log().mean()


def confusion_matrix(probabilities: NDArray[np.float32], targets: NDArray[np.generic]) -> list[list[int]]:
    """Counts rows by true label (down) and predicted one (across), from [N, K] probabilities and [N] label indices."""
    num_labels = probabilities.shape[1]
    got, want = torch.from_numpy(probabilities.argmax(1)), torch.from_numpy(np.asarray(targets, np.int64))
    matrix: list[list[int]] = _functional().classification.multiclass_confusion_matrix(got, want, num_labels).tolist()
    return matrix


def per_label(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> list[LabelQuality]:
    """Returns support, precision, recall and F1 of each label of a confusion matrix; None without a denominator."""
    counts = np.asarray(matrix)
    rows: list[LabelQuality] = []
    for k, label in enumerate(labels):
        hits, support, predicted = int(counts[k, k]), int(counts[k].sum()), int(counts[:, k].sum())
        rows.append(
            {
                "label": label,
                "support": support,
                "precision": hits / predicted if predicted else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + predicted) if support + predicted else None,
            }
        )
    return rows
