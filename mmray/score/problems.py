"""The rows of an output that are not ok, by reason.

Reads a scored folder, finished or not -> gives counts and examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.errors import TableError
from mmray.score.commit import Output
from mmray.table import Status, cells

OUTPUT_COLUMNS = ("status", "reason", "reason_detail")


@dataclass(frozen=True)
class Problem:
    """One row that is not ok."""

    key: str
    """The output file."""
    row: int
    """Its position in that file."""
    status: str
    reason: str
    detail: str
    cells: dict[str, Any]
    """The row's cells of the columns asked for."""


def problems(output: str, columns: Sequence[str] = (), reason: str | None = None) -> Iterator[Problem]:
    """Yields the rows that are not ok, file by file; memory is bounded by one row group.

    Raises:
        TableError: there is no scored output, or it lacks a column.
    """
    store = Output(output).store
    keys = [key for key in store.list("data") if key.endswith(".parquet")]
    if not keys:
        raise TableError(f"no scored rows in {output!r}; give the output folder of mmray score")
    for key in keys:
        with store.open(key) as source, pq.ParquetFile(source) as file:
            start = 0
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise TableError(f"{output} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[*OUTPUT_COLUMNS, *columns], use_threads=False):
                yield from _of_batch(key, start, batch, columns, reason)
                start += batch.num_rows


def _of_batch(
    key: str, start: int, batch: pa.RecordBatch, columns: Sequence[str], reason: str | None
) -> Iterator[Problem]:
    table = pa.Table.from_batches([batch]).append_column("position", pa.array(range(start, start + batch.num_rows)))
    wanted = pc.not_equal(table["status"], Status.OK.value)
    if reason is not None:
        wanted = pc.and_kleene(wanted, pc.equal(table["reason"], reason))
    table = table.filter(wanted)
    values = {name: cells(table[name]) for name in table.schema.names}
    for k in range(table.num_rows):
        yield Problem(
            key=key,
            row=values["position"][k],
            status=values["status"][k],
            reason=values["reason"][k],
            detail=values["reason_detail"][k] or "",
            cells={name: values[name][k] for name in columns},
        )
