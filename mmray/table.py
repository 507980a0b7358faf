"""The row contract: what a scored table holds, and what each status and reason means.

n rows in = n rows out, in order. Every input column passes through untouched; the columns below are appended.
A row is `ok` (every modality the model knows was used), `degraded` (scored without one of them; `reason` says why) or
`failed` (no score; `reason` says why).
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import TableError, nearest

SCHEMA_VERSION = 1  # part of the plan hash: raised when the output columns change


class Status(StrEnum):
    """Whether a row was scored, and with all that the model knows."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a row is not `ok`: deterministic faults of its data; the weather only where that was asked for."""

    meaning: str
    remedy: str
    """What to do about it."""

    def __new__(cls, code: str, meaning: str, remedy: str) -> "Reason":
        """Makes a code with the sentences that explain it."""
        reason = str.__new__(cls, code)
        reason._value_, reason.meaning, reason.remedy = code, meaning, remedy
        return reason

    IMAGE_NULL = "IMAGE_NULL", "The image cell is null or empty.", "Fill it, where there is an image."
    MISSING = (
        "MISSING",
        "No file at the image path, or the server has none there.",
        "Look at --image-root and the path; `mmray plan` shows examples.",
    )
    NOT_ALLOWED = (
        "NOT_ALLOWED",
        "The image path or URL leads outside the allowed roots, may not be read, or is answered with a redirect.",
        "Allow its folder, or https://HOST, with --image-root.",
    )
    NOT_REGULAR = "NOT_REGULAR", "The image path is a directory, device, pipe or socket.", "Name a file."
    EMPTY_FILE = "EMPTY_FILE", "The image has no bytes.", "Copy it again."
    TOO_LARGE_BYTES = (
        "TOO_LARGE_BYTES",
        "The image has more bytes than `image.max_bytes`.",
        "Make it smaller, or train with a larger limit.",
    )
    TOO_MANY_PIXELS = (
        "TOO_MANY_PIXELS",
        "The image has more pixels than `image.max_pixels`, or a longer side than `max_side`.",
        "Make it smaller, or train with a larger limit.",
    )
    BAD_FORMAT = (
        "BAD_FORMAT",
        "The bytes are of no supported image format.",
        "Save it as JPEG, PNG, WEBP, GIF, BMP or TIFF; a page of HTML is what a failed download leaves.",
    )
    TRUNCATED = "TRUNCATED", "The image ends before its data does.", "Copy it again."
    DECODE_ERROR = "DECODE_ERROR", "The decoder refused the bytes.", "Save it again with another program."
    DECODE_CRASH = (
        "DECODE_CRASH",
        "Preparing the row kills the process that does it.",
        "Save the image again with another program, and do not trust its source.",
    )
    DECODE_TIMEOUT = (
        "DECODE_TIMEOUT",
        "Preparing the row does not come to an end.",
        "Save the image again with another program, and do not trust its source.",
    )
    DECODE_OOM = (
        "DECODE_OOM",
        "Preparing the row takes more memory than any image that is allowed can need.",
        "Save the image again with another program, and do not trust its source.",
    )
    UNAVAILABLE = (
        "UNAVAILABLE",
        "The image could not be read now, and `--on-unavailable record` says to go on without.",
        "Score it again when the store answers: `mmray tick --retry-failed` does.",
    )
    TEXT_NULL = "TEXT_NULL", "The text cell is null.", "Fill it, where there is a text."
    TEXT_EMPTY = (
        "TEXT_EMPTY",
        "The text holds no token: empty, or nothing but white space.",
        "Fill it, where there is a text.",
    )
    TEXT_INVALID = "TEXT_INVALID", "The text cell is not valid UTF-8.", "Write the column again as UTF-8."
    NONFINITE_OUTPUT = (
        "NONFINITE_OUTPUT",
        "The model gave NaN or infinity.",
        "Look at it with `mmray explain-row`; with --precision bf16, try fp32.",
    )
    MODEL_CRASH = (
        "MODEL_CRASH",
        "Running the model on the row kills the process that does it, or does not end.",
        "Look at the row's image and text; on another machine it may pass.",
    )


class Fault(NamedTuple):
    """Why one modality of one row cannot be used."""

    reason: Reason
    detail: str
    """At most 256 characters, escaped, without the row's own text or path."""


def fault(reason: Reason, detail: str) -> Fault:
    """Makes a `Fault` whose detail is safe to store and log."""
    return Fault(reason, detail.encode("unicode_escape").decode("ascii")[:256])


def output_fields(task: str, *, probabilities: bool, modalities: Sequence[str]) -> list[pa.Field]:
    """Returns the columns that scoring appends for a task (`binary`, `multiclass`, `multilabel`, `regression`)."""
    fields = [pa.field("score", pa.float64())]
    if task == "multilabel":
        fields.append(pa.field("predicted_label", pa.list_(pa.string())))
    elif task != "regression":
        fields.append(pa.field("predicted_label", pa.string()))
    if probabilities and task != "regression":
        fields.append(pa.field("probabilities", pa.list_(pa.float32())))
    if "image" in modalities and len(modalities) > 1:
        fields.append(pa.field("image_weight", pa.float32()))
    fields += [
        pa.field("modalities_used", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("reason_detail", pa.string()),
    ]
    return fields


def append_columns(table: pa.Table, more: pa.Table) -> pa.Table:
    """Returns a table with the columns of another one of as many rows appended."""
    for field in more.schema:
        table = table.append_column(field, more[field.name])
    return table


def require_columns(schema: pa.Schema, names: Sequence[str], where: str, remedy: str = "") -> None:
    """Refuses a table without the named columns, naming the nearest it has.

    Args:
        schema: of the table.
        names: columns that it must have.
        where: the table, for people.
        remedy: how to name other columns, for people.

    Raises:
        TableError: a column is missing.
    """
    for name in names:
        if name not in schema.names:
            hint = nearest(name, schema.names)
            there = ", ".join(schema.names) or "none"
            raise TableError(
                f"{where} has no column {name!r}{hint or '.'} It has: {there}" + (f"; {remedy}" if remedy else "")
            )


def cells(column: pa.ChunkedArray) -> list[Any]:
    """Returns a column's values as Python objects; bytes that are not UTF-8 become U+FFFD in strings.

    Parquet does not promise that a string column holds valid UTF-8, and one bad cell must not cost its neighbours.
    """
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return _replaced(column)


def _replaced(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_struct(kind):
        children = {field.name: cells(pc.struct_field(column, field.name)) for field in kind}
        rows = (dict(zip(children, row, strict=True)) for row in zip(*children.values(), strict=True))
        return [row if valid else None for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)]
    if pa.types.is_dictionary(kind):
        return _replaced(column.cast(kind.value_type))
    if pa.types.is_nested(kind):  # of lists only those that hold such a string are lost
        return [_or_replacement(cell) for chunk in column.chunks for cell in chunk]
    raw = column.cast(pa.large_binary()).to_pylist()
    return [None if cell is None else cell.decode("utf-8", "replace") for cell in raw]


def _or_replacement(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return "\ufffd"


def require_types(schema: pa.Schema, columns: Mapping[str, str], where: str) -> None:
    """Refuses a table whose columns (modality -> name) are of types that cannot hold their modality.

    Raises:
        TableError: a type is another.
    """
    for modality, name in columns.items():
        _require_type(schema, name, modality, where)


def _require_type(schema: pa.Schema, name: str, modality: str, where: str) -> None:
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    struct = pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}
    if strings or pa.types.is_null(kind) or (modality == "image" and (binary or struct)):
        return
    wanted = "paths, bytes or {bytes, path} structs" if modality == "image" else "strings"
    raise TableError(f"{where}: the {modality} column {name!r} is of type {kind}; it must hold {wanted}")


def refuse_collisions(schema: pa.Schema, fields: Sequence[pa.Field], where: str) -> None:
    """Refuses a table that already has a column which scoring would append.

    Raises:
        TableError: a name is taken.
    """
    taken = [field.name for field in fields if field.name in schema.names]
    if taken:
        raise TableError(
            f"{where} already has the columns {', '.join(taken)} that scoring adds; rename or drop them first"
        )
