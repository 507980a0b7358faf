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

    Raises:
        TableError: a label is unknown to the model, or not a finite number in a regression.
    """
    if task == "regression":
        return np.asarray([number(value, column) for value in values], np.float32)
    index = {label: k for k, label in enumerate(labels)}
    try:
        if task != "multilabel":
            return np.asarray([index[str(value)] for value in values], np.int64)
        targets = np.zeros((len(values), len(labels)), np.float32)
        for row, names in enumerate(values):
            targets[row, [index[str(name)] for name in names]] = 1
        return targets
    except KeyError as error:
        raise TableError(
            f"the label column {column!r} holds {error.args[0]!r}, which no training row has; "
            f"the model knows {_some(labels)}"
        ) from None


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
