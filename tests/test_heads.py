"""Heads: losses in float32 whatever came in, and limits in which one loss becomes another."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mmray.config import TaskConfig
from mmray.model.heads import Head, build_head

TASKS: list[dict[str, Any]] = [
    {"kind": "binary"},
    {"kind": "binary", "loss": "focal"},
    {"kind": "multiclass"},
    {"kind": "multiclass", "loss": "focal"},
    {"kind": "multilabel"},
    {"kind": "regression"},
    {"kind": "regression", "loss": "huber"},
]


def head_of(task: dict[str, Any], num_labels: int = 3, **extra: Any) -> Head:
    torch.manual_seed(0)
    return build_head(TypeAdapter(TaskConfig).validate_python(task), 4, num_labels=num_labels, **extra)


def targets_of(task: dict[str, Any]) -> Tensor:
    return {
        "binary": torch.tensor([1.0, 0.0]),
        "multiclass": torch.tensor([2, 0]),
        "multilabel": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        "regression": torch.tensor([3.0, -1.5]),
    }[task["kind"]]


def named(task: dict[str, Any]) -> str:
    return "-".join(task.values())


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_a_loss_is_computed_in_float32_even_under_autocast(task: dict[str, Any]) -> None:
    head = head_of(task)
    logits = head(torch.randn(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(logits, targets_of(task))
        outputs = head.outputs(logits)
    assert loss.dtype == outputs.dtype == torch.float32
    assert torch.equal(loss, head.loss(logits, targets_of(task)))


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_a_loss_stays_finite_with_the_most_certain_logits(task: dict[str, Any]) -> None:
    head = head_of(task)
    for certainty in (200.0, -200.0):
        logits = torch.full((2, head(torch.zeros(1, 4)).shape[1]), certainty, requires_grad=True)
        loss = head.loss(logits, targets_of(task))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_focal_loss_without_focus_is_cross_entropy(kind: str) -> None:
    plain, focal = head_of({"kind": kind}), head_of({"kind": kind, "loss": "focal", "focal_gamma": 0.0})
    logits, targets = plain(torch.randn(2, 4)), targets_of({"kind": kind})
    torch.testing.assert_close(focal.loss(logits, targets), plain.loss(logits, targets))


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_balanced_weights_of_equally_frequent_labels_change_nothing(kind: str) -> None:
    counts = torch.tensor([50, 50] if kind == "binary" else [50, 50, 50])
    balanced = head_of({"kind": kind, "class_weights": "balanced"}, class_counts=counts)
    logits, targets = balanced(torch.randn(2, 4)), targets_of({"kind": kind})
    torch.testing.assert_close(balanced.loss(logits, targets), head_of({"kind": kind}).loss(logits, targets))


def test_hubers_loss_is_the_squared_error_halved_near_the_target_and_scales_with_beta() -> None:
    moments = {"target_mean": 2.0, "target_std": 0.5}
    logits, targets = torch.tensor([[0.3], [-0.2]]), torch.tensor([2.0, 2.0])
    squared = head_of({"kind": "regression", "beta": 3.0}, **moments).loss(logits, targets)
    huber = head_of({"kind": "regression", "loss": "huber", "beta": 3.0}, **moments).loss(logits, targets)
    torch.testing.assert_close(huber, squared / 2)


def test_a_regression_keeps_the_targets_unit_in_its_state() -> None:
    trained = head_of({"kind": "regression"}, target_mean=100.0, target_std=20.0)
    loaded = head_of({"kind": "regression"})
    loaded.load_state_dict(trained.state_dict())
    assert loaded.outputs(torch.tensor([[1.5]])).item() == 130.0


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_focal_loss_of_a_certain_and_right_row_has_a_gradient_of_zero_not_nan(kind: str, gamma: float) -> None:
    head = head_of({"kind": kind, "loss": "focal", "focal_gamma": gamma, "label_smoothing": 0.0})
    logits = torch.tensor([[200.0]] if kind == "binary" else [[200.0, 0.0, 0.0]], requires_grad=True)
    loss = head.loss(logits, torch.tensor([1]) if kind == "binary" else torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))
