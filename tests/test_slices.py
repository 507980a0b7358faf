"""Tables as slices: nothing is lost, nothing is read twice, and a broken table is refused in one message."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import EnvironmentFaultError, TableError
from mmray.slices import (
    MAX_SLICE_BYTES,
    Table,
    TableFile,
    cut,
    open_table,
    read_slice,
    slices_from_arrow,
    slices_to_arrow,
)
from mmray.store import open_store


def write(path: Path, rows: int, first: int = 0, row_group_size: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": np.arange(first, first + rows)}), path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(3):
        write(tmp_path / "rows" / f"part-{k}.parquet", rows=1000, first=1000 * k, row_group_size=300)
    write(tmp_path / "rows" / "_hidden" / "part-9.parquet", rows=5)
    write(tmp_path / "rows" / ".part-8.parquet", rows=5)
    return tmp_path / "rows"


@pytest.mark.parametrize("slice_rows", [1000, 999, 301, 300, 299, 150, 7])
def test_the_slices_of_a_table_are_its_rows_in_order(folder: Path, slice_rows: int) -> None:
    slices = cut(open_table(str(folder)), slice_rows)
    ids = [i for piece in slices for i in read_slice(piece)["id"].to_pylist()]
    assert ids == list(range(3000))
    assert max(piece.num_rows for piece in slices) <= slice_rows
    assert [piece.index for piece in slices] == list(range(len(slices)))


@given(
    groups=st.lists(
        st.lists(st.tuples(st.integers(0, 500), st.integers(0, 2**30)), max_size=5), min_size=1, max_size=4
    ),
    slice_rows=st.integers(1, 600),
)
@settings(deadline=None, max_examples=200)
def test_any_row_groups_are_covered_once_within_the_bounds(
    groups: list[list[tuple[int, int]]], slice_rows: int
) -> None:
    files = tuple(TableFile(f"/{k}", 1, "v", tuple(sizes)) for k, sizes in enumerate(groups))
    table = Table("/", "/", files, pa.schema([]))
    slices = cut(table, slice_rows)
    for file in files:
        mine = [piece for piece in slices if piece.uri == file.uri]
        ends = np.cumsum([0, *(piece.num_rows for piece in mine)])
        assert [piece.first_row for piece in mine] == ends[:-1].tolist()
        assert ends[-1] == file.num_rows
    assert all(0 < piece.num_rows <= slice_rows for piece in slices)


def test_a_row_group_with_large_cells_is_cut_by_bytes() -> None:
    table = Table("/", "/", (TableFile("/0", 1, "v", ((1000, 10 * MAX_SLICE_BYTES),)),), pa.schema([]))
    assert len(cut(table)) == 10


def test_the_same_table_is_always_cut_in_the_same_places(folder: Path) -> None:
    assert cut(open_table(str(folder))) == cut(open_table(f"{folder}/*.parquet")) == cut(open_table(f"file://{folder}"))


def test_a_single_file_and_a_glob_are_tables_too(folder: Path) -> None:
    assert open_table(str(folder / "part-1.parquet")).num_rows == 1000
    assert open_table(f"{folder}/part-[01].parquet").num_rows == 2000


def test_a_table_in_a_bucket_is_read_like_a_folder(folder: Path, s3: str) -> None:
    store = open_store(f"{s3}/rows")
    for path in folder.glob("*.parquet"):
        store.create(path.name, path.read_bytes())
    for uri in (f"{s3}/rows", f"{s3}/rows/*.parquet"):
        slices = cut(open_table(uri), 300)
        assert [i for piece in slices for i in read_slice(piece)["id"].to_pylist()] == list(range(3000))
    assert open_table(f"{s3}/rows/part-2.parquet").num_rows == 1000


def test_slices_travel_as_rows(folder: Path) -> None:
    slices = cut(open_table(str(folder)), 100)
    assert slices_from_arrow(slices_to_arrow(slices)) == slices


def test_columns_of_any_type_are_read_as_they_are(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nested": pa.array([[{"a": 1}], None], pa.list_(pa.struct([("a", pa.int8())]))),
            "zoned": pa.array([1, 2], pa.timestamp("us", "Europe/Zurich")),
            "money": pa.array([1, None], pa.decimal128(20, 3)),
            "kind": pa.array(["x", "x"]).dictionary_encode(),
            "long": pa.array(["a", None], pa.large_string()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (piece,) = cut(open_table(str(tmp_path / "t.parquet")))
    assert read_slice(piece).equals(table)


def test_all_unreadable_files_are_named_at_once(folder: Path) -> None:
    (folder / "part-0.parquet").write_bytes(b"PAR1")
    (folder / "part-1.parquet").write_bytes(b"")
    with pytest.raises(TableError) as caught:
        open_table(str(folder))
    assert "2 of 3 files are not readable parquet" in str(caught.value)
    assert "part-0.parquet" in str(caught.value)
    assert "part-1.parquet" in str(caught.value)


def test_a_missing_column_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(TableError, match=r"no column 'idd'; did you mean 'id'\?"):
        open_table(str(folder), ["idd"])


@pytest.mark.parametrize("where", ["nowhere", "nowhere/*.parquet", "rows/part-7.parquet"])
def test_a_missing_table_is_named(folder: Path, where: str) -> None:
    with pytest.raises(TableError, match="give a parquet file, a folder of them, or a glob"):
        open_table(str(folder.parent / where))


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "empty.parquet", rows=0)
    with pytest.raises(TableError, match="has no rows"):
        open_table(str(tmp_path / "empty.parquet"))


def test_a_file_that_changes_after_the_plan_is_not_read(folder: Path) -> None:
    piece = cut(open_table(str(folder)))[0]
    os.utime(folder / "part-0.parquet", ns=(1, 1))
    with pytest.raises(EnvironmentFaultError, match="changed while it was being read"):
        read_slice(piece)
    (folder / "part-0.parquet").unlink()
    with pytest.raises(EnvironmentFaultError, match="disappeared"):
        read_slice(piece)


def test_images_lie_beside_the_folder_that_was_given_however_deep_its_files_are(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "day=1" / "a.parquet", rows=3)
    write(tmp_path / "rows" / "day=2" / "hour=1" / "b.parquet", rows=4)
    folders = [f"{tmp_path}/rows", f"{tmp_path}/rows/**/*.parquet", f"{tmp_path}/rows/*/a.parquet"]
    assert [open_table(uri).folder for uri in folders] == [str(tmp_path / "rows")] * 3
    assert [open_table(uri).num_rows for uri in folders] == [7, 7, 3]
    assert open_table(f"{tmp_path}/rows/day=1/a.parquet").folder == str(tmp_path / "rows" / "day=1")


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "rows [1]" / "a.parquet", rows=3)
    assert open_table(str(tmp_path / "rows [1]")).num_rows == 3


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), tmp_path / "t.parquet")
    with pytest.raises(TableError, match="it has the column 'x' more than once"):
        open_table(str(tmp_path / "t.parquet"))


def test_a_slice_of_a_large_row_group_takes_the_memory_of_the_slice(tmp_path: Path) -> None:
    # Random bytes: what is stored is as large as what is read.
    cells = [np.random.default_rng(k).bytes(20_000) for k in range(4000)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet", row_group_size=4000)
    pieces = cut(open_table(str(tmp_path / "t.parquet")), 100)
    assert len(pieces) == 40
    before = pa.total_allocated_bytes()
    rows = read_slice(pieces[20])
    assert rows["image"].to_pylist() == cells[2000:2100]
    assert pa.total_allocated_bytes() - before < 4 * 100 * 20_000


def test_a_pipe_among_the_files_of_a_table_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.parquet", rows=3)
    os.mkfifo(tmp_path / "rows" / "b.parquet")
    with pytest.raises(
        TableError, match=r"1 of 2 files are not readable parquet:\n.*b\.parquet.* device, pipe or socket"
    ):
        open_table(str(tmp_path / "rows"))
