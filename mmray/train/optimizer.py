"""The optimiser of a run, and its learning rate as a function of how many steps were taken."""

import math
from collections.abc import Callable

import torch
from torch import nn

from mmray.config import Config, TrainConfig


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimiser of what is trained; a pretrained network is a group with a factor of its own."""
    train = config.train
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    factor = getattr(config.model.image_encoder, "learning_rate_factor", 1.0)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factor if "._backbone." in name else 1.0, []).append(parameter)
    return kinds[train.optimizer](
        [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, train: TrainConfig, step: int, num_steps: int) -> None:
    """Sets each group's learning rate for a step: that of the schedule times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(train, step, num_steps) * group["factor"]


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step: a linear warm-up, then constant, linear to zero or half a cosine."""
    warmup = int(train.warmup_fraction * num_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return train.learning_rate * factor[train.schedule]
