"""What is published as a Delta table: a version has exactly the files of a list, whoever registers at the same time."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from models import colour_table, saved_bundle, score_in_process

from mmray.cli import main
from mmray.errors import ConfigError, OutputConflictError, TableError
from mmray.options import ScoreConfig
from mmray.schedule.delta import register
from mmray.schedule.published import Part, Published, hold_published, keep_last, pointer, read_published
from mmray.score.commit import Output
from mmray.score.ledger import Ledger
from mmray.score.plan import make_plan
from mmray.store import LocalStore, open_store


def publish(root: str, number: int, parts: Sequence[Part]) -> None:
    """Publishes files that are there already, as the end of a tick does."""
    now = f"2026-01-01T00:00:{number % 60:02d}+00:00"
    assert open_store(root).create(pointer(number), Published(number, {}, "table", now, {}, tuple(parts)).to_parquet())


def write(root: str, run: str, columns: pa.Table, name: str = "a") -> Part:
    """A file of any columns, where a run would leave one."""
    key, data = f"runs/{run}/data/{name}.parquet", pa.BufferOutputStream()
    pq.write_table(columns, data)
    assert open_store(root).create(key, data.getvalue().to_pybytes())
    return Part(name, 0, columns.num_rows, key, len(data.getvalue()), Ledger(rows=columns.num_rows))


def number(k: int) -> pa.Table:
    return pa.table({"number": [k]})


def rows_of(table: pa.Table) -> list[Any]:
    # Delta has no order of files; a row is the same row with a column of nulls more.
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    return sorted(rows, key=str)


def delta_rows(root: str) -> list[Any]:
    return rows_of(DeltaTable(root).to_pyarrow_table())


def published_rows(root: str) -> list[Any]:
    return sorted((row for uri in read_published(root).files(root) for row in rows_of(pq.read_table(uri))), key=str)


def log(root: str) -> list[list[dict[str, Any]]]:
    """The actions of each version."""
    files = sorted(Path(root, "_delta_log").glob("*.json"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def paths(actions: Sequence[dict[str, Any]], kind: str) -> set[str]:
    return {action[kind]["path"] for action in actions if kind in action}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Part]]:
    """A root with a run of two files, of which one has a column more, and its parts."""
    folder = tmp_path_factory.mktemp("scored")
    rows, root = colour_table(folder / "rows", rows=24), str(folder / "root")
    late = pq.read_table(rows / "part-1.parquet")
    pq.write_table(late.append_column("price", pa.array([0.5] * late.num_rows)), rows / "part-1.parquet")
    bundle = saved_bundle(folder / "bundle", rows)
    options, run = ScoreConfig(precision="fp32", slice_rows=5, image_roots=(str(rows),)), "runs/000000001-0000aaaa"
    score_in_process(bundle, str(rows), f"{root}/{run}", options)
    plan, output = make_plan(bundle, str(rows), options), Output(f"{root}/{run}")
    receipts = ((piece, output.receipt(plan.hash, piece)) for piece in plan.slices)
    return root, [Part(p.uri, p.first_row, p.num_rows, f"{run}/{r.key}", r.size, r.ledger) for p, r in receipts]


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def test_each_version_has_exactly_the_published_files(scored: tuple[str, list[Part]], root: str) -> None:
    shutil.copytree(scored[0], root)
    first, second = scored[1][:3], scored[1][2:]
    publish(root, 1, first)
    assert register(root).lines() == ["registered: version 0 of the Delta table is number 1, 3 files added, 0 removed"]
    assert delta_rows(root) == published_rows(root)
    assert register(root).lines() == ["nothing new: version 0 of the Delta table is number 1"]
    assert len(log(root)) == 1
    publish(root, 2, first)
    publish(root, 3, second)
    again = register(root)
    assert (again.number, again.added, again.removed, again.skipped) == (3, len(second) - 1, 2, 1)
    assert register(root).outcome == "nothing new"
    assert delta_rows(root) == published_rows(root)
    assert DeltaTable(root, version=0).to_pyarrow_table().num_rows == sum(part.rows for part in first)
    last = log(root)[again.version]
    assert paths(last, "add") == {part.key for part in second[1:]}, "what stays is not added again"
    assert paths(last, "remove") == {part.key for part in first[:2]}
    assert [action["txn"]["version"] for action in last if "txn" in action] == [3]
    counts = [json.loads(action["add"]["stats"])["numRecords"] for action in last if "add" in action]
    assert counts == [part.rows for part in second[1:]]
    assert pq.read_schema(Path(root, second[-1].key)).field("status").nullable is False
    assert all(field.nullable for field in DeltaTable(root).schema().fields)


NOON = pa.array([1000], pa.timestamp("us"))  # without a zone: a table has to announce that it has such a column


def test_columns_may_come(root: str) -> None:
    numbered = pa.field("id", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "7"})
    schema = pa.schema([numbered, ("note", pa.null()), ("at", pa.string())])
    old = write(root, "000000001-a", pa.table({"id": [1], "note": pa.nulls(1), "at": ["noon"]}, schema))
    publish(root, 1, [old])
    register(root)
    wider = pa.table({"id": [2], "note": ["x"], "seen": NOON, "tags": pa.array(["t"]).dictionary_encode()})
    publish(root, 2, [old, write(root, "000000002-b", wider)])
    register(root)
    assert delta_rows(root) == published_rows(root)
    assert DeltaTable(root).to_pyarrow_table().column_names == ["id", "at", "note", "seen", "tags"]


def test_columns_may_become_others_where_every_file_is_new(root: str) -> None:
    for k, columns in enumerate([{"id": [1], "at": ["noon"]}, {"id": ["one"], "at": NOON}, {"at": NOON}], start=1):
        publish(root, k, [write(root, f"{k:09d}-a", pa.table(columns))])
        register(root)
        assert delta_rows(root) == published_rows(root)
        assert [field.name for field in DeltaTable(root).schema().fields] == list(columns)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"id": ["one"]}, "'id' is string in runs/2/data/b.parquet and 'id': long in other files"),
        ({"ID": [1]}, "'ID' is int64 in runs/2/data/b.parquet and 'id': long in other files"),
        ({"x": pa.array([200], pa.uint8())}, "no type for the column 'x', uint8 in runs/2"),
        ({"x": pa.array([[{"y": 1}]], pa.list_(pa.struct([("y", pa.timestamp("ns"))])))}, "no type for the column 'x'"),
        ({"x": pa.array([1], pa.time64("us"))}, "no type for the column 'x', time64"),
    ],
)
def test_a_column_that_delta_cannot_say_is_named_and_the_table_stays(
    root: str, column: dict[str, Any], message: str
) -> None:
    old = write(root, "1", pa.table({"id": [1]}))
    publish(root, 1, [old])
    register(root)
    publish(root, 2, [old, write(root, "2", pa.table(column), "b")])
    with pytest.raises(TableError) as caught:
        register(root)
    assert message in str(caught.value)
    assert delta_rows(root) == [{"id": 1}]


def test_of_many_at_once_one_makes_the_table(root: str) -> None:
    publish(root, 1, [write(root, "000000001-a", number(1))])
    start = threading.Barrier(4)

    def at_once(_: int) -> str:
        start.wait()
        return register(root).outcome

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(at_once, range(4))) == ["nothing new"] * 3 + ["registered"]
    assert len(log(root)) == 1


class Meanwhile(LocalStore):
    """A root where something happens just before an object is touched for the first time."""

    def __init__(self, root: str, key: str, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._key, self._happens = key, [happens]

    def _touch(self, key: str) -> None:
        if key == self._key and self._happens:
            self._happens.pop()()

    def create(self, key: str, data: bytes) -> bool:
        self._touch(key)
        return super().create(key, data)

    def read(self, key: str) -> bytes:
        self._touch(key)
        return super().read(key)

    def delete(self, key: str) -> None:
        self._touch(key)
        super().delete(key)


def test_who_is_overtaken_does_not_put_the_table_back(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is removed: the commits of the two do not conflict by their files.
    parts = [write(root, f"{k:09d}-a", number(k)) for k in (1, 2, 3)]
    for k in (1, 2):
        publish(root, k, parts[:k])
        if k == 1:
            register(root)

    def overtake() -> None:
        monkeypatch.undo()
        publish(root, 3, parts)
        assert register(root).outcome == "registered"

    slow = Meanwhile(root, pointer(2, "registered"), overtake)
    monkeypatch.setattr("mmray.schedule.delta.open_store", lambda _: slow)
    assert register(root).lines() == ["nothing new: version 1 of the Delta table is number 3"]
    assert [action["txn"]["version"] for version in log(root) for action in version if "txn" in action] == [1, 3]
    assert delta_rows(root) == published_rows(root)
    assert list(slow.list("registered")) == [pointer(3, "registered")]


def test_what_another_commits_meanwhile_does_not_stay(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [write(root, f"{k:09d}-a", number(k)) for k in (1, 2)]
    publish(root, 1, parts[:1])
    register(root)
    publish(root, 2, parts)
    slow = Meanwhile(root, pointer(2, "registered"), lambda: write_deltalake(root, number(99), mode="append"))
    monkeypatch.setattr("mmray.schedule.delta.open_store", lambda _: slow)
    assert (register(root).version, delta_rows(root)) == (2, published_rows(root))


@pytest.mark.parametrize("key", [pointer(1), pointer(1, "registered")])
def test_a_list_that_a_tick_removes_meanwhile_is_not_held(root: str, key: str) -> None:
    def tick() -> None:
        publish(root, 2, [write(root, "000000002-a", number(2))])
        assert keep_last(open_store(root), 1) == 1

    publish(root, 1, [write(root, "000000001-a", number(1))])
    assert hold_published(Meanwhile(root, key, tick)).number == 2
    assert pointer(2, "registered") in open_store(root).list("registered")


def test_a_tick_spares_a_list_that_is_held_just_before_it_goes(root: str) -> None:
    for k in (1, 2):
        publish(root, k, [write(root, f"{k:09d}-a", number(k))])
    store = open_store(root)

    def hold() -> None:  # as one that had read the list before number 2 was published
        store.create(pointer(1, "registered"), store.read(pointer(1)))

    assert keep_last(Meanwhile(root, pointer(1), hold), 1) == 0
    assert store.stat(pointer(1)) is None
    assert {key.split("/")[1] for key in store.list("runs")} == {"000000001-a", "000000002-a"}


def test_what_the_table_stands_for_can_be_read_however_many_ticks_follow(root: str) -> None:
    store = open_store(root)
    publish(root, 1, [write(root, "000000001-a", number(1))])
    register(root)
    for k in (2, 3):
        publish(root, k, [write(root, f"{k:09d}-a", number(k))])
        assert keep_last(store, 1) == (0 if k == 2 else 1), "number 2 was never registered"
        assert delta_rows(root) == [{"number": 1}]
    register(root)
    assert keep_last(store, 1) == 1
    assert delta_rows(root) == [{"number": 3}]
    assert {key.split("/")[1] for key in store.list("runs")} == {"000000003-a"}
    with pytest.raises(FileNotFoundError):
        DeltaTable(root, version=0).to_pyarrow_table()


def test_a_vacuum_takes_nothing_that_is_published(root: str) -> None:
    for k in (1, 2, 3):
        publish(root, k, [write(root, f"{k:09d}-a", number(k))])
        if k < 3:
            register(root)
    before = open_store(root).list()
    for key in before:
        os.utime(Path(root, key), (1.7e9, 1.7e9))
    assert DeltaTable(root).vacuum(dry_run=False, full=True) == []
    assert open_store(root).list().keys() >= before.keys()


def test_it_works_in_a_bucket_without_more_settings(s3: str) -> None:
    root = f"{s3}/a #1?/root"
    old = write(root, "000000001-a", number(1))
    publish(root, 1, [old])
    register(root)
    publish(root, 2, [old, write(root, "000000002-a", number(2))])
    assert register(root).version == 1
    assert register(root).outcome == "nothing new"
    quoted = root.replace("#", "%23").replace("?", "%3F")
    assert delta_rows(quoted) == [{"number": 1}, {"number": 2}]
    assert list(open_store(root).list("registered")) == ["registered/000000002.parquet"]


def test_a_root_may_have_any_name_but_one_that_deltalake_would_not_find(tmp_path: Path) -> None:
    root = str(tmp_path / "50% #1?")
    publish(root, 1, [write(root, "000000001-a", number(1))])
    register(root)
    assert delta_rows(root) == [{"number": 1}]
    for name in ("a%20b", "a\\b"):
        publish(str(tmp_path / name), 1, [write(str(tmp_path / name), "000000001-a", number(1))])
        with pytest.raises(ConfigError, match="give the folder another name"):
            register(str(tmp_path / name))
        assert not (tmp_path / name / "_delta_log").exists()


def test_another_delta_table_is_left_alone(root: str) -> None:
    write_deltalake(root, number(7))
    publish(root, 2, [write(root, "000000002-a", number(2))])
    with pytest.raises(OutputConflictError, match="_delta_log is not of what is published here"):
        register(root)
    assert delta_rows(root) == [{"number": 7}]
    shutil.rmtree(Path(root, "_delta_log"))
    register(root)
    Path(root, "published", "000000002.parquet").unlink()
    publish(root, 1, [write(root, "000000001-a", number(1))])
    with pytest.raises(OutputConflictError, match="_delta_log is not of what is published here"):
        register(root)


def test_the_command_says_what_it_did_or_what_is_missing(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", root]) == 2
    assert "nothing is published" in capsys.readouterr().err
    publish(root, 1, [write(root, "000000001-a", number(1))])
    assert main(["register", root]) == 0
    assert "version 0 of the Delta table is number 1, 1 files added" in capsys.readouterr().out
    lost = write(root, "000000002-a", number(2))
    publish(root, 2, [lost])
    Path(root, lost.key).unlink()
    assert main(["register", root]) == 5
    assert lost.key in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "mmray.schedule.delta")
    monkeypatch.setitem(sys.modules, "deltalake", None)  # as where it is not installed
    assert main(["register", root]) == 2
    assert "pip install 'mmray[delta]'" in capsys.readouterr().err
