"""The predictor: the same row, the same score; what is wrong with a row stays with that row."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import colour_table, small_bundle, small_config, with_golden

from mmray.bundle import Bundle
from mmray.errors import BundleError, ConfigError
from mmray.model.precision import computes_bf16
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.source import ImageSource
from mmray.table import Reason


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=40)


@pytest.fixture(scope="module")
def table(rows: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(rows / f"part-{k}.parquet") for k in range(2)]).combine_chunks()


def predictor(rows: Path, bundle: Bundle | None = None, **options: object) -> Predictor:
    settings = {"precision": "fp32", "probabilities": True, **options}
    return Predictor(bundle or small_bundle(), ImageSource([str(rows)], 2**20), ScoreConfig(**settings))


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 40}, {"decode_threads": 3}])
def test_a_score_does_not_depend_on_the_batch(rows: Path, table: pa.Table, options: dict[str, int]) -> None:
    reference = np.asarray(predictor(rows).score(table)["probabilities"].to_pylist())
    got = np.asarray(predictor(rows, **options).score(table)["probabilities"].to_pylist())
    np.testing.assert_allclose(got, reference, atol=1e-6)


def test_a_score_does_not_depend_on_order_or_neighbours(rows: Path, table: pa.Table) -> None:
    model = predictor(rows)
    reference = model.score(table)["score"].to_pylist()
    order = np.random.default_rng(0).permutation(table.num_rows)
    shuffled = model.score(table.take(order))["score"].to_pylist()
    np.testing.assert_allclose(shuffled, np.asarray(reference)[order], atol=1e-6)


def test_every_column_passes_through_and_the_scores_are_appended(rows: Path, table: pa.Table) -> None:
    scored = predictor(rows).score(table)
    assert scored.select(table.schema.names).equals(table)
    assert scored.schema.names[table.num_columns :] == [
        "score",
        "predicted_label",
        "probabilities",
        "image_weight",
        "modalities_used",
        "status",
        "reason",
        "reason_detail",
    ]
    probabilities = np.asarray(scored["probabilities"].to_pylist())
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(scored["score"].to_pylist(), probabilities.max(1), atol=1e-6)
    labels = np.asarray(["blue", "green", "red"])[probabilities.argmax(1)].tolist()
    assert scored["predicted_label"].to_pylist() == labels
    assert set(scored["status"].to_pylist()) == {"ok"}


def test_what_is_wrong_with_a_row_is_said_on_that_row_alone(rows: Path, table: pa.Table, tmp_path: Path) -> None:
    good = table.slice(0, 1).to_pylist()[0]
    changes = [
        {},
        {"image_path": None},
        {"text": None},
        {"image_path": None, "text": None},
        {"image_path": "images/none.jpg"},
        {"image_path": "../secret.jpg", "text": "  "},
        {"image_path": "part-0.parquet"},
        {},
    ]
    scored = predictor(rows).score(pa.Table.from_pylist([{**good, **change} for change in changes], table.schema))
    assert scored["status"].to_pylist() == ["ok", *["degraded"] * 2, "failed", "degraded", "failed", "degraded", "ok"]
    assert scored["reason"].to_pylist() == [
        None,
        Reason.IMAGE_NULL,
        Reason.TEXT_NULL,
        Reason.IMAGE_NULL,
        Reason.MISSING,
        Reason.NOT_ALLOWED,
        Reason.BAD_FORMAT,
        None,
    ]
    used = ["image+text", "text", "image", "", "text", "", "text", "image+text"]
    assert scored["modalities_used"].to_pylist() == used
    assert [score is None for score in scored["score"].to_pylist()] == [
        status == "failed" for status in scored["status"].to_pylist()
    ]
    assert scored["score"][0].as_py() == pytest.approx(scored["score"][7].as_py(), abs=1e-6)
    assert scored["image_weight"].to_pylist()[1:3] == [0.0, 1.0]
    assert "secret" not in str(scored["reason_detail"].to_pylist())


def test_a_table_without_rows_stays_one(rows: Path, table: pa.Table) -> None:
    assert predictor(rows).score(table.slice(0, 0)).num_rows == 0


def test_a_string_that_is_not_utf8_costs_its_own_row_only(rows: Path, table: pa.Table) -> None:
    raw = pa.array([b"the red square", b"\xff\xfe", b"caf\xe9 red"], pa.binary()).view(pa.string())
    broken = table.slice(0, 3).set_column(table.schema.get_field_index("text"), "text", raw)
    scored = predictor(rows).score(broken)
    assert scored["reason"].to_pylist() == [None, Reason.TEXT_INVALID, None]


def test_an_output_that_is_not_finite_is_named(rows: Path, table: pa.Table) -> None:
    bundle = small_bundle()
    weights = {name: tensor.clone() for name, tensor in bundle.weights.items()}
    weights["_projections.text.0.bias"][:] = torch.nan
    scored = predictor(rows, dataclasses.replace(bundle, weights=weights)).score(table)
    assert set(scored["reason"].to_pylist()) == {Reason.NONFINITE_OUTPUT}
    assert scored["score"].null_count == table.num_rows
    assert scored["predicted_label"].null_count == table.num_rows


def test_each_modality_alone_is_what_a_row_without_the_other_gets(rows: Path, table: pa.Table) -> None:
    model = predictor(rows)
    columns = {"image": table["image_path"].to_pylist(), "text": table["text"].to_pylist()}
    views = model.predict(columns, alone=True).alone
    without_text = model.predict({**columns, "text": [None] * table.num_rows}).outputs
    without_image = model.predict({**columns, "image": [None] * table.num_rows}).outputs
    np.testing.assert_allclose(views["image"], without_text, atol=1e-6)
    np.testing.assert_allclose(views["text"], without_image, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "labels", "columns"),
    [
        ({"kind": "binary"}, ("no", "yes"), {"score", "predicted_label", "probabilities"}),
        ({"kind": "multilabel"}, ("a", "b", "c"), {"score", "predicted_label", "probabilities"}),
        ({"kind": "regression"}, (), {"score"}),
    ],
)
def test_each_task_has_its_columns(
    rows: Path, table: pa.Table, task: dict[str, str], labels: tuple[str, ...], columns: set[str]
) -> None:
    scored = predictor(rows, small_bundle(small_config(task=task), labels)).score(table)
    added = set(scored.schema.names) - set(table.schema.names)
    assert added & {"score", "predicted_label", "probabilities"} == columns
    assert scored["score"].null_count == 0
    if task["kind"] == "binary":
        positive = np.asarray(scored["probabilities"].to_pylist())[:, 1]
        np.testing.assert_allclose(scored["score"].to_pylist(), positive, atol=1e-6)
    if task["kind"] == "multilabel":
        pairs = zip(scored["predicted_label"].to_pylist(), scored["probabilities"].to_pylist(), strict=True)
        assert all(names == [n for n, p in zip(labels, ps, strict=True) if p >= 0.5] for names, ps in pairs)


def test_golden_rows_hold_complete_rows_and_one_without_each_modality(rows: Path) -> None:
    golden = with_golden(small_bundle(), rows).golden
    assert golden is not None
    assert golden.num_rows == 10
    assert golden["image"].null_count == golden["text"].null_count == 1
    assert golden["image"][0].as_py()[:3] == b"\xff\xd8\xff"


def test_another_model_than_the_golden_rows_were_made_with_is_refused(rows: Path) -> None:
    bundle = with_golden(small_bundle(), rows)
    predictor(rows, bundle)
    swapped = dict(bundle.weights)
    swapped["head._linear.weight"] = swapped["head._linear.weight"].flip(0)
    with pytest.raises(BundleError, match="golden rows come out"):
        predictor(rows, dataclasses.replace(bundle, weights=swapped))


@pytest.mark.skipif(not computes_bf16("cpu"), reason="this CPU cannot compute in bf16")
def test_bf16_stays_within_its_tolerance_of_fp32(rows: Path, table: pa.Table) -> None:
    bundle = with_golden(small_bundle(), rows)
    exact = np.asarray(predictor(rows, bundle).score(table)["probabilities"].to_pylist())
    rounded = np.asarray(predictor(rows, bundle, precision="bf16").score(table)["probabilities"].to_pylist())
    assert 0 < np.abs(exact - rounded).max() < 1e-2


def test_a_gpu_where_there_is_none_is_a_mistake_that_is_explained(rows: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="a GPU was asked for"):
        Predictor(small_bundle(), ImageSource([str(rows)], 2**20), ScoreConfig(gpus_per_actor=1), "cuda")


def test_a_struct_with_a_path_that_is_not_utf8_costs_its_own_row_only(rows: Path, table: pa.Table) -> None:
    data = (rows / "images" / "0.jpg").read_bytes()
    paths = pa.array([b"a.jpg", b"\xff.jpg", None], pa.binary()).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array([data, data, None]), paths], ["bytes", "path"])
    broken = table.slice(0, 3).set_column(table.schema.get_field_index("image_path"), "image_path", images)
    assert predictor(rows).score(broken)["status"].to_pylist() == ["ok", "ok", "degraded"]


def test_golden_rows_are_rows_that_the_model_can_use(rows: Path, tmp_path: Path) -> None:
    table = pq.read_table(rows / "part-0.parquet").slice(0, 6)
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "good.jpg").write_bytes((rows / "images" / "0.jpg").read_bytes())
    images = pa.array(["page.jpg", "good.jpg", "good.jpg", "page.jpg", "good.jpg", "good.jpg"])
    texts = pa.array(["a", "  ", "the red one", "b", "green", None])
    table = table.set_column(table.schema.get_field_index("image_path"), "image_path", images)
    table = table.set_column(table.schema.get_field_index("text"), "text", texts)
    pq.write_table(table, tmp_path / "t.parquet")
    golden = with_golden(small_bundle(), tmp_path).golden
    assert golden is not None
    assert golden.num_rows == 4
    assert np.isfinite(np.asarray(golden["outputs"].to_pylist())).all()
