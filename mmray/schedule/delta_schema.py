"""The columns of scored files as a Delta log describes them, all nullable: part of the files may lack one.

Delta has no type for some that parquet has, and no file is rewritten, so such a column is refused by name.
"""

import json
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import Field, Schema

from mmray.errors import TableError
from mmray.schedule.published import Part
from mmray.store import Store

Columns = dict[str, dict[str, Any]]
"""Name in lower case, as Delta compares names -> the column in the log's own terms."""


def columns_of(schema: Schema) -> Columns:
    """Returns the columns of a table."""
    found = json.loads(schema.to_json(), object_hook=_nullable)["fields"]
    return {column["name"].lower(): column for column in found}


def schema_of(columns: Columns) -> Schema:
    """Returns columns as a schema."""
    return Schema(fields(columns))


def fields(columns: Columns, without: Container[str] = ()) -> list[Field]:
    """Returns columns, or those that another table lacks, one by one."""
    return [Field.from_json(json.dumps(column)) for name, column in columns.items() if name not in without]


def widened(columns: Columns, store: Store, parts: Iterable[Part]) -> Columns:
    """Returns columns with those of scored files after them.

    Raises:
        TableError: a column has two types, or one that Delta has not.
    """
    keys = list({(part.run, part.input): part.key for part in parts}.values())  # one each: the others have the same
    with ThreadPoolExecutor(16) as pool:
        schemas = list(pool.map(lambda key: _read_schema(store, key), keys))
    columns = dict(columns)
    for key, schema in zip(keys, schemas, strict=True):
        for field in schema:
            if pa.types.is_null(field.type):  # no type yet: another file may have one
                continue
            column = _column(field, key)
            other = columns.setdefault(field.name.lower(), column)
            if other != column:
                raise TableError(
                    f"the column {field.name!r} is {field.type} in {key} and {_short(other)} in other files; give it "
                    "one type in all files of the input, then run `mmray tick --full`"
                )
    return columns


def _read_schema(store: Store, key: str) -> pa.Schema:
    with store.open(key) as source:
        return pq.read_schema(source)


def _column(field: pa.Field, key: str) -> dict[str, Any]:
    try:
        if any(_is_taken_for_another(kind) for kind in _leaves(field.type)):
            raise TypeError("deltalake takes it for a type with other values")
        text = Field.from_arrow(field).to_json()
    except Exception as error:  # deltalake raises no other class here
        raise TableError(
            f"Delta has no type for the column {field.name!r}, {field.type} in {key}; give it one in the input (signed "
            "integers; timestamps in microseconds, in UTC or without a zone), then run `mmray tick`"
        ) from error
    column: dict[str, Any] = json.loads(text, object_hook=_nullable)
    return column


def _is_taken_for_another(kind: pa.DataType) -> bool:
    return bool(pa.types.is_unsigned_integer(kind) or (pa.types.is_timestamp(kind) and kind.unit == "ns"))


def _leaves(kind: pa.DataType) -> list[pa.DataType]:
    return [leaf for k in range(kind.num_fields) for leaf in _leaves(kind.field(k).type)] or [kind]


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    """Returns a part of a schema with nullable values, and without notes: those differ from file to file."""
    always = {"nullable": True, "containsNull": True, "valueContainsNull": True, "metadata": {}}
    return {key: always.get(key, value) for key, value in node.items()}


def _short(column: dict[str, Any]) -> str:
    kind = column["type"]
    return f"{column['name']!r}: {kind if isinstance(kind, str) else kind['type']}"
