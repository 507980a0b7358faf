"""A table of any size as slices of work: row ranges of its files, each read on its own.

Reads a parquet file, folder or glob (path or URI) -> gives its files, its schema and its slices. Everything is a pure
function of the files' footers, so the same table is always cut in the same places.
"""

import fnmatch
import json
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import EnvironmentFaultError, TableError
from mmray.store import Entry, Store, open_parent, open_store, split_uri
from mmray.table import require_columns
from mmray.url import UrlRoot, is_url

MIN_SLICE_ROWS = 256  # a second of work: less would be spent on scheduling
MAX_SLICE_ROWS = 131_072  # minutes of work: more would be lost with a worker
MAX_SLICE_BYTES = 128 * 2**20  # uncompressed; a worker holds one slice in memory, twice while it writes
SLICES_PER_TABLE = 64  # enough for the last worker not to keep the others waiting
BATCH_ROWS = 1024  # decoded at once: a slice of a large row group must not take the memory of the whole group


@dataclass(frozen=True)
class TableFile:
    """One parquet file, as its listing and its footer describe it."""

    uri: str
    size: int
    """Bytes."""
    version: str
    """Changes when the content does."""
    row_groups: tuple[tuple[int, int], ...]
    """Rows and uncompressed bytes of each row group."""

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)


@dataclass(frozen=True, slots=True)
class Slice:
    """A row range of one file: the unit of work, of retry and of commit."""

    index: int
    uri: str
    version: str
    first_row: int
    num_rows: int


SPARE = Slice(-1, "", "", 0, 0)
"""No slice, but what is left to do where all are handed out: to help with one that takes too long."""


@dataclass(frozen=True)
class Table:
    """All files of a table, in sorted order."""

    uri: str
    folder: str
    """What relative image paths resolve against by default: the folder given, that of the file, or that before the
    first sign of a glob."""
    files: tuple[TableFile, ...]
    schema: pa.Schema
    """Schema of the first file."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def image_roots(self, given: Sequence[str]) -> tuple[str, ...]:
        """Returns where images may lie: the folders given, absolute since workers may run elsewhere, or the table's."""
        return tuple(UrlRoot(r).uri if is_url(r) else open_store(r).uri for r in given) or (self.folder,)


def open_table(
    uri: str,
    columns: Sequence[str] = (),
    check: Callable[[pa.Schema, str], None] = lambda schema, where: None,
    only: Collection[str] | None = None,
    remedy: str = "",
) -> Table:
    """Lists a table's files and reads every footer.

    Args:
        uri: a parquet file, a folder of them, or a glob.
        columns: columns that every file must have.
        check: called with each file's schema and name, to raise where it will not do.
        only: URIs of the files that count, as `list_files` gives them; all by default.
        remedy: how to name other columns, for people.

    Raises:
        TableError: no such table, no rows, unreadable files (all are named), a missing column or one that is there
            twice.
    """
    store, found = _find(uri)
    if only is not None:
        found = {key: entry for key, entry in found.items() if store.child(key) in only}
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(lambda item: _read_footer(store, *item), found.items()))
    broken = [footer for footer in footers if isinstance(footer, str)]
    if broken:
        listed = "\n  ".join(broken)
        raise TableError(
            f"{len(broken)} of {len(found)} files are not readable parquet:\n  {listed}"
            + _as_parquet(map(store.child, found))
        )
    good = [footer for footer in footers if not isinstance(footer, str)]
    for file, schema in good:
        require_columns(schema, columns, file.uri, remedy)
        check(schema, file.uri)
    if only is None and not sum(file.num_rows for file, _ in good):
        raise TableError(f"the table {uri!r} has no rows; give one with at least one")
    return Table(uri, store.uri, tuple(file for file, _ in good), good[0][1])


def list_files(uri: str) -> dict[str, Entry]:
    """Returns a table's files by URI, in order, without opening any.

    Raises:
        TableError: no such table.
    """
    store, found = _find(uri)
    return {store.child(key): entry for key, entry in found.items()}


def cut(table: Table, slice_rows: int | None = None) -> list[Slice]:
    """Cuts a table into slices of at most `slice_rows` rows (by default a 64th of the table, within bounds).

    Row groups are kept whole where they fit, and cut evenly where they do not.
    """
    if slice_rows is None:
        slice_rows = min(max(table.num_rows // SLICES_PER_TABLE, MIN_SLICE_ROWS), MAX_SLICE_ROWS)
    ranges = (
        (file, first, rows)
        for file in table.files
        for first, rows in _ranges(file.row_groups, slice_rows, MAX_SLICE_BYTES)
    )
    return [Slice(k, file.uri, file.version, first, rows) for k, (file, first, rows) in enumerate(ranges)]


def read_slice(piece: Slice, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the rows of one slice, every column with its own type.

    Raises:
        EnvironmentFaultError: the file changed since the slice was planned, or cannot be read.
    """
    store, name = open_parent(piece.uri)
    entry = store.stat(name)
    if entry is None or entry.version != piece.version:
        state = "changed" if entry else "disappeared"
        raise EnvironmentFaultError(
            f"the input {piece.uri} {state} while it was being read; restore it, or start again in a new output"
        )
    try:
        with store.open(name) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            return _read_range(file, piece, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise EnvironmentFaultError(
            f"cannot read rows {piece.first_row} to {piece.first_row + piece.num_rows - 1} of {piece.uri}: {error}; "
            "the file is damaged or the store fails: copy it again, or run again"
        ) from error


def slices_to_arrow(slices: Sequence[Slice]) -> pa.Table:
    """Returns slices as rows: what Ray Data schedules and `plan-*.parquet` keeps."""
    return pa.table({field.name: [getattr(piece, field.name) for piece in slices] for field in fields(Slice)})


def slices_from_arrow(rows: pa.Table) -> list[Slice]:
    """Reads what `slices_to_arrow` wrote."""
    return [Slice(**row) for row in rows.to_pylist()]


def _read_range(file: pq.ParquetFile, piece: Slice, columns: Sequence[str] | None) -> pa.Table:
    groups, start, first = [], 0, None
    for k in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(k).num_rows
        if start < piece.first_row + piece.num_rows and end > piece.first_row:
            groups.append(k)
            first = start if first is None else first
        start = end
    assert first is not None, "a slice lies within its file"
    batch_rows = min(piece.num_rows, BATCH_ROWS)
    batches = file.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)
    kept, position, end = [], first, piece.first_row + piece.num_rows
    for batch in batches:
        start, position = position, position + batch.num_rows
        if position > piece.first_row:
            skip = max(piece.first_row - start, 0)
            kept.append(batch.slice(skip, min(position, end) - start - skip))
        if position >= end:
            break
    found = sum(batch.num_rows for batch in kept)
    if found != piece.num_rows:
        raise OSError(f"there are {found} and not {piece.num_rows}, as its footer says")
    return pa.Table.from_batches(kept)


def _ranges(groups: Sequence[tuple[int, int]], max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    first = rows = size = 0
    for group_rows, group_bytes in groups:
        if rows and (rows + group_rows > max_rows or size + group_bytes > max_bytes):
            yield first, rows
            first, rows, size = first + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
        pieces = max(-(-rows // max_rows), -(-size // max_bytes))
        if pieces > 1:  # one row group larger than a slice
            pieces = min(pieces, rows)
            for k in range(pieces):
                start = rows * k // pieces
                yield first + start, rows * (k + 1) // pieces - start
            first, rows, size = first + rows, 0, 0
    if rows:
        yield first, rows


def _as_parquet(uris: Iterable[str]) -> str:
    """Returns how to make parquet of a CSV file, where there is one on this machine."""
    name = next((uri for uri in uris if uri.lower().endswith((".csv", ".tsv")) and "://" not in uri), None)
    if name is None:
        return ""
    how = ', sep="\\t"' if name.lower().endswith("tsv") else ""
    csv, parquet = (json.dumps(path, ensure_ascii=False) for path in (name, f"{name[:-4]}.parquet"))
    code = f"import pandas; pandas.read_csv({csv}{how}).to_parquet({parquet})"
    return f"\nmake it parquet: python -c {shlex.quote(code)}"


def _find(uri: str) -> tuple[Store, dict[str, Entry]]:
    """Returns the folder that a table lies in, and its files by their names beneath it."""
    scheme, path = split_uri(uri)
    if any(char in path for char in "*?[") and not (scheme == "file" and os.path.exists(path)):
        store, pattern = _split_glob(uri if scheme != "file" else os.path.abspath(path))
        keys = {k: e for k, e in store.list().items() if _matches(k, pattern) and not _hidden(k)}
    else:
        parent, name = open_parent(uri)
        entry = parent.stat(name)
        is_file = entry is not None and not (scheme == "file" and os.path.isdir(path))
        if is_file and entry is not None:
            return parent, {name: entry}
        store = open_store(uri)
        keys = {k: e for k, e in store.list().items() if k.endswith(".parquet") and not _hidden(k)}
    if not keys:
        what = "no parquet files in" if scheme != "file" or os.path.isdir(path) else "no such table:"
        raise TableError(f"{what} {uri!r}; give a parquet file, a folder of them, or a glob such as 'rows/*.parquet'")
    return store, keys


def _split_glob(uri: str) -> tuple[Store, str]:
    parts = uri.split("/")
    fixed = next(k for k, part in enumerate(parts) if any(char in part for char in "*?["))
    return open_store("/".join(parts[:fixed]) or "/"), "/".join(parts[fixed:])


def _matches(key: str, pattern: str) -> bool:
    return _match_parts(key.split("/"), pattern.split("/"))


def _match_parts(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":  # any number of folders, also none
        return any(_match_parts(parts[k:], patterns[1:]) for k in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _match_parts(parts[1:], patterns[1:])


def _hidden(key: str) -> bool:
    # Names that start with `_` or `.` are not data, by the convention of Spark, Hive and pyarrow.
    return any(part.startswith(("_", ".")) for part in key.split("/"))


def _read_footer(store: Store, key: str, entry: Entry) -> tuple[TableFile, pa.Schema] | str:
    try:
        with store.open(key) as source, pq.ParquetFile(source) as file:
            meta = file.metadata
            groups = [meta.row_group(k) for k in range(meta.num_row_groups)]
            sizes = tuple((group.num_rows, group.total_byte_size) for group in groups)
            if meta.num_rows != sum(rows for rows, _ in sizes):
                return f"{store.child(key)}: its footer counts {meta.num_rows} rows and another number in row groups"
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                return f"{store.child(key)}: it has the column {twice[0]!r} more than once"
            return TableFile(store.child(key), entry.size, entry.version, sizes), file.schema_arrow
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # of a name in its schema
        return f"{store.child(key)}: {str(error).splitlines()[0]}"
