"""Which task a label column asks for, where the configuration leaves it open (`task.kind = "auto"`)."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from mmray.config import AutoTaskConfig, BinaryConfig, Config, MulticlassConfig, MultilabelConfig, RegressionConfig
from mmray.errors import ConfigError
from mmray.labels import is_label
from mmray.slices import Table, cut, read_slice

SAMPLE_ROWS = 10_000  # labelled rows that are looked at
MAX_NUMBERS = 50  # different whole numbers that still are names of classes


def with_task(config: Config, table: Table) -> Config:
    """Returns the configuration with the task that the first labels of a table ask for, if it is open.

    Lists are multilabel; numbers with fractions, and whole ones of more than 50 kinds, a regression; the rest
    multiclass, until `with_two_labels`.
    """
    if not isinstance(config.task, AutoTaskConfig):
        return config
    kind = table.schema.field(config.table.label_column).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return config.model_copy(update={"task": MultilabelConfig()})
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    measured = numbers and _is_measured(set(_labels(table, config.table.label_column)))
    return config.model_copy(update={"task": RegressionConfig() if measured else MulticlassConfig()})


def with_two_labels(settled: Config, given: Config, labels: Mapping[str, int]) -> Config:
    """Returns the settled configuration as binary where the given one left that open, and there are two labels."""
    if isinstance(given.task, AutoTaskConfig) and settled.task.kind == "multiclass" and len(labels) == 2:
        return settled.model_copy(update={"task": BinaryConfig()})
    return settled


def refuse_names_of_rows(config: Config, labels: Mapping[str, int], rows: int) -> None:
    """Refuses classes of fewer than two rows each: those are numbers, or names of rows.

    Raises:
        ConfigError: so it is with the label column.
    """
    if config.task.kind == "multiclass" and len(labels) > max(rows // 2, MAX_NUMBERS):
        raise ConfigError(
            f"the label column {config.table.label_column!r} holds {len(labels):,} different labels in {rows:,} rows, "
            "too many to learn any; for numbers set task.kind = 'regression', else name the right column with "
            "table.label_column"
        )


def _is_measured(values: set[Any]) -> bool:
    return len(values) > MAX_NUMBERS or any(value != int(value) for value in values)


def _labels(table: Table, column: str) -> Iterator[Any]:
    seen = 0
    for piece in cut(table):
        for value in read_slice(piece, [column])[column].to_pylist():
            if is_label(value, "multiclass"):
                yield value
                seen += 1
            if seen == SAMPLE_ROWS:
                return
