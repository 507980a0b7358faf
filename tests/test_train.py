"""Training, here and on a real Ray cluster: every task, what there is to learn, interruptions, labels that are none.

Tests without a cluster come first: where there is one, it is used.
"""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from models import colour_table, score_in_process, small_config
from processes import ALONE, COMMAND, mmray, wait_for
from ray.train.torch import TorchTrainer

from mmray.bundle import load_bundle
from mmray.compare import compare_fusions
from mmray.errors import ConfigError, TableError
from mmray.evaluate import evaluate_bundle
from mmray.options import ScoreConfig
from mmray.score.verify import verify_output
from mmray.train.checkpoint import latest_checkpoint
from mmray.train.job import TrainResult, train_model
from mmray.train.trainer import Trainer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=240)


MULTILABEL: dict[str, Any] = {
    "table": {"label_column": "both"},
    "task": {"kind": "multilabel"},
    "model": {"text_encoder": {"kind": "gru", "hidden_dim": 8}, "fusion": {"kind": "concat"}},
    "train": {"accumulation": 2},
}
REGRESSION: dict[str, Any] = {
    "table": {"label_column": "value"},
    "task": {"kind": "regression", "loss": "mse", "beta": 2.0},
    "model": {"text_encoder": {"kind": "rnn", "hidden_dim": 8}, "fusion": {"kind": "conv"}},
}
# Trained until they are interrupted: with chance in every place that has some.
BINARY: dict[str, Any] = {
    "table": {"label_column": "is_red"},
    "task": {"kind": "binary", "positive_label": "yes", "calibrate": True},
    "model": {
        "text_encoder": {"kind": "lstm", "hidden_dim": 8, "bidirectional": True},
        "fusion": {"kind": "weighted_sum", "alpha": "gated"},
        "modality_dropout": 0.3,
    },
    "train": {"epochs": 4, "batch_size": 8},
}

IN_THE_FOURTH = "epoch-000003.step-000000020.safetensors"


def run_config(rows: Path, storage: Path, name: str, **sections: Any) -> Any:
    base = small_config().model.model_dump()
    table = {"train": str(rows), **sections.pop("table", {})}
    model = {**base, **sections.pop("model", {})}
    train = {"epochs": 3, "learning_rate": 0.01, "storage": str(storage), "name": name, **sections.pop("train", {})}
    return small_config(table=table, model=model, train=train, **sections)


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of the last configuration that no cluster had a part in; comes before there is one."""
    result = train_model(run_config(rows, tmp_path_factory.mktemp("whole"), "run", **BINARY))
    assert not ray.is_initialized()
    return result


@pytest.fixture(scope="module")
def saved_often(rows: Path, whole: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The same run, whose last checkpoints but one are of the middle of an epoch."""
    often = {**BINARY, "train": {**BINARY["train"], "checkpoint_minutes": 0}}
    result = train_model(run_config(rows, tmp_path_factory.mktemp("often"), "run", **often))
    assert not ray.is_initialized()
    assert result.history == whole.history
    return result


def check_it_ends_the_same(run: TrainResult, rows: Path, storage: Path, last: str) -> None:
    """Trains on from a checkpoint of a run, as if its driver had been killed after it."""
    shutil.copytree(Path(run.bundle).parent, storage / "run")
    checkpoints = storage / "run" / "checkpoints"
    for lost in [*(storage / "run" / "bundle").iterdir(), checkpoints / "epoch-000004.safetensors"]:
        lost.unlink()
    assert max(path.name for path in checkpoints.iterdir()) == last
    starts: list[tuple[int, int]] = []
    resumed = train_model(run_config(rows, storage, "run", **BINARY), on_start=lambda *epochs: starts.append(epochs))
    assert starts == [(4, 3)], "epochs, and how many of them are done"
    assert resumed.trained_epochs == 1
    assert resumed.history == run.history
    assert load_bundle(resumed.bundle).fingerprint == load_bundle(run.bundle).fingerprint


def test_a_finished_run_is_returned_and_an_interrupted_one_ends_the_same(
    rows: Path, whole: TrainResult, saved_often: TrainResult, tmp_path: Path
) -> None:
    again = train_model(run_config(rows, Path(whole.bundle).parents[1], "run", **BINARY))
    assert again.trained_epochs == 0
    temperature = load_bundle(whole.bundle).weights["head.temperature"].item()
    assert temperature == pytest.approx(whole.best["temperature"])
    assert again.bundle == whole.bundle
    check_it_ends_the_same(whole, rows, tmp_path / "after", "epoch-000003.safetensors")
    check_it_ends_the_same(saved_often, rows, tmp_path / "in", IN_THE_FOURTH)


def test_what_a_callback_raises_is_no_fault_of_the_machine(rows: Path, tmp_path: Path) -> None:
    def start(epochs: int, done: int) -> None:
        raise LookupError("of the caller's own")

    with pytest.raises(LookupError):
        train_model(run_config(rows, tmp_path, "run"), on_start=start)


def test_a_number_is_learned_and_what_was_learned_scores(rows: Path, tmp_path: Path) -> None:
    check_it_learned(train_model(run_config(rows, tmp_path, "run", **REGRESSION)), rows, tmp_path)


def check_it_learned(run: TrainResult, rows: Path, folder: Path) -> None:
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    bundle = load_bundle(run.bundle)
    assert bundle.golden is not None
    assert bundle.golden.num_rows == 10
    assert bundle.metrics["train_rows"] + bundle.metrics["validation_rows"] == 240
    assert bundle.metrics["inputs"]["rows"] == 240
    assert bundle.metrics["inputs"]["absent"] == {"image": 0, "text": 0}
    assert bundle.metrics["unlabelled_rows"] == bundle.metrics["unlabelled_validation_rows"] == 0
    ledger = score_in_process(run.bundle, str(rows), str(folder / "out"), ScoreConfig(probabilities=True))
    assert ledger.statuses == {"ok": 240}
    assert verify_output(str(folder / "out"), 2).passed


def test_a_model_learns_what_there_is_to_learn_and_each_modality_is_measured_and_compared_once(
    rows: Path, tmp_path: Path
) -> None:
    config = run_config(rows, tmp_path, "learn", train={"epochs": 12, "auxiliary_weight": 0.5, "batch_size": 16})
    seen: list[dict[str, Any]] = []
    compared = compare_fusions(config, ["weighted_sum"], 1, table=str(rows), on_run=seen.append)
    (run,) = compared["runs"]
    assert seen == [run]
    assert set(run["metrics"]) == {"all modalities", "image only", "text only", "late average"}
    assert all(metrics["accuracy"] > 0.9 for metrics in run["metrics"].values())
    assert run["rows"] == 240
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert compare_fusions(config, ["weighted_sum"], 1, table=str(rows)) == compared
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


# SIGTERM goes the way of Ctrl-C, and one step further.
@pytest.mark.parametrize(
    ("workers", "number", "exit_code"),
    [
        (1, signal.SIGTERM, 5),
        pytest.param([1, 2], signal.SIGTERM, 5, marks=pytest.mark.long),
        pytest.param([1, 2], signal.SIGINT, 130, marks=pytest.mark.long),
    ],
)
def test_training_that_is_stopped_says_so_and_continues(
    rows: Path, tmp_path: Path, workers: object, number: signal.Signals, exit_code: int
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'[table]\ntrain = "{rows}"\n[image]\nsize = 16\n[model.image_encoder]\nchannels = [4]\nkind = "cnn"\n'
        f'[train]\nepochs = 400\npatience = 400\nstorage = "{tmp_path}"\nname = "run"\nnum_workers = {workers}\n'
    )
    with subprocess.Popen([*COMMAND, "train", str(recipe)], stderr=subprocess.PIPE, text=True, env=ALONE) as process:
        checkpoints = tmp_path / "run" / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("*.safetensors")) or process.poll() is not None)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == exit_code, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "bundle").exists()
    checkpoint = latest_checkpoint(str(tmp_path / "run"))
    assert checkpoint is not None
    finished = len(checkpoint.history)
    assert 0 < finished < 400
    shorter = mmray("train", recipe, "--set", f"train.epochs={finished}")
    assert shorter.returncode == 2, "another configuration is another run"


def test_a_run_that_began_without_a_cluster_ends_the_same_on_one(
    saved_often: TrainResult, ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    check_it_ends_the_same(saved_often, rows, tmp_path, IN_THE_FOURTH)


def test_a_cluster_measures_what_one_process_does(whole: TrainResult, ray_cluster: None, rows: Path) -> None:
    here, there = (evaluate_bundle(whole.bundle, str(rows), ScoreConfig(local=local)) for local in (True, False))
    assert there.metrics == here.metrics
    assert there.rows == here.rows == len(there.image_weight) == 240


@pytest.mark.parametrize("cache_bytes", [0, pytest.param(2**30, marks=pytest.mark.long)])
def test_workers_with_copies_take_the_next_epoch_of_workers_that_share_the_weights(
    ray_cluster: None, rows: Path, tmp_path: Path, cache_bytes: int
) -> None:
    """Of a table that does not fit in memory and is streamed; for long, of one that fits, too."""
    own = {**MULTILABEL["train"], "cache_bytes": cache_bytes}
    seen: list[dict[str, Any]] = []
    config = run_config(rows, tmp_path, "run", **{**MULTILABEL, "train": {**own, "num_workers": 2, "shard": True}})
    whole = train_model(config, on_epoch=seen.append)
    assert [entry["epoch"] for entry in whole.history] == [1, 2, 3]
    assert seen == whole.history
    check_it_learned(whole, rows, tmp_path / "shared")
    for lost in [*(tmp_path / "run" / "bundle").iterdir(), tmp_path / "run/checkpoints/epoch-000003.safetensors"]:
        lost.unlink()
    resumed = train_model(run_config(rows, tmp_path, "run", **{**MULTILABEL, "train": {**own, "num_workers": [1, 2]}}))
    assert resumed.trained_epochs == 1
    assert resumed.history[:2] == whole.history[:2]
    for name, value in whole.history[2].items():
        assert resumed.history[2][name] == (None if value is None else pytest.approx(value, rel=1e-3)), name
    assert resumed.history[2]["train_loss"] != pytest.approx(whole.history[1]["train_loss"], rel=1e-2)
    check_it_learned(resumed, rows, tmp_path / "copied")


def test_no_process_starts_that_has_nothing_to_do(ray_cluster: None) -> None:
    def kinds(trainer: TorchTrainer) -> set[str]:
        return {type(callback).__name__ for callback in trainer._create_default_callbacks()}

    idle = {"PlacementGroupCleanerCallback", "DatasetsCallback"}  # the first of which is waited for, for 12 s
    assert kinds(TorchTrainer(print)) - kinds(Trainer(print)) == idle
    some: dict[str, Any] = {"train": ray.data.range(1)}
    assert kinds(TorchTrainer(print)) - kinds(Trainer(print, datasets=some)) == {"PlacementGroupCleanerCallback"}


def test_labels_that_cannot_be_learned_are_refused(ray_cluster: None, rows: Path, tmp_path: Path) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    constant = table.set_column(table.schema.get_field_index("label"), "label", pa.array(["x"] * table.num_rows))
    pq.write_table(constant.append_column("none", pa.nulls(table.num_rows, pa.string())), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="holds only"):
        train_model(run_config(tmp_path / "t.parquet", tmp_path, "x"))
    with pytest.raises(TableError, match="has no labelled row"):
        train_model(run_config(tmp_path / "t.parquet", tmp_path, "y", table={"label_column": "none"}))
    few = pa.array([None if k % 10 < 6 else "xy"[k % 2] for k in range(table.num_rows)])
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", few), tmp_path / "few.parquet")
    held_out = {"validation": str(rows), "image_roots": [str(rows)]}
    with pytest.raises(
        TableError, match=r"72 of 120 training rows have no label, more than table\.max_unlabelled = 0\.5"
    ):
        train_model(run_config(tmp_path / "few.parquet", tmp_path, "few", table=held_out))
    with pytest.raises(TableError, match="240 of 240 validation rows have no label that training rows have"):
        train_model(run_config(tmp_path / "few.parquet", tmp_path, "other", table={**held_out, "max_unlabelled": 0.7}))
    regression = {"table": {"label_column": "text"}, "task": {"kind": "regression"}}
    with pytest.raises(TableError, match="a regression needs finite numbers"):
        train_model(run_config(rows, tmp_path, "z", **regression))
