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
    average_precision: float | None


CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017
PRIMARY = {"binary": "auroc", "multiclass": "accuracy", "multilabel": "average_precision", "regression": "r2"}
"""The metric that stands for each task where there is room for one; larger is better for all of them."""


def measure(task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> dict[str, float | None]:
    """Measures N rows, at least one; None is a metric that these rows do not define.

    `calibration_error` is the mean distance between what is promised and what comes true (ECE, Guo et al. 2017): of the
    predicted label's probability, for binary of the positive label's, for multilabel of every label's.

    Args:
        task: `binary`, `multiclass`, `multilabel` or `regression`.
        outputs: [N, K] probabilities, or [N, 1] values of a regression.
        targets: binary [N] 0 or 1; multiclass [N] label index; multilabel [N, K] 0 or 1; regression [N] values.
    """
    got, want = torch.from_numpy(np.ascontiguousarray(outputs)), torch.from_numpy(np.ascontiguousarray(targets))
    values = _MEASURES[task](got, want)
    return {name: _finite(value) for name, value in values.items()}


@cache
def _functional() -> Any:
    """Returns `torchmetrics.functional`, which imports torchvision if it is installed: ours has to come first."""
    torchvision()
    import torchmetrics.functional.classification

    return torchmetrics.functional


def _binary(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    positive, targets = probabilities[:, 1].contiguous(), targets.long()
    return {
        "accuracy": functional.binary_accuracy(positive, targets),
        "f1": functional.binary_f1_score(positive, targets),
        "macro_f1": functional.multiclass_f1_score((positive > 0.5).long(), targets, 2, average="macro"),
        **_ranking([(positive, targets)]),
        "log_loss": _log_loss(probabilities, targets),
        "calibration_error": functional.binary_calibration_error(positive, targets, CALIBRATION_BINS),
    }


def _multiclass(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    targets, num_labels = targets.long(), probabilities.shape[1]
    return {
        "accuracy": functional.multiclass_accuracy(probabilities, targets, num_labels, average="micro"),
        "macro_f1": functional.multiclass_f1_score(probabilities, targets, num_labels, average="macro"),
        **_ranking([(probabilities[:, k], (targets == k).long()) for k in range(num_labels)]),
        "log_loss": _log_loss(probabilities, targets),
        "calibration_error": functional.multiclass_calibration_error(
            probabilities, targets, num_labels, CALIBRATION_BINS
        ),
    }


def _multilabel(probabilities: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    functional = _functional().classification
    targets, num_labels = targets.long(), probabilities.shape[1]
    f1 = [functional.binary_f1_score(probabilities[:, k], targets[:, k]) for k in range(num_labels)]
    cells, wanted = probabilities.flatten(), targets.flatten()
    return {
        "accuracy": ((probabilities >= 0.5).long() == targets).all(1).float().mean(),
        "macro_f1": _mean(f1),
        "micro_f1": functional.binary_f1_score(cells, wanted),
        **_ranking([(probabilities[:, k], targets[:, k]) for k in range(num_labels)]),
        "log_loss": _log_loss(torch.stack([1 - cells, cells], dim=1), wanted),
        "calibration_error": functional.binary_calibration_error(cells, wanted, CALIBRATION_BINS),
    }


def _ranking(labels: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, Tensor]:
    """Returns what judges the order alone, averaged over the labels, each against the rest: probabilities and 0 or 1.

    A label that no row has, or every row, has no curve and is left out.
    """
    functional = _functional().classification
    mixed = [(got, want) for got, want in labels if bool((want != want[0]).any())]
    return {
        "auroc": _mean([functional.binary_auroc(*label) for label in mixed]),
        "average_precision": _mean([functional.binary_average_precision(*label) for label in mixed]),
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


def per_label(
    task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic], labels: Sequence[str]
) -> list[LabelQuality]:
    """Returns what each label is worth, from probabilities [N, K] and targets as `measure` takes them."""
    chosen = outputs >= 0.5 if task == "multilabel" else np.eye(len(labels), dtype=bool)[outputs.argmax(1)]
    carried = targets != 0 if task == "multilabel" else np.eye(len(labels), dtype=bool)[targets.astype(np.int64)]
    rows: list[LabelQuality] = []
    for k, label in enumerate(labels):
        hits, support, predicted = (
            int(mask.sum()) for mask in (chosen[:, k] & carried[:, k], carried[:, k], chosen[:, k])
        )
        order = _ranking([(torch.from_numpy(outputs[:, k]), torch.from_numpy(carried[:, k]).long())])
        rows.append(
            {
                "label": label,
                "support": support,
                "precision": hits / predicted if predicted else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + predicted) if support + predicted else None,
                "average_precision": _finite(order["average_precision"]),
            }
        )
    return rows


def _finite(value: Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None
