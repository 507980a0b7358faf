"""Commit, resume and verify, without a cluster: the scorer is a plain callable."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, saved_bundle, score_in_process

from mmray.cli import main
from mmray.errors import (
    ConfigError,
    EnvironmentFaultError,
    ErrorBudgetError,
    OutputConflictError,
    TableError,
    VerifyError,
)
from mmray.options import ScoreConfig
from mmray.score.commit import Manifest, Output, part_key
from mmray.score.job import score_table
from mmray.score.plan import describe, make_plan
from mmray.score.problems import problems
from mmray.score.rescore import sample_rows
from mmray.score.verify import verify_output
from mmray.score.worker import SliceScorer
from mmray.slices import Slice, read_slice
from mmray.store import LocalStore, open_store

OPTIONS = ScoreConfig(precision="fp32", slice_rows=25)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(
        tmp_path_factory.mktemp("rows"),
        nested=[[{"a": k}] if k % 3 else None for k in range(120)],
        zoned=pa.array(range(120), pa.timestamp("us", "Asia/Tokyo")),
        number=[float("nan") if k % 7 == 0 else k / 3 for k in range(120)],
        kind=pa.array(["x", "y"] * 60).dictionary_encode(),
        raw=[bytes([k]) for k in range(120)],
    )


@pytest.fixture(scope="module")
def bundle(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_bundle(tmp_path_factory.mktemp("bundles") / "bundle", rows)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def scored_rows(output: str) -> pa.Table:
    return pyarrow.dataset.dataset(f"{output}/data", format="parquet").to_table()


def test_each_row_stands_in_the_output_once_with_all_its_columns(rows: Path, bundle: str, output: str) -> None:
    ledger = score_in_process(bundle, str(rows), output, OPTIONS)
    table = scored_rows(output)
    assert sorted(table["id"].to_pylist()) == list(range(120))
    assert ledger.rows == 120
    assert ledger.statuses == {"ok": 120}
    assert sum(ledger.histogram) == 120
    plan = make_plan(bundle, str(rows), OPTIONS)
    for piece in plan.slices:
        part = pq.read_table(f"{output}/{part_key(plan.hash, piece.index)}")
        before = read_slice(piece)
        assert part.select(before.schema.names).drop_columns("number").equals(before.drop_columns("number"))
    report = verify_output(output, 2)
    assert report.passed, report.mismatches
    assert report.rows == 120


def test_a_glob_of_the_data_is_right_at_any_moment(rows: Path, bundle: str, output: str) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS, stop_after=2)
    assert scored_rows(output).num_rows == 50
    assert not (Path(output) / "_SUCCESS").exists()
    assert {path.name[0] for path in Path(output, "data").iterdir()} == {"p"}


def test_a_run_that_stopped_continues_and_keeps_what_is_there(rows: Path, bundle: str, output: str) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS, stop_after=3)
    before = {path: path.stat().st_mtime_ns for path in Path(output, "data").iterdir()}
    score_in_process(bundle, str(rows), output, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert verify_output(output, 2).passed


def test_scorers_that_do_the_same_work_converge(rows: Path, bundle: str, output: str) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS, stop_after=0)
    plan = make_plan(bundle, str(rows), OPTIONS)
    scorers = [SliceScorer(bundle, output, plan.hash, plan.image_roots, OPTIONS) for _ in range(3)]
    start = threading.Barrier(3)

    def work(scorer: SliceScorer) -> list[int]:
        start.wait()
        return [scorer.score(piece).ledger.rows for piece in plan.slices]

    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(work, scorers))
    assert counts == [[piece.num_rows for piece in plan.slices]] * 3
    score_in_process(bundle, str(rows), output, OPTIONS)
    assert verify_output(output, 2).passed


def test_another_model_or_other_options_do_not_share_an_output(
    rows: Path, bundle: str, output: str, tmp_path: Path
) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    saved_bundle(tmp_path / "other", rows, seed=1)
    with pytest.raises(OutputConflictError, match="another model"):
        score_in_process(str(tmp_path / "other"), str(rows), output, OPTIONS)
    with pytest.raises(OutputConflictError, match="other options"):
        score_in_process(bundle, str(rows), output, OPTIONS.model_copy(update={"probabilities": True}))
    with pytest.raises(OutputConflictError, match="other slices"):
        score_in_process(bundle, str(rows), output, OPTIONS.model_copy(update={"slice_rows": 10}))
    assert verify_output(output, 2).passed


def test_a_folder_with_other_data_is_not_written_to(rows: Path, bundle: str, output: str) -> None:
    Path(output, "data").mkdir(parents=True)
    Path(output, "data", "theirs.parquet").touch()
    with pytest.raises(OutputConflictError, match="did not write"):
        score_in_process(bundle, str(rows), output, OPTIONS)
    assert [path.name for path in Path(output).rglob("*") if path.is_file()] == ["theirs.parquet"]


def test_a_slice_file_of_someone_else_is_not_taken_for_ours(rows: Path, bundle: str, output: str) -> None:
    plan = make_plan(bundle, str(rows), OPTIONS)
    score_in_process(bundle, str(rows), output, OPTIONS, stop_after=1)
    pq.write_table(pa.table({"x": [1]}), f"{output}/{part_key(plan.hash, 1)}")
    with pytest.raises(OutputConflictError, match="does not hold slice 1"):
        score_in_process(bundle, str(rows), output, OPTIONS)


def test_an_input_that_changes_is_not_half_scored(bundle: str, output: str, tmp_path: Path) -> None:
    folder = colour_table(tmp_path / "mine", rows=40)
    score_in_process(bundle, str(folder), output, OPTIONS, stop_after=1)
    os.utime(folder / "part-1.parquet", ns=(1, 1))
    with pytest.raises(OutputConflictError, match="files changed"):
        score_in_process(bundle, str(folder), output, OPTIONS)


def test_an_input_that_changes_during_the_run_withholds_success(bundle: str, output: str, tmp_path: Path) -> None:
    folder = colour_table(tmp_path / "mine", rows=40)
    plan = make_plan(bundle, str(folder), OPTIONS)
    target = Output(output)
    target.claim(plan, {"plan_hash": plan.hash, "identity": {}, "table": "", "num_slices": 2})
    scorer = SliceScorer(bundle, output, plan.hash, plan.image_roots, OPTIONS)
    receipts = [scorer.score(piece) for piece in plan.slices]
    os.utime(folder / "part-0.parquet", ns=(1, 1))
    with pytest.raises(EnvironmentFaultError, match="changed while it was being scored"):
        target.finalize(plan, Manifest.of(receipts), 1.0)
    assert target.success() is None


def test_too_many_failed_rows_withhold_success_and_keep_the_data(bundle: str, output: str, tmp_path: Path) -> None:
    folder = colour_table(tmp_path / "mine", rows=40)
    for k in range(2):
        path = folder / f"part-{k}.parquet"
        table = pq.read_table(path)
        gone = pa.array([None if i % 4 == 0 else t for i, t in enumerate(table["text"].to_pylist())])
        paths = pa.array([None if i % 4 == 0 else t for i, t in enumerate(table["image_path"].to_pylist())])
        table = table.set_column(table.schema.get_field_index("text"), "text", gone)
        pq.write_table(table.set_column(table.schema.get_field_index("image_path"), "image_path", paths), path)
    strict = OPTIONS.model_copy(update={"max_error_rate": 0.1})
    with pytest.raises(ErrorBudgetError, match=r"10 of 40 rows failed \(25.00% > 10.00%\)"):
        score_in_process(bundle, str(folder), output, strict)
    assert scored_rows(output).num_rows == 40
    assert score_in_process(bundle, str(folder), output, OPTIONS).count("failed") == 10
    assert {problem.reason for problem in problems(output)} == {"IMAGE_NULL"}
    assert len(list(problems(output, ["id"]))) == 10
    with pytest.raises(TableError, match="no column 'nothing'"):
        list(problems(output, ["nothing"]))


def test_the_same_run_works_in_a_bucket(rows: Path, bundle: str, s3: str) -> None:
    score_in_process(bundle, str(rows), f"{s3}/out", OPTIONS, stop_after=2)
    score_in_process(bundle, str(rows), f"{s3}/out", OPTIONS)
    report = verify_output(f"{s3}/out", 2)
    assert report.passed, report.mismatches
    assert len(open_store(f"{s3}/out").list("data")) == report.slices == 6


def tamper(output: str, change: str) -> None:
    part = sorted(Path(output, "data").iterdir())[1]
    table, note = pq.read_table(part), pq.read_schema(part).metadata
    if change == "lost file":
        part.unlink()
    elif change == "foreign file":
        pq.write_table(table, part.with_name("part-000000099-ffffffff.parquet"))
    elif change == "flipped byte":
        data = bytearray(part.read_bytes())
        data[len(data) // 3] ^= 4
        part.write_bytes(data)
    elif change == "lost row":
        pq.write_table(table.slice(1), part)
    elif change == "rows out of order":
        pq.write_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), part)
    elif change == "another row's text":
        texts = table["text"].to_pylist()
        index = table.schema.get_field_index("text")
        pq.write_table(table.set_column(index, "text", pa.array([texts[1], *texts[1:]])), part)
    elif change == "score without status":
        index = table.schema.get_field_index("status")
        pq.write_table(table.set_column(index, "status", pa.array(["failed"] * table.num_rows)), part)
    elif change == "manifest":
        manifest = next(Path(output, "_mmray").glob("manifest-*"))
        manifest.write_bytes(manifest.read_bytes()[:-1] + b"x")
    assert note is not None


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ("lost file", 0),
        ("foreign file", 0),
        ("lost row", 0),
        ("manifest", 0),
        ("flipped byte", 2),
        ("rows out of order", 2),
        ("another row's text", 2),
        ("score without status", 2),
    ],
)
def test_verify_finds_what_was_changed_afterwards(
    rows: Path, bundle: str, output: str, change: str, level: int
) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    assert verify_output(output, level).passed
    tamper(output, change)
    assert not verify_output(output, level).passed


def test_an_unfinished_or_foreign_folder_does_not_verify(rows: Path, bundle: str, output: str, tmp_path: Path) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS, stop_after=2)
    assert verify_output(output, 0).mismatches == [
        "the run is not finished: 2 of 6 slices are there and no _SUCCESS; run the same command again"
    ]
    with pytest.raises(VerifyError, match=r"no _mmray/run\.json"):
        verify_output(str(tmp_path), 0)


def test_the_files_say_who_made_them(rows: Path, bundle: str, output: str) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    fingerprint = json.loads(Path(bundle, "bundle.json").read_text())["fingerprint"]
    for part in Path(output, "data").iterdir():
        note = json.loads(pq.read_schema(part).metadata[b"mmray"])
        assert note["fingerprint"] == fingerprint
        assert note["precision"] == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "txt"}, "no column 'txt'; did you mean 'text'?"),
        ({"image_column": "id"}, "must hold paths, bytes"),
        ({"text_column": "number"}, "must hold strings"),
    ],
)
def test_a_wrong_column_is_found_before_anything_is_written(
    rows: Path, bundle: str, output: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(TableError) as caught:
        score_in_process(bundle, str(rows), output, OPTIONS.model_copy(update=options))
    assert message in str(caught.value)
    assert not Path(output).exists()


def test_a_table_that_is_scored_already_is_not_scored_over(
    rows: Path, bundle: str, output: str, tmp_path: Path
) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    with pytest.raises(TableError, match="already has the columns score"):
        score_in_process(bundle, f"{output}/data", str(tmp_path / "again"), OPTIONS)


def test_every_file_of_a_table_has_to_have_the_right_types(
    rows: Path, bundle: str, output: str, tmp_path: Path
) -> None:
    first = pq.read_table(rows / "part-0.parquet").slice(0, 5)
    (tmp_path / "mixed").mkdir()
    pq.write_table(first, tmp_path / "mixed" / "a.parquet")
    for column, message in (("text", "must hold strings"), ("image_path", "must hold paths")):
        index = first.schema.get_field_index(column)
        pq.write_table(first.set_column(index, column, pa.array(range(5))), tmp_path / "mixed" / "b.parquet")
        with pytest.raises(TableError, match=message):
            score_in_process(bundle, str(tmp_path / "mixed"), output, OPTIONS)
    pq.write_table(first.append_column("score", pa.array(range(5))), tmp_path / "mixed" / "b.parquet")
    with pytest.raises(TableError, match=r"b\.parquet already has the columns score"):
        score_in_process(bundle, str(tmp_path / "mixed"), output, OPTIONS)


def test_an_output_inside_of_its_input_is_refused(rows: Path, bundle: str) -> None:
    for output in (rows, rows / "scored"):
        with pytest.raises(ConfigError, match="lies in the input"):
            score_table(bundle, str(rows), str(output))
    assert not (rows / "scored").exists()


@pytest.mark.parametrize("lost", ["manifest-*", "plan-*"])
def test_an_output_that_lost_its_account_does_not_verify(rows: Path, bundle: str, output: str, lost: str) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    (file,) = Path(output, "_mmray").glob(lost)
    file.write_bytes(file.read_bytes()[:20])
    assert not verify_output(output, 0).passed
    file.unlink()
    assert not verify_output(output, 0).passed


def test_rows_drawn_at_random_get_the_same_scores_again(
    rows: Path, bundle: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_in_process(bundle, str(rows), output, OPTIONS)
    assert main(["verify", output, "--level", "3", "--sample", "50", "--seed", "7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["level"], report["checks"]["rows scored again"]) == (True, 3, 50)
    part = sorted(Path(output, "data").iterdir())[2]
    table, size = pq.read_table(part), part.stat().st_size
    scores = table["score"].to_pylist()
    scores[4] += 0.01
    index = table.schema.get_field_index("score")
    table = table.set_column(index, "score", pa.array(scores))
    pq.write_table(table, part, compression="zstd", write_page_checksum=True)
    keep_size(output, part, size)
    assert verify_output(output, 2).passed, "what another model might have said"
    assert main(["verify", output, "--level", "3", "--json"]) == 4
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)["mismatches"]
    assert found.startswith(f"1 rows get other scores now: data/{part.name}:4: score {scores[4]:.6f}, scored again ")
    assert found in printed.err
    saved_bundle(tmp_path / "other", rows, seed=1)
    assert main(["verify", output, "--level", "3", "--bundle", str(tmp_path / "other")]) == 2
    assert "is of another model" in capsys.readouterr().err


def keep_size(output: str, part: Path, before: int) -> None:
    """Makes the manifest give the size that a file has now, and `_SUCCESS` the manifest."""
    (path,) = Path(output, "_mmray").glob("manifest-*")
    manifest = pq.read_table(path)
    sizes = [
        part.stat().st_size if key.endswith(part.name) else size
        for key, size in zip(manifest["key"].to_pylist(), manifest["size"].to_pylist(), strict=True)
    ]
    assert before in manifest["size"].to_pylist()
    pq.write_table(manifest.set_column(2, "size", pa.array(sizes)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(path.with_name(f"manifest-{digest[:8]}.parquet"))
    success = Path(output, "_SUCCESS")
    success.write_text(json.dumps({**json.loads(success.read_text()), "manifest": digest}))


def test_rows_are_drawn_evenly_and_the_same_by_the_same_seed() -> None:
    slices = [Slice(k, "rows.parquet", "1", 0, 1 + k % 3) for k in range(600)]
    drawn = sample_rows(slices, 600, seed=1)
    assert drawn == sample_rows(slices, 600, seed=1) != sample_rows(slices, 600, seed=2)
    assert sum(len(set(some)) for some in drawn.values()) == 600
    assert all(0 <= row < slices[k].num_rows for k, some in drawn.items() for row in some)
    assert 150 < len([k for k in drawn if k < 300]) <= 300
    everything = sample_rows(slices, 10**6, seed=1)
    assert [len(everything[k]) for k in range(600)] == [piece.num_rows for piece in slices]


def test_to_resume_costs_one_listing_and_of_each_slice_that_is_there_its_footer(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, slices = tmp_path / "many", 60
    folder.mkdir()
    nothing = pa.table({name: pa.nulls(slices) for name in ("image_path", "text")})
    pq.write_table(nothing, folder / "rows.parquet", row_group_size=1)
    options, output = OPTIONS.model_copy(update={"slice_rows": 1}), str(tmp_path / "out")
    plan = make_plan(bundle, str(folder), options)
    assert len(plan.slices) == slices
    target = Output(output)
    target.claim(plan, describe(plan, bundle, str(folder)))
    scorer = SliceScorer(bundle, output, plan.hash, plan.image_roots, options)
    for piece in plan.slices:
        scorer.score(piece)
    asked: Counter[str] = Counter()

    def counted(name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asking(store: LocalStore, *arguments: Any) -> Any:
            asked[name] += 1
            return ask(store, *arguments)

        return asking

    for name in ("create", "delete", "read", "open", "list"):
        monkeypatch.setattr(LocalStore, name, counted(name, getattr(LocalStore, name)))
    result = score_table(bundle, str(folder), output, options)
    assert (result.scored_slices, result.ledger.rows) == (0, slices)
    # The bundle, the table's footer; run.json, the plan, the listing; each slice's footer; attempts; the account.
    assert asked["open"] - asked["read"] == slices + 1, "a whole file is opened to be read"
    assert asked["list"] <= 3
    assert asked["create"] <= 4
    assert asked["read"] <= 4
    assert asked["delete"] == 0
    asked.clear()
    assert score_table(bundle, str(folder), output, options).scored_slices == 0
    assert asked["open"] - asked["read"] == 1, "a finished run reads no slice"
