"""Tables as the bytes of a file: what is read is what was written, and reading it ends with the process."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from mmray.parquet import from_parquet, to_parquet

TABLE = pa.table({f"column {k}": list(range(1000)) for k in range(8)}).replace_schema_metadata({"why": "a test"})


def test_what_is_read_is_what_was_written() -> None:
    read = from_parquet(to_parquet(TABLE, compression="zstd"))
    assert read.equals(TABLE)
    assert read.schema.metadata == TABLE.schema.metadata


def test_a_process_that_ends_right_after_reading_ends_well(tmp_path: Path) -> None:
    # `pyarrow.parquet.read_table` aborts it in half of the tries.
    (tmp_path / "table").write_bytes(to_parquet(TABLE))
    code = "import sys, mmray.parquet as p\nfor _ in range(5): p.from_parquet(open(sys.argv[1], 'rb').read())"
    command = [sys.executable, "-c", code, str(tmp_path / "table")]
    assert [subprocess.run(command, stderr=subprocess.DEVNULL).returncode for _ in range(6)] == [0] * 6
