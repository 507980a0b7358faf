"""Scored rows as readers of an output have them: groups, samples, whatever stands in their cells."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import score_in_process

from mmray.cli import main
from mmray.errors import TableError
from mmray.options import ScoreConfig
from mmray.score.commit import Output
from mmray.score.samples import sample_scored
from mmray.score.scored import grouped


@pytest.fixture
def output(rows: Path, bundle: str, tmp_path: Path) -> Path:
    """A scored table with columns of many types, and a text that is no UTF-8."""
    table = pq.read_table(rows / "part-0.parquet")
    texts = [b"the red square"] * (table.num_rows - 1) + [b"\xff\xfe"]
    more: dict[str, pa.Array] = {
        "flag": pa.array([k % 2 == 0 for k in range(table.num_rows)]),
        "shop": pa.array(["north", None] * (table.num_rows // 2)).dictionary_encode(),
        "when": pa.array([k % 3 for k in range(table.num_rows)], pa.timestamp("s")),
    }
    for name, column in more.items():
        table = table.append_column(name, column)
    table = table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts).view(pa.string()))
    pq.write_table(table, tmp_path / "rows.parquet")
    options = ScoreConfig(image_roots=(str(rows),))
    ledger = score_in_process(bundle, str(tmp_path / "rows.parquet"), str(tmp_path / "out"), options)
    assert ledger.reasons == {"degraded/TEXT_INVALID": 1}
    return tmp_path / "out"


def counts(output: Path, column: str) -> dict[str, Any]:
    return {group.name: group.statuses for group in grouped(str(output), column)}


def test_rows_are_grouped_by_a_column_of_any_plain_type(output: Path) -> None:
    assert counts(output, "flag") == {"True": {"ok": 10}, "False": {"ok": 9, "degraded": 1}}
    assert counts(output, "shop") == {"north": {"ok": 10}, "(null)": {"ok": 9, "degraded": 1}}
    assert counts(output, "when").keys() == {f"1970-01-01 00:00:0{k}" for k in range(3)}
    assert sum(sum(statuses.values()) for statuses in counts(output, "text").values()) == 20
    (mean,) = {round(group.mean_score or 0, 6) for group in grouped(str(output), "status") if group.name == "ok"}
    assert 1 / 3 <= mean <= 1
    with pytest.raises(TableError, match=r"of type .*list.*, which makes no groups"):
        grouped(str(output), "both")
    with pytest.raises(TableError, match="has no column 'shops'"):
        grouped(str(output), "shops")


def test_samples_go_from_the_lowest_score_to_the_highest_whatever_their_cells_hold(
    output: Path, bundle: str, tmp_path: Path
) -> None:
    page = ["--samples", "99", "--by", "text", "--to", str(tmp_path / "page")]
    assert main(["report", str(output), *page]) == 0
    samples = json.loads((tmp_path / "page" / "report.json").read_text())["scoring"]["samples"]
    assert len({sample["row"] for sample in samples}) == 20
    assert [sample["score"] for sample in samples] == sorted(sample["score"] for sample in samples)


def test_a_row_that_killed_a_process_is_no_sample(output: Path, bundle: str) -> None:
    (part,) = (output / "data").iterdir()
    table = pq.read_table(part)
    reasons = pa.array(["DECODE_CRASH", *table["reason"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("reason"), "reason", reasons), part)
    owner = Output(str(output)).owner()
    assert owner is not None
    rows = {int(sample["row"].rpartition(":")[2]) for sample in sample_scored(str(output), bundle, owner, 99)}
    assert rows == set(range(1, 20))
