"""The rows of an output that are not ok, by reason.

Reads a scored folder, finished or not -> gives counts and examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.score.scored import Batch, batches, files_of
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
    for batch in batches(output, files_of(output), [*OUTPUT_COLUMNS, *columns]):
        yield from _of_batch(batch, columns, reason)


def _of_batch(batch: Batch, columns: Sequence[str], reason: str | None) -> Iterator[Problem]:
    positions = range(batch.first_row, batch.first_row + batch.rows.num_rows)
    table = batch.rows.append_column("position", pa.array(positions))
    wanted = pc.not_equal(table["status"], Status.OK.value)
    if reason is not None:
        wanted = pc.and_kleene(wanted, pc.equal(table["reason"], reason))
    table = table.filter(wanted)
    values = {name: cells(table[name]) for name in table.schema.names}
    for k in range(table.num_rows):
        yield Problem(
            key=batch.key,
            row=values["position"][k],
            status=values["status"][k],
            reason=values["reason"][k],
            detail=values["reason_detail"][k] or "",
            cells={name: values[name][k] for name in columns},
        )
