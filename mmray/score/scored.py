"""The scored rows of an output, as a reader of it has them: some columns batch by batch, and what these add up to.

Reads `OUTPUT/data/*.parquet`, finished or not -> gives batches, counts by the values of a column, weights of the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmray.errors import TableError
from mmray.score.commit import Output
from mmray.table import cells, require_columns

MAX_GROUPS = 20  # of a column that are shown; the rows of rarer values are one more
MAX_NAME = 64  # characters of a value
OTHERS = "(other values)"
MAX_VALUES = 10_000  # of a column whose values group rows: beyond, it names them
SAMPLED_FILES = 64  # of which rows are looked at one by one: enough to see a distribution, few enough for any table


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file."""

    key: str
    """The file."""
    first_row: int
    rows: pa.Table


@dataclass
class Group:
    """Rows whose cell in some column is the same."""

    name: str
    statuses: dict[str, int] = field(default_factory=dict)
    """Status -> rows."""
    score_sum: float = 0.0
    scored: int = 0

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(self.statuses.values())

    @property
    def mean_score(self) -> float | None:
        """Of those that have one."""
        return self.score_sum / self.scored if self.scored else None


def files_of(output: str) -> list[str]:
    """Returns the scored files, in order of their slices.

    Raises:
        TableError: there are none.
    """
    keys = [key for key in Output(output).store.list("data") if key.endswith(".parquet")]
    if not keys:
        raise TableError(f"no scored rows in {output!r}; give the output folder of mmray score")
    return keys


def some_of(keys: Sequence[str]) -> list[str]:
    """Returns at most `SAMPLED_FILES` of some files, spread evenly."""
    places = np.unique(np.linspace(0, len(keys) - 1, SAMPLED_FILES).astype(int))
    return [keys[k] for k in places]


def batches(output: str, keys: Sequence[str], columns: Sequence[str]) -> Iterator[Batch]:
    """Yields columns of files; memory is bounded by one row group.

    Raises:
        TableError: a file lacks a column.
    """
    store = Output(output).store
    for key in keys:
        with store.open(key) as source, pq.ParquetFile(source) as file:
            require_columns(file.schema_arrow, columns, output)
            start = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns)), use_threads=False):
                yield Batch(key, start, pa.Table.from_batches([batch]))
                start += batch.num_rows


def grouped(output: str, column: str) -> list[Group]:
    """Returns the rows by their cell in a column, the largest group first.

    Raises:
        TableError: there is no such column, or its values do not make groups.
    """
    groups: dict[str, Group] = {}
    for batch in batches(output, files_of(output), [column, "status", "score"]):
        for name, status, rows, score_sum, scored in _counted(batch.rows, column):
            group = groups.setdefault(name, Group(name))
            group.statuses[status] = group.statuses.get(status, 0) + rows
            group.score_sum += score_sum or 0.0
            group.scored += scored
        if len(groups) > MAX_VALUES:
            raise TableError(f"the column {column!r} has more than {MAX_VALUES:,} values; group by one that has few")
    return sorted(groups.values(), key=lambda group: (-group.rows, group.name))


def group_name(cell: Any) -> str:
    """Returns the name of the group that a cell's row belongs to."""
    return "(null)" if cell is None else str(cell)[:MAX_NAME]


def _counted(rows: pa.Table, column: str) -> Iterator[tuple[str, str, int, float | None, int]]:
    cell = rows[column].combine_chunks()
    try:
        codes = cell if pa.types.is_dictionary(cell.type) else cell.dictionary_encode()
    except pa.ArrowException:
        raise TableError(f"the column {column!r} is of type {cell.type}, which makes no groups; take another") from None
    names = [group_name(value) for value in cells(codes.dictionary)]
    columns = {"code": codes.indices, "status": rows["status"], "score": rows["score"]}
    counts = [([], "count_all"), ("score", "sum"), ("score", "count")]
    found = pa.table(columns).group_by(["code", "status"]).aggregate(counts)
    values = (found[name].to_pylist() for name in ("code", "status", "count_all", "score_sum", "score_count"))
    for code, *rest in zip(*values, strict=True):
        yield group_name(None) if code is None else names[code], *rest


def image_weights(output: str) -> NDArray[np.float32]:
    """Returns the weight of the image in rows of some files; empty where the model has none."""
    keys, store = some_of(files_of(output)), Output(output).store
    with store.open(keys[0]) as source:
        if "image_weight" not in pq.read_schema(source).names:
            return np.zeros(0, np.float32)
    found = [batch.rows["image_weight"].drop_null().to_numpy() for batch in batches(output, keys, ["image_weight"])]
    return np.concatenate(found) if found else np.zeros(0, np.float32)
