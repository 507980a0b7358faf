"""One optimiser step after another: the loss of a batch, its gradients.

Reads batches of preprocessed rows -> changes a model. Nothing here knows of Ray: workers share batches by the factor
that comes with each.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmray.config import Config
from mmray.errors import DivergenceError
from mmray.model import FusionModel
from mmray.model.precision import autocast, resolve_precision
from mmray.train.augment import augment
from mmray.train.optimizer import set_learning_rate
from mmray.train.rows import Batch, file_id

NAMED_ROWS = 8  # of a batch whose loss is not finite


class TrainingLoss(nn.Module):
    """The loss of a batch: of the fused prediction, and of each modality alone where `auxiliary_weight` asks for it.

    L = loss(F) + w * sum over modalities m of loss(F with all but m withheld), over the rows that have m.
    """

    def __init__(self, model: FusionModel, auxiliary_weight: float) -> None:
        super().__init__()
        self.model, self._auxiliary_weight = model, auxiliary_weight

    def forward(self, arrays: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        embeddings = self.model.encode(arrays)
        loss = self.model.head.loss(self.model.fuse(embeddings, self.model.withhold(present)), targets)
        if not self._auxiliary_weight or len(present) < 2:
            return loss
        for name, mask in present.items():
            if not mask.any():
                continue
            rows = {other: embedding[mask] for other, embedding in embeddings.items()}
            alone = {other: torch.full_like(mask[mask], other == name) for other in present}
            loss = loss + self._auxiliary_weight * self.model.head.loss(self.model.fuse(rows, alone), targets[mask])
        return loss

    def predict(self, arrays: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Returns logits [B, K] and the weight of the image in each row [B], where the fusion has one."""
        embeddings = self.model.encode(arrays)
        return self.model.fuse(embeddings, present), self.model.image_weight(embeddings, present)


class Steps:
    """Optimiser steps of a run."""

    def __init__(
        self,
        loss: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        num_steps: int,
        files: Sequence[str],
    ) -> None:
        """Takes no step yet.

        Args:
            loss: gives the loss of a batch, as `TrainingLoss` does; DistributedDataParallel may stand around it.
            model: what it trains.
            optimizer: of the model.
            config: of the run.
            num_steps: steps of the whole run.
            files: URIs of the training table's files, to name rows by.
        """
        self._loss, self._model, self._optimizer = loss, model, optimizer
        self._config, self._num_steps, self._files = config, num_steps, files
        self.done = 0
        """Steps taken, also by those before an interruption."""
        self._device = next(model.parameters()).device
        self._precision = resolve_precision(config.train.precision, str(self._device))
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision == "fp16")

    def run(self, batches: Iterable[tuple[Batch, float]]) -> Iterator[float]:
        """Yields the loss of each step.

        Raises:
            DivergenceError: a loss is not finite; names the rows of its batch.
        """
        self._model.train()
        for batch, factor in batches:
            yield self._step(batch, factor)

    def _step(self, batch: Batch, factor: float) -> float:
        train = self._config.train
        set_learning_rate(self._optimizer, train, self.done, self._num_steps)
        self._optimizer.zero_grad(set_to_none=True)
        parts = list(_parts(batch, train.accumulation))
        loss = sum(self._backward(part, factor * share, k == len(parts) - 1) for k, (part, share) in enumerate(parts))
        if train.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), train.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.done += 1
        return loss

    def _backward(self, batch: Batch, factor: float, last: bool) -> float:
        """Adds the gradients of a part of a batch; returns what it adds to the loss."""
        arrays, present, targets = to_tensors(batch, self._config, self._device)
        arrays = augment(arrays, self._config.train)
        with _exchange(self._loss, last):  # workers exchange their gradients once a step
            with autocast(str(self._device), self._precision):
                loss: Tensor = factor * self._loss(arrays, present, targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergenceError(self._not_finite(value, batch))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return value

    def _not_finite(self, loss: float, batch: Batch) -> str:
        names = {file_id(uri): uri.rpartition("/")[2] for uri in self._files}
        rows = [f"{names[file]}:{row}" for file, row in zip(batch["file"], batch["row"], strict=True)]
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        return (
            f"the training loss became {loss} at step {self.done + 1} of {self._num_steps}, on the rows "
            f"{', '.join(rows[:NAMED_ROWS])}{more}; look at their labels, lower train.learning_rate, or use "
            "train.precision = 'fp32'"
        )


def _exchange(loss: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Returns a context whose gradients workers exchange as they are computed, or together with later ones."""
    if hasattr(loss, "set_requires_gradient_sync"):  # as FSDP2's module, whose import would cost a second
        loss.set_requires_gradient_sync(now)  # type: ignore[operator]
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not now else nullcontext()


def _parts(batch: Batch, number: int) -> Iterator[tuple[Batch, float]]:
    """Yields a batch in parts of nearly equal size, with each one's share of its rows."""
    rows = len(batch["target"])
    for indices in np.array_split(np.arange(rows), number):
        yield {name: array[indices] for name, array in batch.items()} if number > 1 else batch, len(indices) / rows


def to_tensors(
    batch: Batch, config: Config, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Returns arrays, presence masks and targets of a batch on a device."""
    # The blocks may be read-only views of shared memory; `take` made these arrays the worker's own.
    arrays = {name: array for name, array in batch.items() if name not in ("file", "row")}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    targets = tensors.pop("target")
    present = {name: tensors.pop(f"present_{name}") for name in config.table.modalities}
    return tensors, present, targets.float() if config.task.kind in ("binary", "regression") else targets
