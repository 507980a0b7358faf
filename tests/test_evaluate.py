"""Evaluation: what is measured is what the same bundle scores, whichever rows and modalities are there."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import colour_table, saved_bundle, score_in_process, small_bundle, small_config

from mmray import labelled
from mmray.bundle import save_bundle
from mmray.errors import ConfigError, TableError
from mmray.evaluate import LATE, evaluate_bundle
from mmray.labelled import ALPHAS, FUSED, USED
from mmray.mistakes import NUM_MISTAKES
from mmray.options import ScoreConfig
from mmray.report import write_report
from mmray.score.scored import MAX_GROUPS, OTHERS
from mmray.summary import evaluation_json, evaluation_report, evaluation_text


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows; of some the image, the text or both are missing, and of one the label."""
    folder = colour_table(tmp_path_factory.mktemp("rows"), rows=60, files=1)
    table = pq.read_table(folder / "part-0.parquet")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for k in (0, 1, 2, 3, 4):
        columns["image_path"][k] = None
    for k in (3, 4, 5):
        columns["text"][k] = None
    columns["label"][10] = None
    columns["shop"] = [None if k == 7 else f"shop {k % 3}" for k in range(60)]
    columns["split"] = ["test" if k % 2 else "train" for k in range(60)]
    pq.write_table(pa.table(columns), folder / "part-0.parquet", row_group_size=25)
    return folder


@pytest.fixture(scope="module")
def bundle(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_bundle(tmp_path_factory.mktemp("bundle") / "bundle", rows)


def bundle_of(folder: Path, labels: tuple[str, ...] = ("blue", "green", "red"), **sections: Any) -> str:
    save_bundle(small_bundle(small_config(**sections), labels), str(folder))
    return str(folder)


def test_the_accuracy_is_that_of_the_scored_table(bundle: str, rows: Path, tmp_path: Path) -> None:
    score_in_process(bundle, str(rows), str(tmp_path / "scored"))
    scored = pq.read_table(tmp_path / "scored" / "data").to_pylist()
    usable = [row for row in scored if row["label"] and row["status"] != "failed"]
    evaluation = evaluate_bundle(bundle, str(rows))
    assert (evaluation.rows, evaluation.skipped) == (len(usable), 60 - len(usable)) == (57, 3)
    right = np.mean([row["predicted_label"] == row["label"] for row in usable])
    assert evaluation.metrics[FUSED]["accuracy"] == pytest.approx(right)


def test_the_late_average_is_the_mean_of_what_each_row_has(bundle: str, rows: Path) -> None:
    outputs = evaluate_bundle(bundle, str(rows)).outputs
    image, text, late = outputs["image only"], outputs["text only"], outputs[LATE]
    both = np.isfinite(image).all(axis=1) & np.isfinite(text).all(axis=1)
    np.testing.assert_allclose(late[both], (image[both] + text[both]) / 2, rtol=1e-6)
    assert np.array_equal(late[0], text[0])  # no image
    assert np.array_equal(late[5], image[5])  # no text
    assert np.isnan(late[3]).all()


def test_the_sweep_goes_from_the_text_alone_to_the_image_alone_through_the_models_own_weight(tmp_path: Path) -> None:
    complete = colour_table(tmp_path / "rows", rows=24)
    model = {**small_config().model.model_dump(), "fusion": {"kind": "weighted_sum", "initial_alpha": 0.3}}
    evaluation = evaluate_bundle(bundle_of(tmp_path / "bundle", model=model), str(complete))
    assert tuple(evaluation.sweep) == ALPHAS
    for alpha, view in ((0.0, "text only"), (0.3, FUSED), (1.0, "image only")):
        assert evaluation.sweep[alpha] == pytest.approx(evaluation.metrics[view], rel=1e-5)
    assert evaluation.sweep[0.5]["log_loss"] != pytest.approx(evaluation.sweep[0.3]["log_loss"], rel=1e-5)


def test_a_fusion_without_a_weight_has_no_sweep(rows: Path, tmp_path: Path) -> None:
    model = {**small_config().model.model_dump(), "fusion": {"kind": "concat"}}
    evaluation = evaluate_bundle(bundle_of(tmp_path / "bundle", model=model), str(rows))
    assert evaluation.sweep == {}
    assert len(evaluation.image_weight) == 0
    assert "alpha" not in evaluation_text(evaluation)
    assert "alpha" not in evaluation_report(evaluation, "bundle")["evaluation"]


def test_rows_are_measured_by_the_modalities_they_have(bundle: str, rows: Path) -> None:
    evaluation = evaluate_bundle(bundle, str(rows))
    groups = {group.name: group for group in evaluation.groups[USED]}
    assert {name: group.rows for name, group in groups.items()} == {"image+text": 53, "text": 3, "image": 1, "none": 2}
    assert groups["none"].metrics == {}
    hits = sum(group.metrics["accuracy"] * group.rows for group in groups.values() if group.metrics)
    assert hits / evaluation.rows == pytest.approx(evaluation.metrics[FUSED]["accuracy"])
    assert "image+text" in evaluation_text(evaluation)


def test_rows_are_measured_by_the_values_of_a_column(bundle: str, rows: Path) -> None:
    groups = {g.name: g for g in evaluate_bundle(bundle, str(rows), by="shop").groups["shop"]}
    assert {name: group.rows for name, group in groups.items()} == {
        "shop 0": 20, "shop 1": 18, "shop 2": 20, "(null)": 1
    }  # fmt: skip
    assert sum(row.rows for row in evaluate_bundle(bundle, str(rows), by="id").groups["id"]) == 59
    names = [group.name for group in evaluate_bundle(bundle, str(rows), by="id").groups["id"]]
    assert len(names) == MAX_GROUPS + 1
    assert names[-1] == OTHERS
    with pytest.raises(TableError, match="has no column 'shops'; did you mean 'shop'"):
        evaluate_bundle(bundle, str(rows), by="shops")


def test_a_split_leaves_the_other_rows_out(rows: Path, tmp_path: Path) -> None:
    split = bundle_of(tmp_path / "bundle", table={"train": "rows", "split_column": "split"})
    evaluation = evaluate_bundle(split, str(rows), split="test")
    assert evaluation.rows + evaluation.skipped == 30
    with pytest.raises(TableError, match=r"no row of .* has a label and a prediction"):
        evaluate_bundle(split, str(rows), split="elsewhere")
    with pytest.raises(ConfigError, match=r"needs a bundle trained with table.split_column"):
        evaluate_bundle(bundle_of(tmp_path / "other"), str(rows), split="test")


def test_the_worst_mistakes_are_wrong_and_come_with_their_rows(bundle: str, rows: Path) -> None:
    evaluation = evaluate_bundle(bundle, str(rows))
    mistakes, table = evaluation.mistakes, pq.read_table(rows / "part-0.parquet").to_pylist()
    wrong = 1 - evaluation.metrics[FUSED]["accuracy"]
    assert len(mistakes) == min(NUM_MISTAKES, round(wrong * evaluation.rows))
    assert [m["wrongness"] for m in mistakes] == sorted((m["wrongness"] for m in mistakes), reverse=True)
    for mistake in mistakes:
        file, _, number = mistake["row"].partition(":")
        row = table[int(number)]
        assert file == "part-0.parquet"
        assert (mistake["label"], mistake["text"]) == (row["label"], row["text"])
        assert mistake["predicted"] != mistake["label"]
        assert (mistake["thumbnail"] is None) == (row["image_path"] is None)
        if mistake["thumbnail"] is not None:
            kind, _, data = mistake["thumbnail"].partition(",")
            assert kind == "data:image/jpeg;base64"
            assert base64.b64decode(data)[:2] == b"\xff\xd8"


TASKS: dict[str, tuple[tuple[str, ...], str]] = {
    "binary": (("no", "yes"), "is_red"),
    "multiclass": (("blue", "green", "red"), "label"),
    "multilabel": (("blue", "even", "green", "odd", "red"), "both"),
    "regression": ((), "value"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_measured_and_reported(rows: Path, tmp_path: Path, task: str) -> None:
    labels, column = TASKS[task]
    table = {"train": "rows", "label_column": column}
    evaluation = evaluate_bundle(bundle_of(tmp_path / "b", labels, task={"kind": task}, table=table), str(rows))
    report = evaluation_report(evaluation, "bundle")
    write_report(tmp_path, report)
    section = report["evaluation"]
    assert ("confusion" in section) == (task in ("binary", "multiclass"))
    assert ("roc" in section) == ("reliability" in section) == (task != "regression")
    assert ("scatter" in section) == (task == "regression")
    html = (tmp_path / "report.html").read_text()
    for heading in ("What each view is worth", "Worst mistakes", "Data and model", "at other weights"):
        assert heading in html
    assert "<script" not in html
    numbers = json.loads(json.dumps(evaluation_json(evaluation)))
    assert numbers["metrics"][LATE].keys() == numbers["metrics"][FUSED].keys()
    assert [point["alpha"] for point in numbers["alpha_sweep"]] == list(ALPHAS)
    assert "late average" in evaluation_text(evaluation)


def test_a_model_of_texts_alone_is_measured_without_views(rows: Path, tmp_path: Path) -> None:
    text_only = bundle_of(tmp_path / "bundle", table={"train": "rows", "image_column": ""})
    evaluation = evaluate_bundle(text_only, str(rows))
    assert set(evaluation.metrics) == {FUSED}
    write_report(tmp_path, evaluation_report(evaluation, text_only))


def test_what_would_take_long_here_is_left_to_a_cluster(
    rows: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, handed_over = evaluate_bundle(bundle, str(rows), ScoreConfig(slice_rows=10)), list[Any]()

    def on_ray(slices: Any, arguments: Any, options: ScoreConfig) -> Iterator[Any]:
        handed_over.extend(slices)
        yield from labelled._here(slices, arguments, options.model_copy(update={"local": True}))

    monkeypatch.setattr(labelled, "PATIENCE_S", 0.0)
    monkeypatch.setattr(labelled, "_on_ray", on_ray)
    parted = evaluate_bundle(bundle, str(rows), ScoreConfig(slice_rows=10))
    assert [piece.index for piece in handed_over] == list(range(1, len(handed_over) + 1)), "all but the first"
    assert parted.metrics == whole.metrics
