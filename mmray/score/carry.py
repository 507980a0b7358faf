"""Published scores of rows that did not change, so that a table rewritten every night is not scored from the start.

Reads the rows of a slice and files scored before by the same model with the same options -> gives the scored rows. A
row whose key, image cell and text are those of a row scored before takes over what that one got; the others are scored.
A path stands for its image: who writes another image under an old path scores the table in full.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.errors import EnvironmentFaultError, TableError
from mmray.slices import Slice
from mmray.source import bytes_or_path
from mmray.store import open_parent
from mmray.table import Reason, Status, append_columns, cells, require_columns

if TYPE_CHECKING:  # the driver plans with it, and needs no model
    from mmray.predictor import Predictor

MAX_FILES = 4  # looked into for one slice, which bounds memory; keys in no order at all would lead to every file
THREADS = 16
Row = tuple[Any, ...]
Score = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class ScoredFile:
    """A file scored before, and what it holds."""

    uri: str
    input: str
    """URI of the file whose rows it holds."""
    first_row: int
    """Where in that file they begin."""
    least: Any = None
    """Bounds of its keys."""
    greatest: Any = None


@dataclass(frozen=True)
class Carry:
    """Where to look for rows that were scored before."""

    key: str
    """Column whose values tell which files a row may be in."""
    files: tuple[ScoredFile, ...]
    only_ok: bool
    """Leave rows out that are not ok."""

    @classmethod
    def of(cls, key: str, files: Iterable[ScoredFile], only_ok: bool) -> "Carry":
        """Reads the footers of files scored before; those without the key or its bounds are left out."""
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda file: _with_bounds(file, key), files)
            return cls(key, tuple(file for file in found if file is not None), only_ok)

    def score(self, piece: Slice, rows: pa.Table, predictor: "Predictor", score: Score) -> tuple[pa.Table, int]:
        """Returns the rows with the columns that scoring appends, as `Predictor.score` does, and how many were there.

        Args:
            piece: which slice it is.
            rows: its rows.
            predictor: names the columns.
            score: scores the rows that were not there, as `Predictor.score` does.

        Raises:
            TableError: the rows have no such key, or one that cannot tell them apart.
        """
        require_columns(rows.schema, [self.key], piece.uri)
        if pa.types.is_nested(rows.schema.field(self.key).type):
            raise TableError(f"{piece.uri}: the key {self.key!r} holds lists or structs; give a column of plain values")
        columns = [self.key, *(predictor.column(name) for name in predictor.modalities)]
        names = [field.name for field in predictor.fields]
        before = self._before(piece, rows[self.key], columns, names)
        index = {row: k for k, row in enumerate(_rows(before, columns))}
        places = [index.get(row) for row in _rows(rows, columns)]
        new = [k for k, place in enumerate(places) if place is None]
        scored = score(rows.take(pa.array(new, pa.int64()))).select(names)
        number = iter(range(before.num_rows, before.num_rows + len(new)))
        order = [next(number) if place is None else place for place in places]
        both = pa.concat_tables([before.select(names).cast(scored.schema), scored]).take(pa.array(order, pa.int64()))
        return append_columns(rows, both), rows.num_rows - len(new)

    def _before(self, piece: Slice, keys: pa.ChunkedArray, columns: Sequence[str], names: Sequence[str]) -> pa.Table:
        """Returns the rows of the files that most likely hold some keys: first those of the same file and place."""
        bounds = pc.min_max(keys.cast(getattr(keys.type, "value_type", keys.type))).as_py()
        near = [file for file in self.files if _overlap(file, bounds["min"], bounds["max"])]
        near.sort(key=lambda file: (file.input != piece.uri, abs(file.first_row - piece.first_row)))
        tables = [_read(file.uri, [*columns, *names]) for file in near[:MAX_FILES]]
        if not tables:
            return pa.table({name: pa.nulls(0) for name in [*columns, *names]})
        table = pa.concat_tables(tables, promote_options="permissive")
        if self.only_ok:
            return table.filter(pc.equal(table["status"], Status.OK.value))
        return table.filter(pc.fill_null(pc.not_equal(table["reason"], Reason.UNAVAILABLE.value), True))


def _with_bounds(file: ScoredFile, key: str) -> ScoredFile | None:
    store, name = open_parent(file.uri)
    with store.open(name) as source, pq.ParquetFile(source, page_checksum_verification=True) as parquet:
        meta = parquet.metadata
        found = [
            column.statistics
            for k in range(meta.num_row_groups)
            for column in map(meta.row_group(k).column, range(meta.num_columns))
            if column.path_in_schema == key
        ]
    if not found or not all(statistics and statistics.has_min_max for statistics in found):
        return None
    return replace(file, least=min(s.min for s in found), greatest=max(s.max for s in found))


def _overlap(file: ScoredFile, least: Any, greatest: Any) -> bool:
    try:
        return bool(file.least <= greatest and least <= file.greatest)
    except TypeError:  # no key at all, or keys of another type than before
        return False


def _read(uri: str, columns: Sequence[str]) -> pa.Table:
    store, name = open_parent(uri)
    try:
        with store.open(name) as source:
            return pq.read_table(source, columns=list(columns), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise EnvironmentFaultError(f"cannot read {uri}, which was scored before: {error}") from error


def _rows(table: pa.Table, columns: Sequence[str]) -> Iterator[Row]:
    return zip(*(map(bytes_or_path, cells(table[name])) for name in columns), strict=True)
