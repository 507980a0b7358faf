"""Temperature scaling: probabilities come to mean what they say, and no prediction changes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import colour_table, small_bundle

from mmray.metrics import measure
from mmray.model.calibration import LARGEST, fit_temperature
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.source import ImageSource


def test_the_temperature_of_a_binary_model_that_is_right_three_times_in_four() -> None:
    # All logits say +-4: sigmoid(4 / T) = 3/4 where 4 / T = log 3.
    logits, targets = torch.tensor([[4.0], [4.0], [-4.0], [4.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert fit_temperature(logits, targets) == pytest.approx(4 / math.log(3), rel=1e-6)


def test_the_temperature_of_a_multiclass_model_that_is_right_half_of_the_time() -> None:
    # softmax([z, 0, 0] / T) = [1/2, 1/4, 1/4] where z / T = log 2.
    logits, targets = torch.tensor([[5.0, 0.0, 0.0]] * 4), torch.tensor([0, 0, 1, 2])
    assert fit_temperature(logits, targets) == pytest.approx(5 / math.log(2), rel=1e-6)


def test_the_temperature_of_a_multilabel_model_is_one_for_all_labels() -> None:
    logits = torch.tensor([[2.0, -2.0], [2.0, 2.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, targets) == pytest.approx(2 / math.log(3), rel=1e-6)


def test_rows_without_a_mistake_do_not_make_certainty_out_of_it() -> None:
    assert fit_temperature(torch.tensor([[3.0], [-3.0]]), torch.tensor([1.0, 0.0])) == pytest.approx(1 / LARGEST)
    assert fit_temperature(torch.tensor([[3.0], [-3.0]]), torch.tensor([0.0, 1.0])) == pytest.approx(LARGEST)


def test_calibration_error_falls_on_rows_that_were_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(4000, 5, generator=generator) * 2
    targets = torch.multinomial(torch.softmax(honest, 1), 1, generator=generator).squeeze(1)
    logits = 3 * honest  # over-confident by a factor of three
    temperature = fit_temperature(logits[:2000], targets[:2000])
    assert temperature == pytest.approx(3, rel=0.1)
    before, after = (
        measure("multiclass", torch.softmax(z[2000:], 1).numpy(), targets[2000:].numpy())
        for z in (logits, logits / temperature)
    )
    assert before["calibration_error"] > 0.1
    assert after["calibration_error"] < 0.03
    assert after["log_loss"] < before["log_loss"]
    assert after["accuracy"] == before["accuracy"]


def test_a_bundles_temperature_is_in_every_score_and_in_its_fingerprint(tmp_path: Path) -> None:
    rows = colour_table(tmp_path / "rows", rows=6)
    plain = small_bundle()
    warm = dataclasses.replace(plain, weights={**plain.weights, "head.temperature": torch.tensor(2.0)})
    texts = {"text": ["the red square", "a blue one"], "image": [str(rows / "images" / f"{k}.jpg") for k in range(2)]}
    one, other = (
        Predictor(bundle, ImageSource([str(rows)], 2**20), ScoreConfig()).predict(texts, alone=True)
        for bundle in (plain, warm)
    )
    for cold, mild in [(one.outputs, other.outputs), (one.alone["text"], other.alone["text"])]:
        expected = np.sqrt(cold) / np.sqrt(cold).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mild, expected, rtol=1e-5)
    assert plain.fingerprint != warm.fingerprint
