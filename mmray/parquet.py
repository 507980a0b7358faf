"""A table as the bytes of one parquet file, and back."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    """Returns a table as a parquet file, with options of `pyarrow.parquet.write_table`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def from_parquet(data: bytes) -> pa.Table:
    """Returns the table of a parquet file.

    In this thread alone: another may let go of the bytes last, and where Python has ended by then, it is aborted.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
