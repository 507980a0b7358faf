"""Training, evaluation and scoring on a real Ray cluster: every task and part, interruptions, hostile rows."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, saved_bundle, score_in_process, small_config
from processes import ALONE, wait_for

from mmray.bundle import load_bundle, read_info, save_bundle
from mmray.cluster import cluster
from mmray.compare import compare_fusions
from mmray.errors import BundleError, ConfigError, TableError
from mmray.evaluate import evaluate_bundle
from mmray.options import ScoreConfig
from mmray.score.job import score_table
from mmray.score.verify import verify_output
from mmray.train.checkpoint import latest_checkpoint
from mmray.train.job import train_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with cluster(2):
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=240)


@pytest.fixture(scope="module")
def bundle(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_bundle(tmp_path_factory.mktemp("bundles") / "bundle", rows)


RUNS: dict[str, dict[str, Any]] = {
    "binary-bidirectional-gated-modality-dropout": {
        "table": {"label_column": "is_red"},
        "task": {"kind": "binary", "positive_label": "yes", "calibrate": True},
        "model": {
            "text_encoder": {"kind": "lstm", "hidden_dim": 8, "bidirectional": True},
            "fusion": {"kind": "weighted_sum", "alpha": "gated"},
            "modality_dropout": 0.3,
        },
    },
    "multilabel-gru-concat-two-workers": {
        "table": {"label_column": "both"},
        "task": {"kind": "multilabel"},
        "model": {"text_encoder": {"kind": "gru", "hidden_dim": 8}, "fusion": {"kind": "concat"}},
        "train": {"num_workers": 2},
    },
    "regression-rnn-conv-streamed": {
        "table": {"label_column": "value"},
        "task": {"kind": "regression", "loss": "mse", "beta": 2.0},
        "model": {"text_encoder": {"kind": "rnn", "hidden_dim": 8}, "fusion": {"kind": "conv"}},
        "train": {"cache_bytes": 0},
    },
    "multiclass-bag-attention-torchvision": {
        "image": {"size": 32},
        "model": {
            "image_encoder": {"kind": "torchvision", "name": "mobilenet_v3_small"},
            "text_encoder": {"kind": "bag"},
            "fusion": {"kind": "attention", "num_heads": 2},
        },
    },
}


def run_config(rows: Path, storage: Path, name: str, **sections: Any) -> Any:
    base = small_config().model.model_dump()
    table = {"train": str(rows), **sections.pop("table", {})}
    model = {**base, **sections.pop("model", {})}
    train = {"epochs": 3, "learning_rate": 0.01, "storage": str(storage), "name": name, **sections.pop("train", {})}
    return small_config(table=table, model=model, train=train, **sections)


@pytest.mark.parametrize("name", RUNS)
def test_every_task_and_part_trains_and_scores(ray_cluster: None, rows: Path, tmp_path: Path, name: str) -> None:
    config = run_config(rows, tmp_path, name, **{key: dict(value) for key, value in RUNS[name].items()})
    seen: list[dict[str, Any]] = []
    result = train_model(config, on_epoch=seen.append)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]
    assert seen == result.history
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    loaded = load_bundle(result.bundle)
    assert loaded.golden is not None
    assert loaded.golden.num_rows == 10
    if result.best.get("temperature"):
        assert loaded.weights["head.temperature"].item() == pytest.approx(result.best["temperature"])
    assert ("temperature" in result.best) == getattr(config.task, "calibrate", False)
    ledger = score_in_process(result.bundle, str(rows), str(tmp_path / "out"), ScoreConfig(probabilities=True))
    assert ledger.statuses == {"ok": 240}
    assert verify_output(str(tmp_path / "out"), 2).passed


def test_a_model_learns_what_there_is_to_learn_and_each_modality_is_measured(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    config = run_config(rows, tmp_path, "learn", train={"epochs": 12, "auxiliary_weight": 0.5, "batch_size": 16})
    evaluation = evaluate_bundle(train_model(config).bundle, str(rows))
    assert set(evaluation.metrics) == {"all modalities", "image only", "text only", "late average"}
    assert all(metrics["accuracy"] > 0.9 for metrics in evaluation.metrics.values())
    assert evaluation.rows == 240
    assert evaluation.outputs["all modalities"].shape == (240, 3)
    assert len(evaluation.image_weight) == 240


def test_fusions_are_compared_and_what_is_done_is_not_done_again(ray_cluster: None, rows: Path, tmp_path: Path) -> None:
    config = run_config(rows, tmp_path, "kinds", train={"epochs": 1})
    seen: list[dict[str, Any]] = []
    compared = compare_fusions(config, ["concat"], 1, table=str(rows), on_run=seen.append)
    (run,) = compared["runs"]
    assert seen == [run]
    assert compared["summary"]["concat"]["all modalities"] == (run["metrics"]["all modalities"]["accuracy"], 0.0)
    assert read_info(run["bundle"]).config.model.fusion.kind == "concat"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert compare_fusions(config, ["concat"], 1, table=str(rows)) == compared
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_finished_run_is_returned_and_an_interrupted_one_ends_the_same(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    whole = train_model(run_config(rows, tmp_path / "a", "run", train={"epochs": 4}))
    again = train_model(run_config(rows, tmp_path / "a", "run", train={"epochs": 4}))
    assert again.trained_epochs == 0
    assert again.bundle == whole.bundle
    part = tmp_path / "b"
    shutil.copytree(tmp_path / "a", part)
    # As if the driver had been killed after the third epoch.
    for lost in [*(part / "run" / "bundle").iterdir(), part / "run" / "checkpoints" / "epoch-000004.safetensors"]:
        lost.unlink()
    resumed = train_model(run_config(rows, part, "run", train={"epochs": 4}))
    assert resumed.trained_epochs == 1
    assert resumed.history == whole.history
    assert load_bundle(resumed.bundle).fingerprint == load_bundle(whole.bundle).fingerprint


def test_labels_that_cannot_be_learned_are_refused(ray_cluster: None, rows: Path, tmp_path: Path) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    constant = table.set_column(table.schema.get_field_index("label"), "label", pa.array(["x"] * table.num_rows))
    pq.write_table(constant.append_column("none", pa.nulls(table.num_rows, pa.string())), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="holds only"):
        train_model(run_config(tmp_path / "t.parquet", tmp_path, "x"))
    with pytest.raises(TableError, match="has no labelled row"):
        train_model(run_config(tmp_path / "t.parquet", tmp_path, "y", table={"label_column": "none"}))
    regression = {"table": {"label_column": "text"}, "task": {"kind": "regression"}}
    with pytest.raises(TableError, match="a regression needs finite numbers"):
        train_model(run_config(rows, tmp_path, "z", **regression))


def test_scoring_on_a_cluster_gives_what_one_process_gives(
    ray_cluster: None, rows: Path, bundle: str, tmp_path: Path
) -> None:
    options = ScoreConfig(precision="fp32", slice_rows=30, num_actors=2)
    seen: list[int] = []
    result = score_table(
        bundle, str(rows), str(tmp_path / "out"), options, on_slice=lambda ledger: seen.append(ledger.rows)
    )
    assert result.scored_slices == result.num_slices == len(seen) == 10
    assert sum(seen) == result.ledger.rows == 240
    assert verify_output(str(tmp_path / "out"), 2).passed
    score_in_process(bundle, str(rows), str(tmp_path / "alone"), options)
    tables = [
        pyarrow.dataset.dataset(str(tmp_path / name / "data")).to_table().sort_by("id") for name in ("out", "alone")
    ]
    assert tables[0].equals(tables[1])


def test_a_bundle_that_this_machine_cannot_reproduce_stops_the_run_with_its_own_words(
    ray_cluster: None, rows: Path, bundle: str, tmp_path: Path
) -> None:
    import dataclasses

    loaded = load_bundle(bundle)
    weights = {**loaded.weights, "head._linear.weight": loaded.weights["head._linear.weight"].flip(0).contiguous()}
    save_bundle(dataclasses.replace(loaded, weights=weights), str(tmp_path / "other"))
    with pytest.raises(BundleError, match="golden rows come out"):
        score_table(str(tmp_path / "other"), str(rows), str(tmp_path / "out"))


def test_every_odd_image_gets_a_status_and_nothing_is_said_on_the_terminal(
    shared: Path, bundle: str, tmp_path: Path
) -> None:
    folder = shared / "data" / "odd_images"
    names = sorted(path.name for path in folder.iterdir())
    table = pa.table({"image_path": names, "text": [f"picture {name}" for name in names]})
    pq.write_table(table, tmp_path / "odd.parquet")
    run = mmray("score", bundle, tmp_path / "odd.parquet", tmp_path / "out", "--image-root", folder)
    assert run.returncode == 0, run.stderr
    assert all(line.startswith("scoring: ") for line in run.stderr.splitlines()), run.stderr
    scored = pyarrow.dataset.dataset(str(tmp_path / "out" / "data")).to_table()
    assert scored.num_rows == len(names)
    statuses = scored["status"].to_pylist()
    assert set(statuses) == {"ok", "degraded"}
    assert all(
        (status == "ok") == (why is None) for status, why in zip(statuses, scored["reason"].to_pylist(), strict=True)
    )
    assert mmray("verify", tmp_path / "out", "--level", "2").returncode == 0


def mmray(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ALONE)


COMMAND = [sys.executable, "-m", "mmray.cli"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_resumes_with_the_same_command(
    rows: Path, bundle: str, tmp_path: Path, kill: signal.Signals
) -> None:
    output = tmp_path / "out"
    command = ["score", bundle, str(rows), str(output), "--slice-rows", "1", "--actors", "2"]
    with subprocess.Popen([*COMMAND, *command], stderr=subprocess.PIPE, text=True, env=ALONE) as process:
        wait_for(lambda: num_parts(output) > 0 or process.poll() is not None)
        process.send_signal(kill)
        _, errors = process.communicate()
    assert process.returncode == (130 if kill is signal.SIGINT else -kill), errors
    assert "Traceback" not in errors
    committed = num_parts(output)
    assert 0 < committed < 240, "it was stopped in the middle"
    assert not (output / "_SUCCESS").exists()
    finished = mmray(*command)
    assert finished.returncode == 0, finished.stderr
    scored = int(re.findall(r"(\d+) of 240 slices", finished.stdout)[0])
    assert 0 < scored <= 240 - committed, "workers that outlived their driver may have done some more"
    assert mmray("verify", output, "--level", "2").returncode == 0


def test_training_that_is_interrupted_says_so_and_continues(rows: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'[table]\ntrain = "{rows}"\n[image]\nsize = 16\n[model.image_encoder]\nchannels = [4]\nkind = "cnn"\n'
        f'[train]\nepochs = 400\npatience = 400\nstorage = "{tmp_path}"\nname = "run"\n'
    )
    with subprocess.Popen([*COMMAND, "train", str(recipe)], stderr=subprocess.PIPE, text=True, env=ALONE) as process:
        checkpoints = tmp_path / "run" / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("*.safetensors")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "bundle").exists()
    checkpoint = latest_checkpoint(str(tmp_path / "run"))
    assert checkpoint is not None
    finished = len(checkpoint.history)
    assert 0 < finished < 400
    shorter = mmray("train", recipe, "--set", f"train.epochs={finished}")
    assert shorter.returncode == 2, "another configuration is another run"


def test_a_finished_run_answers_without_ray_or_a_model(rows: Path, bundle: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    score_in_process(bundle, str(rows), str(output), ScoreConfig())
    code = (
        "import sys; from mmray.cli import main; code = main(['score', *sys.argv[1:]]); "
        "assert 'ray' not in sys.modules and 'mmray.score.worker' not in sys.modules; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, bundle, str(rows), str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nothing was scored" in run.stdout


def num_parts(output: Path) -> int:
    return len(list(output.glob("data/*.parquet")))


@pytest.mark.slow
def test_the_demo_does_what_it_says(tmp_path: Path) -> None:
    run = mmray("demo", "--dir", tmp_path / "demo")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "demo" / "scored" / "_SUCCESS").exists()
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    accuracy = {view: metrics["accuracy"] for view, metrics in report["evaluation"]["metrics"].items()}
    assert accuracy["all modalities"] >= max(accuracy["image only"], accuracy["text only"]) + 0.04
    ledger = report["scoring"]["ledger"]
    assert ledger["rows"] == ledger["ok"] + ledger["degraded"] + ledger["failed"]
    assert {(r["status"], r["reason"]) for r in report["scoring"]["reasons"]} == {
        ("degraded", "MISSING"),
        ("degraded", "TRUNCATED"),
        ("degraded", "BAD_FORMAT"),
        ("degraded", "EMPTY_FILE"),
        ("degraded", "NOT_ALLOWED"),
        ("degraded", "TEXT_NULL"),
        ("degraded", "IMAGE_NULL"),
        ("failed", "IMAGE_NULL"),
        ("failed", "BAD_FORMAT"),
    }
    assert report["scoring"]["verify"]["passed"]
    assert mmray("demo", "--dir", tmp_path).returncode == 2, "a folder with other files is left alone"
