"""Labels: which there are, in which order the model gives them, and label cells as targets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.config import Config
from mmray.errors import ConfigError, TableError


def labels_of(config: Config, counts: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the labels in output order: sorted, and for binary with the positive one last; none for regression.

    Args:
        config: names the task and the label column.
        counts: label -> training rows.

    Raises:
        ConfigError: the task does not fit the labels that were found.
    """
    task, found, column = config.task, sorted(counts), config.table.label_column
    if task.kind == "regression":
        return ()
    if not found:
        raise ConfigError(f"the label column {column!r} holds no label")
    if len(found) < 2 and task.kind != "multilabel":
        raise ConfigError(f"the label column {column!r} holds only {found}; a model needs at least two labels")
    if task.kind == "binary":
        if len(found) != 2:
            raise ConfigError(
                f"task.kind = 'binary' needs two labels; column {column!r} holds {len(found)}: {_some(found)}; "
                "use task.kind = 'multiclass'"
            )
        if task.positive_label is not None:
            if task.positive_label not in found:
                raise ConfigError(f"task.positive_label = {task.positive_label!r} is not one of the labels {found}")
            found.sort(key=lambda label: label == task.positive_label)
    return tuple(found)


def encode_targets(values: Sequence[Any], task: str, labels: Sequence[str], column: str) -> NDArray[np.generic]:
    """Turns B label cells into targets: int64 [B] label indices; multilabel float32 [B, K]; regression float32 [B].

    Args:
        values: cells for which `is_label` holds with these labels.

    Raises:
        TableError: a cell is not a finite number in a regression.
    """
    if task == "regression":
        return np.asarray([number(value, column) for value in values], np.float32)
    index = {label: k for k, label in enumerate(labels)}
    if task != "multilabel":
        return np.asarray([index[label_name(value)] for value in values], np.int64)
    targets = np.zeros((len(values), len(labels)), np.float32)
    for row, names in enumerate(values):
        targets[row, [index[name] for name in label_names(names) if name in index]] = 1
    return targets


def is_label(value: Any, task: str, labels: Sequence[str] | None = None) -> bool:
    """Tells whether a label cell can be learned from or measured: it is there, and one of the labels if they are given.

    NaN is how pandas writes a null number. A rare label may be in no training row; a model cannot be right about it.
    """
    if value is None or value != value:
        return False
    return task in ("regression", "multilabel") or labels is None or label_name(value) in labels


def label_names(cell: Sequence[Any]) -> list[str]:
    """Returns the names in a multilabel cell, each once; nulls in it name nothing."""
    return list(dict.fromkeys(label_name(value) for value in cell if value is not None))


def label_name(value: Any) -> str:
    """Returns the name of a label; 1 and 1.0 are one, as a file with nulls keeps integers as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number(value: Any, column: str) -> float:
    """Returns a label cell as a finite number.

    Raises:
        TableError: it is none.
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = float("nan")
    if not np.isfinite(result):
        raise TableError(f"the label column {column!r} holds {value!r}; a regression needs finite numbers")
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
