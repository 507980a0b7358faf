"""The rows that a model is most wrong about, as a person would want to see them.

Reads predicted and labelled rows of a slice -> gives the worst of them with text and picture; parts merge into the
worst of a table.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mmray.predictor import Predictor
from mmray.preprocess import Features
from mmray.preprocess.image import thumbnail

NUM_MISTAKES = 12
THUMBNAIL_SIDE = 128  # pixels
LEAST = 1e-15  # probability, so that its logarithm is finite
MAX_CHARACTERS = 160  # of a text


class Mistake(TypedDict):
    """One row that was predicted wrongly."""

    row: str
    """File and number of the row in it, from 0."""
    wrongness: float
    """Negative log-likelihood of the label (the mean over the labels for multilabel), or distance of a regression."""
    label: str
    predicted: str
    probability: float | None
    """Of the predicted label; None for multilabel and regression."""
    text: str | None
    thumbnail: str | None
    """The picture as the model sees it: a data URI."""


def worst_rows(
    predictor: Predictor,
    rows: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    outputs: NDArray[np.float32],
    targets: NDArray[np.generic],
) -> list[Mistake]:
    """Returns the worst mistakes among N rows, the worst first.

    Args:
        predictor: of the bundle, to prepare the pictures.
        rows: N names.
        columns: modality -> N cells.
        outputs: [N, K] finite, as the predictor gives them.
        targets: as `mmray.labels.encode_targets` gives them.
    """
    task, labels = predictor.bundle.config.task.kind, predictor.bundle.labels
    wrong = wrongness(task, outputs, targets)
    order = [k for k in np.argsort(-wrong, kind="stable")[:NUM_MISTAKES] if wrong[k] > 0]
    if not order:
        return []
    features = predictor.prepare({name: [cells[k] for k in order] for name, cells in columns.items()})
    return [
        {
            "row": rows[k],
            "wrongness": float(wrong[k]),
            "label": _named(task, labels, targets[k]),
            "predicted": _named(task, labels, outputs[k].argmax() if task in ("binary", "multiclass") else outputs[k]),
            "probability": float(outputs[k].max()) if task in ("binary", "multiclass") else None,
            "text": shortened(columns["text"][k]) if "text" in columns else None,
            "thumbnail": picture(features, place),
        }
        for place, k in enumerate(order)
    ]


def worst_of(parts: Iterable[Sequence[Mistake]]) -> list[Mistake]:
    """Returns the worst mistakes of all parts."""
    return sorted((one for part in parts for one in part), key=lambda one: -one["wrongness"])[:NUM_MISTAKES]


def wrongness(task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> NDArray[np.float64]:
    """Returns how wrong each row is [N]; 0 where the prediction is right."""
    if task == "regression":
        return np.asarray(np.abs(outputs[:, 0] - targets.astype(np.float64)))
    p = outputs.astype(np.float64).clip(LEAST, 1 - LEAST)
    if task == "multilabel":
        carried = targets != 0
        loss = -np.log(np.where(carried, p, 1 - p)).mean(axis=1)
        right = ((outputs >= 0.5) == carried).all(axis=1)
    else:
        labels = targets.astype(np.int64)
        loss, right = -np.log(p[np.arange(len(p)), labels]), outputs.argmax(axis=1) == labels
    return np.where(right, 0.0, loss)


def _named(task: str, labels: Sequence[str], value: Any) -> str:
    if task == "regression":
        return f"{float(np.ravel(value)[0]):.4g}"
    if task == "multilabel":
        return ", ".join(labels[int(k)] for k in np.flatnonzero(value >= 0.5)) or "none"
    return labels[int(value)]


def shortened(text: Any) -> str | None:
    """Returns a text on one line, and no more of it than a page has room for."""
    if text is None:
        return None
    words = " ".join(str(text).split())
    return words if len(words) <= MAX_CHARACTERS else words[: MAX_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def picture(features: Features, row: int) -> str | None:
    """Returns a row's picture as the model sees it, as a data URI; None where it has none."""
    if not ("image" in features.present and features.present["image"][row]):
        return None
    jpeg = thumbnail(features.arrays["image"][row], THUMBNAIL_SIDE)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
