"""A modality that is missing costs what it knew and no more: the rest says what a model of its own would say."""

from typing import Any

import numpy as np
import pytest
import torch
from models import WORDS, small_config

from mmray.config import Config
from mmray.model import FusionModel
from mmray.train.optimizer import build_optimizer
from mmray.train.rows import Batch, file_id, shares
from mmray.train.steps import Steps, TrainingLoss, to_tensors

MODALITIES = ("image", "text")
FUSIONS: list[dict[str, Any]] = [
    {"kind": "weighted_sum"},
    {"kind": "weighted_sum", "alpha": "gated"},
    {"kind": "concat"},
    {"kind": "conv"},
    {"kind": "attention"},
    {"kind": "bilinear"},
]
SILENT = {"image": 0.4, "text": 0.3}  # shares of rows in which a modality says nothing of the label


def rows_of(num: int, seed: int) -> Batch:
    """Three labels, which a colour says and a word; but some images are grey, and some texts have another word."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, num, p=[0.6, 0.2, 0.2])  # uneven: who knows nothing has one best guess
    told = {name: generator.random(num) >= SILENT[name] for name in MODALITIES}
    images = generator.integers(0, 60, (num, 16, 16, 3))
    images[np.arange(num), :, :, labels] += 150 * told["image"][:, None, None]
    tokens = generator.integers(5, len(WORDS) + 2, (num, 8))
    tokens[told["text"], 0] = 2 + labels[told["text"]]
    presence = {f"present_{name}": np.ones(num, bool) for name in MODALITIES}
    identity = {"file": np.full(num, file_id("rows")), "row": np.arange(num)}
    return {
        "image": images.astype(np.uint8),
        "token_ids": tokens,
        "ngram_ids": np.zeros((num, 20), np.int64),
        **presence,
        **identity,
        "target": labels,
    }


def trained(config: Config, rows: Batch) -> FusionModel:
    torch.manual_seed(0)
    model = FusionModel(config, num_labels=3, words=WORDS)
    loss = TrainingLoss(model, config.train.auxiliary_weight)
    epochs = [np.random.default_rng(k).permutation(len(rows["target"])) for k in range(config.train.epochs)]
    batches = [
        ({name: array[mine] for name, array in rows.items()}, factor)
        for mine, factor in shares(np.concatenate(epochs), config.train.batch_size, 0, 1)
    ]
    list(Steps(loss, model, build_optimizer(config, model), config, len(batches), ["rows"]).run(batches))
    return model.eval()


def accuracy(model: FusionModel, config: Config, rows: Batch, kept: tuple[str, ...]) -> float:
    """Of the rows with only these modalities."""
    arrays, present, targets = to_tensors(rows, config, torch.device("cpu"))
    present = {name: mask & (name in kept) for name, mask in present.items()}
    with torch.inference_mode():
        return float((model(arrays, present).argmax(dim=1) == targets).float().mean())


def config_of(*modalities: str, **model: Any) -> Config:
    columns = {f"{name}_column": "" for name in MODALITIES if name not in modalities}
    train = {"epochs": 4, "batch_size": 50, "learning_rate": 0.01, "word_dropout": 0.0, "augment": False}
    return small_config(table={"train": "rows", **columns}, model=model, train=train)


def only(rows: Batch, *modalities: str) -> Batch:
    others = {"image": ("image", "present_image"), "text": ("token_ids", "ngram_ids", "present_text")}
    gone = {name for modality in MODALITIES if modality not in modalities for name in others[modality]}
    return {name: array for name, array in rows.items() if name not in gone}


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    """The accuracy of a model that never saw the other modality."""
    rows, unseen, found = rows_of(1000, seed=0), rows_of(2000, seed=1), {}
    for name in MODALITIES:
        config = config_of(name)
        model = trained(config, only(rows, name))
        found[name] = accuracy(model, config, only(unseen, name), (name,))
    return found


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(fusion.values()))
def test_without_a_modality_the_accuracy_is_that_of_a_model_of_the_other(
    fusion: dict[str, Any], alone: dict[str, float]
) -> None:
    config, rows, unseen = config_of(*MODALITIES, fusion=fusion), rows_of(1000, seed=0), rows_of(2000, seed=1)
    model = trained(config, rows)
    for name in MODALITIES:
        assert accuracy(model, config, unseen, (name,)) == pytest.approx(alone[name], abs=0.01)
    assert accuracy(model, config, unseen, MODALITIES) > max(alone.values()) + 0.05, "there was something to lose"
