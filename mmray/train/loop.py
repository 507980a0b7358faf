"""What each training worker does: epochs of steps, a validation after each, a checkpoint of both.

Reads preprocessed rows -> gives checkpoints in the run's folder. A worker that starts again continues after the last
complete checkpoint, so neither a lost worker nor a killed driver costs more than an epoch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmray.config import Config
from mmray.errors import ConfigError, TableError
from mmray.metrics import measure
from mmray.model import FusionModel
from mmray.model.precision import autocast, resolve_precision
from mmray.train.augment import augment
from mmray.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from mmray.train.optimizer import build_optimizer, set_learning_rate
from mmray.train.rows import Batch, CachedRows, Rows, ShuffledRows, StreamedRows

EVALUATION_BATCH = 128


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


@dataclass(frozen=True)
class Settings:
    """What the driver tells every worker."""

    config: Config
    folder: str
    """Folder or URI of the run's checkpoints."""
    num_labels: int
    words: Sequence[str]
    class_counts: Sequence[int]
    """Rows (for multilabel, positive rows) of each label; empty for regression."""
    target_mean: float
    target_std: float
    num_rows: int
    """Training rows."""
    cached: bool
    num_threads: int
    progress: Any
    """A Ray queue for the entries of the history."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(self.num_rows // self.config.train.batch_size, 1) * self.config.train.epochs


def train_worker(arguments: dict[str, Settings]) -> None:
    """Runs on every worker of the group; Ray Train takes one mapping, which holds `settings`."""
    settings = arguments["settings"]
    config, train = settings.config, settings.config.train
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(train.seed)
    model = _build(settings)
    # The absent embedding of a modality gets no gradient from a batch in which it is never absent.
    loss_module = ray.train.torch.prepare_model(
        TrainingLoss(model, train.auxiliary_weight), parallel_strategy_kwargs={"find_unused_parameters": True}
    )
    optimizer = build_optimizer(config, model)
    rows, validation = _rows(settings), CachedRows("validation")
    state = _from_first(latest_checkpoint(settings.folder) if rank == 0 else None)
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    if state is not None:
        state.restore(model, optimizer)
        history, best = state.history, dict(state.best)
    steps = _Steps(loss_module, model, optimizer, settings, done=len(history) * settings.num_steps // train.epochs)
    while len(history) < train.epochs and not _should_stop(history, config):
        torch.manual_seed(train.seed + 1000 * len(history) + rank)  # the same whether the run was interrupted or not
        loss = _mean(steps.run(rows.epoch(len(history))))
        entry = {"epoch": len(history) + 1, "train_loss": loss, **_validate(model, validation, config)}
        history = [*history, _from_first(entry)]
        if not math.isfinite(history[-1]["train_loss"]):
            raise ConfigError(
                f"the training loss became {history[-1]['train_loss']} in epoch {len(history)}; "
                "lower train.learning_rate or use train.precision = 'fp32'"
            )
        if best_epoch(history) == len(history) - 1:
            best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if rank == 0:
            save_checkpoint(settings.folder, Checkpoint.of(model, optimizer, best, history))
            settings.progress.put(history[-1])
        ray.train.report(history[-1])


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """Returns the position of the entry with the lowest validation loss.

    A mean over rows, and so much less of a lottery on a few hundred of them than a count of hits; and scores are used
    as probabilities, which is what the loss judges.
    """
    return min(range(len(history)), key=lambda k: float(history[k]["validation_loss"]))


def _should_stop(history: Sequence[Mapping[str, Any]], config: Config) -> bool:
    patience = config.train.patience
    return bool(patience and history and len(history) - 1 - best_epoch(history) >= patience)


class _Steps:
    """Optimiser steps, with the learning rate a function of how many were taken."""

    def __init__(
        self, loss: nn.Module, model: FusionModel, optimizer: torch.optim.Optimizer, settings: Settings, done: int
    ) -> None:
        self._loss, self._model, self._optimizer, self._settings, self._done = loss, model, optimizer, settings, done
        self._train = settings.config.train
        self._device = next(model.parameters()).device
        self._precision = resolve_precision(self._train.precision, str(self._device))
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision == "fp16")

    def run(self, batches: Iterable[Batch]) -> Iterator[float]:
        """Yields the loss of each step."""
        self._model.train()
        for batch in batches:
            yield self._step(batch)

    def _step(self, batch: Batch) -> float:
        arrays, present, targets = to_tensors(batch, self._settings.config, self._device)
        arrays = augment(arrays, self._train)
        set_learning_rate(self._optimizer, self._train, self._done, self._settings.num_steps)
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(str(self._device), self._precision):
            loss: Tensor = self._loss(arrays, present, targets)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._train.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._train.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._done += 1
        return float(loss.detach())


def to_tensors(
    batch: Batch, config: Config, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Returns arrays, presence masks and targets of a batch on a device."""
    # The blocks are read-only views of shared memory; `take` made these arrays the worker's own.
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in batch.items()}
    targets = tensors.pop("target")
    present = {name: tensors.pop(f"present_{name}") for name in config.table.modalities}
    return tensors, present, targets.float() if config.task.kind in ("binary", "regression") else targets


@torch.no_grad()
def _validate(model: FusionModel, rows: CachedRows, config: Config) -> dict[str, float | None]:
    """Measures every validation row once, over all workers."""
    model.eval()
    device = next(model.parameters()).device
    outputs, targets, losses, weights = [], [], [], []
    for batch in rows.mine(EVALUATION_BATCH):
        arrays, present, wanted = to_tensors(batch, config, device)
        embeddings = model.encode(arrays)
        logits = model.fuse(embeddings, present)
        weight = model.image_weight(embeddings, present)
        outputs.append(model.head.outputs(logits).cpu().numpy())
        targets.append(wanted.cpu().numpy())
        losses.append(float(model.head.loss(logits, wanted)) * len(wanted))
        weights += [] if weight is None else weight.tolist()
    parts = _gather((outputs, targets, sum(losses), weights))
    all_outputs = np.concatenate([array for part in parts for array in part[0]])
    all_targets = np.concatenate([array for part in parts for array in part[1]])
    all_weights = [weight for part in parts for weight in part[3]]
    return {
        "validation_loss": sum(part[2] for part in parts) / len(all_targets),
        "image_weight": float(np.mean(all_weights)) if all_weights else None,
        **measure(config.task.kind, all_outputs, all_targets),
    }


def _build(settings: Settings) -> FusionModel:
    return FusionModel(
        settings.config,
        num_labels=settings.num_labels,
        words=settings.words,
        class_counts=torch.tensor(settings.class_counts) if settings.class_counts else None,
        num_rows=settings.num_rows,
        target_mean=settings.target_mean,
        target_std=settings.target_std,
    )


def _rows(settings: Settings) -> Rows:
    train = settings.config.train
    if settings.cached:
        cached = CachedRows("train")
        _check_present(cached, settings.config)
        return ShuffledRows(cached, train.batch_size, train.seed)
    return StreamedRows("train", train.batch_size, train.seed)


def _check_present(rows: CachedRows, config: Config) -> None:
    for name in config.table.modalities:
        if not rows.count(f"present_{name}"):
            column = getattr(config.table, f"{name}_column")
            raise TableError(
                f"no training row has a usable {name}; check table.{name}_column = {column!r}"
                + (f" and table.image_roots = {list(config.table.image_roots)}" if name == "image" else "")
            )


def _mean(losses: Iterable[float]) -> float:
    values = list(losses)
    means = _gather(float(np.mean(values)))
    return float(np.mean(means))


def _gather(value: Any) -> list[Any]:
    """Returns every worker's value, on every worker."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: Any) -> Any:
    """Returns the first worker's value, on every worker."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
