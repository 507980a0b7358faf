"""From the fused embedding to a prediction and its loss, one head per task.

Inputs:
    features: float [B, D].
    targets: binary float [B] of 0 and 1; multiclass int64 [B] label indices; multilabel float [B, K] of 0 and 1;
        regression float [B] in the target's own unit.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmray.config import BinaryConfig, MulticlassConfig, MultilabelConfig, RegressionConfig, TaskConfig


class Head(nn.Module, ABC):
    """A linear layer, and what its outputs mean. Losses and outputs are computed in float32 whatever came in."""

    def __init__(self, input_dim: int, num_logits: int) -> None:
        super().__init__()
        self._linear = nn.Linear(input_dim, num_logits)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, K]."""
        logits: Tensor = self._linear(features)
        return logits.float()

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""

    @abstractmethod
    def outputs(self, logits: Tensor) -> Tensor:
        """Returns probabilities [B, number of labels], or the values [B, 1] of a regression."""


class ClassificationHead(Head):
    """A head whose outputs are probabilities, of the logits divided by a temperature T (`mmray.model.calibration`).

    The loss is of the logits as they are: T is fitted when they are learned.
    """

    temperature: Tensor

    def __init__(self, input_dim: int, num_logits: int) -> None:
        super().__init__(input_dim, num_logits)
        self.register_buffer("temperature", torch.tensor(1.0))

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits.float() / self.temperature


class BinaryHead(ClassificationHead):
    """p = sigmoid(z / T). L = - w_1 y log p - w_0 (1 - y) log(1 - p), times (1 - p_t)^gamma for the focal loss."""

    weights: Tensor

    def __init__(self, task: BinaryConfig, input_dim: int, class_counts: Tensor | None) -> None:
        super().__init__(input_dim, 1)
        self._gamma = task.focal_gamma if task.loss == "focal" else 0.0
        self._smoothing = task.label_smoothing
        self.register_buffer("weights", _balanced(class_counts, task.class_weights, 2), persistent=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""
        z, y = logits.float().squeeze(1), targets.float()
        smooth = y * (1 - self._smoothing) + self._smoothing / 2
        losses = F.binary_cross_entropy_with_logits(z, smooth, reduction="none")
        if self._gamma:
            # (1 - p_t)^gamma through its logarithm: the power itself has no finite gradient at p_t = 1.
            losses = losses * torch.exp(self._gamma * F.logsigmoid(torch.where(y > 0.5, -z, z)))
        return (losses * self.weights[y.long()]).mean()

    def outputs(self, logits: Tensor) -> Tensor:
        """Returns [B, 2]: the probability of the negative and of the positive label."""
        p = torch.sigmoid(self._tempered(logits))
        return torch.cat([1 - p, p], dim=1)


class MulticlassHead(ClassificationHead):
    """p = softmax(z / T). L = - w_y log p_y, times (1 - p_y)^gamma for the focal loss (Lin et al. 2017)."""

    weights: Tensor

    def __init__(self, task: MulticlassConfig, input_dim: int, num_labels: int, class_counts: Tensor | None) -> None:
        super().__init__(input_dim, num_labels)
        self._gamma = task.focal_gamma if task.loss == "focal" else 0.0
        self._smoothing = task.label_smoothing
        self.register_buffer("weights", _balanced(class_counts, task.class_weights, num_labels), persistent=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""
        z = logits.float()
        losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=self._smoothing)
        if self._gamma:
            # log(1 - p_y), of all labels but y: the power itself has no finite gradient at p_y = 1.
            others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(dim=1)
            losses = losses * torch.exp(self._gamma * (others - z.logsumexp(dim=1)))
        return (losses * self.weights[targets]).mean()

    def outputs(self, logits: Tensor) -> Tensor:
        """Returns the probability of each label [B, K]."""
        return torch.softmax(self._tempered(logits), dim=1)


class MultilabelHead(ClassificationHead):
    """p_k = sigmoid(z_k / T). L = mean over k of - w_k y_k log p_k - (1 - y_k) log(1 - p_k)."""

    weights: Tensor

    def __init__(
        self, task: MultilabelConfig, input_dim: int, num_labels: int, class_counts: Tensor | None, num_rows: int
    ) -> None:
        super().__init__(input_dim, num_labels)
        weights = torch.ones(num_labels)
        if task.class_weights == "balanced" and class_counts is not None:
            positives = class_counts.float().clamp_min(1)
            weights = (num_rows - positives).clamp_min(1) / positives
        self.register_buffer("weights", weights, persistent=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), pos_weight=self.weights)

    def outputs(self, logits: Tensor) -> Tensor:
        """Returns the probability of each label [B, K]."""
        return torch.sigmoid(self._tempered(logits))


class RegressionHead(Head):
    """F = mean + std * z. L = beta * |z - (Y - mean) / std|^2, or beta times Huber's loss of the same difference."""

    mean: Tensor
    std: Tensor

    def __init__(self, task: RegressionConfig, input_dim: int, mean: float, std: float) -> None:
        super().__init__(input_dim, 1)
        self._beta, self._delta = task.beta, task.huber_delta if task.loss == "huber" else None
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""
        z, y = logits.float().squeeze(1), (targets.float() - self.mean) / self.std
        if self._delta is not None:
            return self._beta * F.huber_loss(z, y, delta=self._delta)
        return self._beta * F.mse_loss(z, y)

    def outputs(self, logits: Tensor) -> Tensor:
        """Returns the values [B, 1] in the target's own unit."""
        return logits.float() * self.std + self.mean


def build_head(
    task: TaskConfig,
    input_dim: int,
    *,
    num_labels: int,
    class_counts: Tensor | None = None,
    num_rows: int = 0,
    target_mean: float = 0.0,
    target_std: float = 1.0,
) -> Head:
    """Builds the head of a task.

    Args:
        class_counts: [K] training rows of each label, for balanced weights.
        num_rows: training rows, for balanced weights of a multilabel task.
        target_mean, target_std: of the training rows' targets, for a regression.
    """
    match task:
        case BinaryConfig():
            return BinaryHead(task, input_dim, class_counts)
        case MulticlassConfig():
            return MulticlassHead(task, input_dim, num_labels, class_counts)
        case MultilabelConfig():
            return MultilabelHead(task, input_dim, num_labels, class_counts, num_rows)
        case RegressionConfig():
            return RegressionHead(task, input_dim, target_mean, target_std)


def _balanced(class_counts: Tensor | None, kind: str, num_labels: int) -> Tensor:
    """Returns w_k = N / (K N_k), which averages to one over the training rows; ones where not asked for."""
    if kind == "none" or class_counts is None:
        return torch.ones(num_labels)
    counts = class_counts.float().clamp_min(1)
    return counts.sum() / (num_labels * counts)
