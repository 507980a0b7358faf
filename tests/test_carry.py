"""Rows that did not change take over what they were given before; all others are scored."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, saved_bundle, score_in_process

from mmray.errors import TableError
from mmray.options import ScoreConfig
from mmray.score.carry import Carry, ScoredFile
from mmray.score.commit import Output
from mmray.score.plan import make_plan
from mmray.score.worker import SliceScorer

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=120, files=2)


@pytest.fixture(scope="module")
def bundles(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models: a carried row shows by the score of the first."""
    folder = tmp_path_factory.mktemp("bundles")
    return [saved_bundle(folder / str(seed), rows, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def before(rows: Path, bundles: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("before") / "out"
    score_in_process(bundles[0], str(rows / "part-0.parquet"), str(output), options(rows))
    return output


def options(rows: Path) -> ScoreConfig:
    return ScoreConfig(image_roots=(str(rows),), slice_rows=20, precision="fp32")


def carry_of(before: Path, rows: Path, bundle: str, key: str = "id", only_ok: bool = False) -> Carry:
    plan = make_plan(bundle, str(rows / "part-0.parquet"), options(rows))
    files = [
        ScoredFile(str(path), piece.uri, piece.first_row)
        for path, piece in zip(sorted((before / "data").iterdir()), plan.slices, strict=True)
    ]
    return Carry.of(key, files, only_ok)


def score(bundle: str, table: Path, output: Path, rows: Path, carry: Carry | None) -> tuple[Rows, int]:
    """The scored rows by their ids, and how many were carried."""
    plan = make_plan(bundle, str(table), options(rows))
    scorer = SliceScorer(bundle, str(output), plan.hash, plan.image_roots, options(rows), carry=carry)
    carried = sum(scorer.score(piece).ledger.carried for piece in plan.slices)
    scored: Rows = pyarrow.dataset.dataset(str(output / "data")).to_table().to_pylist()
    return scored, carried


def test_rows_that_did_not_change_keep_their_scores_and_the_others_are_scored(
    rows: Path, bundles: list[str], before: Path, tmp_path: Path
) -> None:
    old = pq.read_table(rows / "part-0.parquet").to_pylist()
    changed = {
        3: {"text": "another text"},
        4: {"image_path": old[9]["image_path"]},
        5: {"value": -1.0},
        6: {"id": 7000},
    }
    new = [{**row, **changed.get(k, {})} for k, row in enumerate(old) if k not in (10, 11)]
    new.insert(30, {**old[0], "id": 8000})
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(new), tmp_path / "table" / "rewritten.parquet")
    carry = carry_of(before, rows, bundles[0])
    got, carried = score(bundles[1], tmp_path / "table", tmp_path / "mixed", rows, carry)
    fresh, _ = score(bundles[1], tmp_path / "table", tmp_path / "fresh", rows, None)
    published: Rows = pyarrow.dataset.dataset(str(before / "data")).to_table().to_pylist()
    first = {row["id"]: row["score"] for row in published}
    scored_again = {old[3]["id"], old[4]["id"], 7000, 8000}
    assert carried == len(new) - len(scored_again)
    for row, all_new, given in zip(got, fresh, new, strict=True):
        want = all_new["score"] if row["id"] in scored_again else first[row["id"]]
        assert row["score"] == pytest.approx(want, abs=1e-6), row
        assert {name: row[name] for name in given} == given, "the columns of the input are those of now"


def test_rows_that_are_not_ok_are_scored_again_when_asked(
    rows: Path, bundles: list[str], before: Path, tmp_path: Path
) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    broken = table.set_column(1, "image_path", pa.array(["nowhere.jpg", *table["image_path"].to_pylist()[1:]]))
    (tmp_path / "table").mkdir()
    pq.write_table(broken, tmp_path / "table" / "broken.parquet")
    score_in_process(bundles[0], str(tmp_path / "table"), str(tmp_path / "out"), options(rows))
    for only_ok, expected in ((False, 60), (True, 59)):
        plan = make_plan(bundles[0], str(tmp_path / "table"), options(rows))
        parts = zip(sorted((tmp_path / "out" / "data").iterdir()), plan.slices, strict=True)
        carry = Carry.of("id", [ScoredFile(str(path), "elsewhere", s.first_row) for path, s in parts], only_ok)
        _, carried = score(bundles[0], tmp_path / "table", tmp_path / f"again-{only_ok}", rows, carry)
        assert carried == expected


def test_a_key_that_cannot_tell_rows_apart_is_refused(
    rows: Path, bundles: list[str], before: Path, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match="has no column 'idd'; did you mean 'id'"):
        score(bundles[0], rows, tmp_path / "a", rows, carry_of(before, rows, bundles[0], "idd"))
    with pytest.raises(TableError, match="'both' holds lists or structs"):
        score(bundles[0], rows, tmp_path / "b", rows, carry_of(before, rows, bundles[0], "both"))


def test_rows_without_a_key_and_keys_of_another_type_are_scored(
    rows: Path, bundles: list[str], before: Path, tmp_path: Path
) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    (tmp_path / "table").mkdir()
    pq.write_table(table.set_column(0, "id", pa.nulls(60, pa.int64())), tmp_path / "table" / "none.parquet")
    names = pa.array([str(value) for value in table["id"].to_pylist()])
    pq.write_table(table.set_column(0, "id", names), tmp_path / "table.parquet")
    carry = carry_of(before, rows, bundles[0])
    assert score(bundles[0], tmp_path / "table", tmp_path / "a", rows, carry)[1] == 0
    assert score(bundles[0], tmp_path / "table.parquet", tmp_path / "b", rows, carry)[1] == 0
    assert Output(str(tmp_path / "b")).store.list("data")
