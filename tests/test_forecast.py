"""What a run would do, said before it does: `mmray plan`."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import score_in_process

from mmray.bundle import load_bundle, save_bundle
from mmray.cli import main
from mmray.options import ScoreConfig
from mmray.profile import profile_of, spread_out
from mmray.score.forecast import forecast
from mmray.slices import Slice, open_table


@pytest.fixture
def wrong(rows: Path, tmp_path: Path) -> Path:
    """The rows, some of which are wrong: an image that is not there, no text, the cells of another row."""
    table = pq.read_table(sorted(rows.glob("*.parquet"))).to_pylist()
    for k in range(4):
        table[k]["image_path"] = "nowhere.jpg"
    table[10]["text"] = None
    table[11] = {**table[12], "id": 11}
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "wrong.parquet")
    return tmp_path / "wrong.parquet"


def test_it_counts_what_a_run_then_finds(rows: Path, bundle: str, wrong: Path, tmp_path: Path) -> None:
    options = ScoreConfig(image_roots=(str(rows),))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = forecast(bundle, str(wrong), options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "it touches nothing"
    ledger = score_in_process(bundle, str(wrong), str(tmp_path / "out"), options)
    assert found.reasons == ledger.reasons == {"degraded/MISSING": 4, "degraded/TEXT_NULL": 1}
    assert found.sample.histogram == ledger.histogram
    assert found.examples["degraded/MISSING"].startswith(f"{wrong}:0: image: MISSING")
    assert found.sample.absent == {"image": 4, "text": 1}
    assert (found.rows, found.duplicates) == (40, 1)
    assert found.image_kinds == {"relative path": 40}
    assert 0 < found.sample.unknown_share < 0.5, "numbers are unknown"


def test_the_command_says_it_in_words_and_as_json(
    rows: Path, bundle: str, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", bundle, str(wrong), "--image-root", str(rows)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^table +40 rows in 1 slices; 'image_path' \(image\), 'text' \(text\)$", said, re.MULTILINE)
    assert re.search(r"^ +4  degraded/MISSING  .*wrong.parquet:0: image: MISSING", said, re.MULTILINE)
    assert re.search(r"^processes +1, without Ray; memory at most", said, re.MULTILINE)
    assert main(["plan", bundle, str(wrong), "--image-root", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == {"degraded/MISSING": 4, "degraded/TEXT_NULL": 1}
    assert main(["plan", bundle, str(wrong), "--sample", "0"]) == 2


def test_rows_like_those_trained_on_have_not_drifted_and_others_have(rows: Path, bundle: str, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    assert forecast(bundle, str(rows), ScoreConfig()).drift is None, "nobody said what was trained on"
    like = profile_of(loaded, open_table(str(rows)), (str(rows),)).to_dict()
    other = {**like, "histogram": like["histogram"][::-1]}
    for name, inputs in (("like", like), ("other", other)):
        save_bundle(dataclasses.replace(loaded, metrics={"inputs": inputs}), str(tmp_path / name))
    assert forecast(str(tmp_path / "like"), str(rows), ScoreConfig()).drift == pytest.approx(0, abs=1e-9)
    assert (forecast(str(tmp_path / "other"), str(rows), ScoreConfig()).drift or 0) > 0.25


def test_a_sample_lies_evenly_over_the_table_and_has_no_row_twice() -> None:
    slices = [Slice(k, f"{k}.parquet", "", 0, 100) for k in range(50)]
    assert [piece.index for piece in spread_out(slices, 80)] == [3, 9, 15, 21, 28, 34, 40, 46]
    for sizes in ([300], [150, 150], [257], [1] * 500, [5] * 100, [1000, 3, 1, 700]):
        slices = [Slice(k, f"{k}.parquet", "", 7, size) for k, size in enumerate(sizes)]
        for rows in (1, 8, 250, 256):
            seen = [(p.index, p.first_row + k) for p in spread_out(slices, rows) for k in range(p.num_rows)]
            assert len(seen) == len(set(seen))
            assert rows - 7 <= len(seen) <= rows
            assert all(7 <= row < 7 + sizes[index] for index, row in seen)
    assert spread_out(slices[:1], 1000) == slices[:1]


def test_columns_that_no_one_table_can_have_and_cells_of_any_kind_are_looked_at(tmp_path: Path, bundle: str) -> None:
    cells = [pa.array([[1, 2], None], pa.list_(pa.uint8())), pa.array(["a.jpg", None])]
    images = pa.StructArray.from_arrays(cells, ["bytes", "path"])
    texts = ["red", "see http://secret"]
    pq.write_table(pa.table({"image_path": images, "text": texts, "sku": [1, 2]}), tmp_path / "a.parquet")
    paths = ["see http://secret", "s3://bucket/a"]
    pq.write_table(pa.table({"image_path": paths, "text": texts, "sku": ["a", "b"]}), tmp_path / "b.parquet")
    found = forecast(bundle, str(tmp_path), ScoreConfig())
    ledger = score_in_process(bundle, str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-out"))
    assert found.reasons == ledger.reasons
    assert found.image_kinds == {"other": 2, "nothing": 1, "s3:// URI": 1}
    table = open_table(str(tmp_path))
    assert profile_of(load_bundle(bundle), table, (str(tmp_path),)).rows == 4
