"""Ticks of a schedule: only what is new is scored, what is published is always whole, and nobody gets in the way."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, one_scorer, saved_bundle

from mmray.errors import ErrorBudgetError, GateError, TableError
from mmray.histogram import stability_index
from mmray.options import ScoreConfig
from mmray.schedule.lease import lease
from mmray.schedule.published import read_published
from mmray.schedule.settings import ScheduleConfig
from mmray.schedule.tick import TickResult, tick
from mmray.score import job
from mmray.score.verify import verify_output
from mmray.store import open_store

QUICK = ScheduleConfig(lease_s=1.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=120, files=4)


@pytest.fixture(scope="module")
def bundles(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    return [saved_bundle(folder / str(seed), rows, seed) for seed in range(2)]


def some_files(rows: Path, folder: Path, *names: str) -> str:
    """A table of some of the files; its images stay where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy2(rows / name, folder / name)
    return str(folder)


class Schedule:
    """A table that grows, and what is published of it."""

    def __init__(self, rows: Path, folder: Path, bundle: str) -> None:
        self.rows, self.bundle = rows, bundle
        self.table, self.root = some_files(rows, folder / "table", "part-0.parquet"), str(folder / "root")

    def add(self, *names: str) -> None:
        some_files(self.rows, Path(self.table), *names)

    def tick(self, rules: ScheduleConfig = QUICK, **options: Any) -> TickResult:
        settings = ScoreConfig(image_roots=(str(self.rows),), num_actors=1, **options)
        return tick(self.bundle, self.table, self.root, settings, rules)

    def read(self) -> list[dict[str, Any]]:
        """What a reader finds, file by file in the order of the input."""
        files = read_published(self.root).files(self.root)
        found: list[dict[str, Any]] = pyarrow.dataset.dataset(files).to_table().to_pylist()
        return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tick starts processes: one of the tests has those."""
    monkeypatch.setattr(job, "_run", one_scorer)


@pytest.fixture
def schedule(rows: Path, bundles: list[str], tmp_path: Path) -> Schedule:
    return Schedule(rows, tmp_path, bundles[0])


def test_each_tick_scores_what_is_new_and_publishes_the_whole(
    quick: None, schedule: Schedule, bundles: list[str]
) -> None:
    first = schedule.tick()
    assert (first.outcome, first.new_rows) == ("published", 30)
    assert schedule.tick().outcome == "nothing new"
    schedule.add("part-1.parquet", "part-2.parquet")
    with lease(open_store(schedule.root), 1.0):
        assert schedule.tick().outcome == "another tick is at work"
    assert schedule.tick().new_rows == 60
    changed = pq.read_table(Path(schedule.table, "part-1.parquet")).slice(0, 20)
    pq.write_table(changed, Path(schedule.table, "part-1.parquet"))
    assert schedule.tick().new_rows == 20
    one = changed.set_column(2, "text", pa.array(["new", *changed["text"].to_pylist()[1:]]))
    pq.write_table(one, Path(schedule.table, "part-1.parquet"))
    assert schedule.tick(QUICK.model_copy(update={"key": "id"})).new_rows == 1, "the row that changed"
    Path(schedule.table, "part-0.parquet").unlink()
    gone = schedule.tick()
    assert (gone.outcome, gone.new_rows) == ("published", 0)
    incremental = schedule.read()
    assert [row["id"] for row in incremental] == [
        row["id"] for k in (1, 2) for row in pq.read_table(Path(schedule.table, f"part-{k}.parquet")).to_pylist()
    ]
    whole = Schedule(schedule.rows, Path(schedule.root).parent / "again", schedule.bundle)
    whole.table = schedule.table
    assert whole.tick().new_rows == 50
    for one, other in zip(incremental, whole.read(), strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
        assert one.pop("image_weight") == pytest.approx(other.pop("image_weight"), abs=1e-5)
        assert one == other
    schedule.bundle = bundles[1]
    assert schedule.tick().new_rows == 50, "another model scores every row again"
    assert schedule.tick(probabilities=True).new_rows == 50, "and so do other options"
    for run in sorted(Path(schedule.root, "runs").iterdir()):
        assert verify_output(str(run), 1).passed
    assert [path.stem for path in sorted(Path(schedule.root, "published").iterdir())] == [
        f"{k:09d}" for k in range(1, 8)
    ]


def test_what_is_not_fit_is_not_published_and_what_was_stays(
    quick: None, schedule: Schedule, bundles: list[str]
) -> None:
    with pytest.raises(GateError, match="30 rows are fewer than --min-rows 31"):
        schedule.tick(QUICK.model_copy(update={"min_rows": 31}))
    with pytest.raises(TableError, match="nothing is published"):
        schedule.read()
    assert schedule.tick().outcome == "published", "with a smaller bound the same rows are fit, and scored already"
    before = schedule.read()
    broken = pq.read_table(Path(schedule.table, "part-0.parquet"))
    broken = broken.set_column(1, "image_path", pa.array([None] * 30)).set_column(2, "text", pa.array([None] * 30))
    pq.write_table(broken.cast(pq.read_schema(schedule.rows / "part-0.parquet")), Path(schedule.table, "new.parquet"))
    with pytest.raises(ErrorBudgetError, match="30 of 30 rows failed"):
        schedule.tick(max_error_rate=0.5)
    assert schedule.read() == before
    Path(schedule.table, "new.parquet").unlink()
    schedule.bundle = bundles[1]
    with pytest.raises(GateError, match="drift from those published"):
        schedule.tick(QUICK.model_copy(update={"max_drift": 0.25}))
    assert schedule.read() == before
    assert schedule.tick(QUICK.model_copy(update={"max_drift": 1e3})).outcome == "published"
    assert schedule.read() != before


@pytest.mark.slow
def test_rows_that_failed_are_scored_again_when_asked_and_old_runs_go(schedule: Schedule, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(schedule.rows / "images", images / "images")
    schedule.rows, late = images, images / "images" / "0.jpg"
    shutil.copy2(Path(schedule.table, "part-0.parquet"), images / "part-0.parquet")
    late.rename(tmp_path / "late.jpg")
    pq.write_table(pq.read_table(images / "part-0.parquet").slice(0, 0), Path(schedule.table, "empty.parquet"))
    assert schedule.tick().outcome == "published"
    assert schedule.read()[0]["status"] == "degraded"
    (tmp_path / "late.jpg").rename(late)
    assert schedule.tick().outcome == "nothing new"
    again = schedule.tick(QUICK.model_copy(update={"retry_failed": True, "keep": 1}))
    assert (again.new_rows, again.removed_runs) == (30, 1)
    assert schedule.read()[0]["status"] == "ok"
    assert schedule.tick(QUICK.model_copy(update={"retry_failed": True})).outcome == "nothing new"
    assert schedule.tick(QUICK.model_copy(update={"full": True})).new_rows == 30


def test_a_lease_has_one_holder_and_outlives_a_dead_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with lease(store, 0.4) as first:
        assert first is not None
        with lease(store, 0.4) as second:
            assert second is None
    with lease(store, 0.4) as after_release:
        assert after_release is not None
    program = f"import sys, time; sys.path.insert(0, {os.getcwd()!r})\n"
    program += "from mmray.store import open_store\nfrom mmray.schedule.lease import lease\n"
    program += f"with lease(open_store({str(tmp_path)!r}), 0.4): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    started = time.monotonic()
    with lease(store, 0.4) as after_death:
        assert after_death is not None
    assert time.monotonic() - started > 0.4, "not before it was silent for long enough"


def test_a_holder_that_was_taken_for_dead_hears_of_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with lease(store, 0.4) as held:
        assert held is not None
        store.create("lease/000000002/000000000", b"")  # as another does that found no beat for long enough
        assert held.wait(10)
    with lease(store, 0.4) as mine:
        assert mine is not None, "the other is silent too"


def test_who_is_done_leaves_the_next_holder_alone(tmp_path: Path) -> None:
    store, theirs = open_store(str(tmp_path)), "lease/000000002/000000000"
    with lease(store, 60) as held:
        assert held is not None
        store.create(theirs, b"")  # as the next holder does that saw the release a moment before its traces went
    assert list(store.list("lease")) == ["lease/000000001/released", theirs]


def test_of_many_that_want_the_lease_at_once_one_gets_it(tmp_path: Path) -> None:
    store, got, over = open_store(str(tmp_path)), list[bool](), threading.Event()

    def want() -> None:
        with lease(store, 2.0) as held:
            got.append(held is not None)
            over.wait(30)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(got) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_the_stability_index_is_zero_for_alike_and_large_for_others() -> None:
    assert stability_index((100, 200, 300), (200, 400, 600)) < 0.001
    assert stability_index((900, 50, 50), (50, 50, 900)) > 0.25
    for many in (40, 256, 10**6):  # however many rows the other has
        assert stability_index((128, 0, 0, 128), (many // 2, 0, 0, many // 2)) < 0.001


def test_the_lease_and_what_is_published_work_in_a_bucket(s3: str) -> None:
    store = open_store(f"{s3}/root")
    with lease(store, 2.0) as held:
        assert held is not None
        with lease(store, 2.0) as other:
            assert other is None
    with lease(store, 2.0) as again:
        assert again is not None
    with pytest.raises(TableError, match="nothing is published"):
        read_published(f"{s3}/root")
