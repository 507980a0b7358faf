"""Optimiser steps: parts of a batch are the batch, workers share it, and a loss that is no number names its rows."""

from typing import Any

import numpy as np
import pytest
import torch
from models import WORDS, small_config
from torch import Tensor, nn

from mmray.config import Config
from mmray.errors import ConfigError
from mmray.model import FusionModel
from mmray.train.optimizer import build_optimizer
from mmray.train.rows import Batch, file_id, shares
from mmray.train.steps import Steps, TrainingLoss

FILE = "s3://bucket/rows/part-0.parquet"


def batch_of(num: int, targets: Any) -> Batch:
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (num, 16, 16, 3), dtype=np.uint8),
        "token_ids": generator.integers(1, len(WORDS) + 2, (num, 8), dtype=np.int32),
        "ngram_ids": generator.integers(0, 51, (num, 20), dtype=np.int32),
        "present_image": np.ones(num, bool),
        "present_text": np.arange(num) % 4 != 0,
        "file": np.full(num, file_id(FILE)),
        "row": np.arange(100, 100 + num),
        "target": targets,
    }


class Slope(nn.Module):
    """The squared error of one slope for all rows: without normalisation, so that rows do not know each other."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, arrays: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor) -> Tensor:
        return ((self.slope * arrays["token_ids"].float().mean(dim=1) - targets) ** 2).mean()


def regression(**train: Any) -> Config:
    return small_config(task={"kind": "regression"}, train={"word_dropout": 0.0, "precision": "fp32", **train})


def slope_after(batches: list[tuple[Batch, float]], config: Config) -> float:
    model = Slope()
    list(Steps(model, model, build_optimizer(config, model), config, len(batches), [FILE]).run(batches))
    return model.slope.item()


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_is_one_step_of_the_whole_batch(parts: int) -> None:
    batches = [(batch_of(11, np.random.default_rng(k).normal(size=11)), 1.0) for k in range(4)]
    whole = slope_after(batches, regression())
    assert slope_after(batches, regression(accumulation=parts)) == pytest.approx(whole, abs=1e-6)
    assert whole != pytest.approx(0.5, abs=1e-4)


def test_the_gradients_of_any_number_of_workers_average_to_that_of_the_batch() -> None:
    batch, config = batch_of(11, np.random.default_rng(0).normal(size=11)), regression(clip_norm=0.0)

    def gradient(indices: Any, factor: float) -> float:
        model = Slope()
        part = {name: array[indices] for name, array in batch.items()}
        list(Steps(model, model, build_optimizer(config, model), config, 1, [FILE]).run([(part, factor)]))
        assert model.slope.grad is not None
        return model.slope.grad.item()

    whole = gradient(np.arange(11), 1.0)
    for world in (2, 3, 5):
        workers = [next(shares(np.arange(11), 11, rank, world)) for rank in range(world)]
        assert np.mean([gradient(*worker) for worker in workers]) == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows() -> None:
    targets = np.zeros(10)
    targets[3] = np.inf
    config = regression()
    model = FusionModel(config, num_labels=1, words=WORDS)
    files = ["elsewhere/part-1.parquet", FILE]
    steps = Steps(TrainingLoss(model, 0.3), model, build_optimizer(config, model), config, 7, files)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"became inf at step 1 of 7, on the rows part-0\.parquet:100, .* and 2 more"):
        list(steps.run([(batch_of(10, targets), 1.0)]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
