"""What a run would do, said before it does: `mmray plan`."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import colour_table, score_in_process

from mmray.bundle import load_bundle, save_bundle
from mmray.cli import main
from mmray.errors import ConfigError
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
    assert re.search(r"^ +10%  degraded/MISSING  .*wrong.parquet:0: image: MISSING", said, re.MULTILINE)
    assert re.search(r"^processes +1, without Ray; memory at most", said, re.MULTILINE)
    assert main(["plan", bundle, str(wrong), "--image-root", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == {"degraded/MISSING": 4, "degraded/TEXT_NULL": 1}
    assert main(["plan", bundle, str(wrong), "--sample", "0"]) == 2


def test_more_processes_than_memory_holds_are_refused_with_what_they_need(tmp_path: Path, bundle: str) -> None:
    rows = colour_table(tmp_path / "many", rows=2000)
    with pytest.raises(ConfigError, match=r"2000 processes of [\d,]+ MiB need [\d,]+ MiB, .* give --actors \d+"):
        forecast(bundle, str(rows), ScoreConfig(slice_rows=1, num_actors=2000))


def test_rows_like_those_trained_on_have_not_drifted_and_others_have(rows: Path, bundle: str, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    assert forecast(bundle, str(rows), ScoreConfig()).drift is None, "nobody said what was trained on"
    like = profile_of(loaded, open_table(str(rows)), (str(rows),)).to_dict()
    other = {**like, "histogram": like["histogram"][::-1]}
    for name, inputs in (("like", like), ("other", other)):
        save_bundle(dataclasses.replace(loaded, metrics={"inputs": inputs}), str(tmp_path / name))
    assert forecast(str(tmp_path / "like"), str(rows), ScoreConfig()).drift == pytest.approx(0, abs=1e-9)
    assert (forecast(str(tmp_path / "other"), str(rows), ScoreConfig()).drift or 0) > 0.25


def test_a_sample_lies_evenly_over_the_table() -> None:
    slices = [Slice(k, f"{k}.parquet", "", 100 * k, 100) for k in range(50)]
    pieces = spread_out(slices, 80)
    assert [piece.num_rows for piece in pieces] == [10] * 8
    assert [piece.index for piece in pieces] == [3, 9, 15, 21, 28, 34, 40, 46]
    for piece in pieces:
        whole = slices[piece.index]
        assert whole.first_row <= piece.first_row <= piece.first_row + 10 <= whole.first_row + 100
    assert spread_out(slices[:1], 100) == slices[:1]
