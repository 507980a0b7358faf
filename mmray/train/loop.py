"""What each training worker does: epochs of steps, a validation after each, a checkpoint of both.

Reads preprocessed rows -> gives checkpoints in the run's folder, of each epoch and of long ones in between. A worker
that starts again continues after the last: so much a lost worker, node or driver costs, and nothing else changes.

Ray Train gets no reports: each would wait until its controller looks again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from mmray.config import Config
from mmray.errors import TableError
from mmray.machine import local_cpus
from mmray.metrics import measure
from mmray.model import FusionModel
from mmray.model.calibration import fit_temperature
from mmray.train.checkpoint import Checkpoint, Part, latest_checkpoint, save_checkpoint
from mmray.train.interim import Interim, from_first, gather, part_of, resume
from mmray.train.optimizer import build_optimizer
from mmray.train.rows import CachedRows, Rows, ShuffledRows, StreamedRows
from mmray.train.steps import Steps, TrainingLoss, to_tensors

EVALUATION_BATCH = 128


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
    files: Sequence[str]
    """URIs of the training table's files."""
    cached: Mapping[str, Sequence[Any]]
    """Split -> its rows, as `CachedRows` takes them; a split that is not there is a dataset, and streamed."""
    cutoffs: Mapping[int, float]
    """By epoch, the validation loss above which training ends with it."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(self.num_rows // self.config.train.batch_size, 1) * self.config.train.epochs


def train_worker(settings: Settings, tell: Callable[[dict[str, Any]], None]) -> None:
    """Runs on every worker of the group.

    Args:
        settings: what the driver tells every worker.
        tell: called by the first one with the entry of each epoch as it ends.
    """
    # A second to load, and only workers need it: the driver loads this module too.
    from mmray.train.parallel import agree_on_buffers, distribute, moments_of, restore, weights_of

    config, train = settings.config, settings.config.train
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(max(local_cpus() // ray.train.get_context().get_local_world_size(), 1))
    torch.manual_seed(train.seed)
    model = _build(settings)
    loss = TrainingLoss(model, train.auxiliary_weight)
    shared = distribute(loss, train.shard)
    optimizer = build_optimizer(config, model)
    steps = Steps(shared, model, optimizer, config, settings.num_steps, settings.files)
    rows, validation = _rows(settings), CachedRows(settings.cached["validation"])
    state = from_first(latest_checkpoint(settings.folder) if rank == 0 else None)
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    part, interim = None, Interim(train.checkpoint_minutes)
    if state is not None:
        restore(state, model, optimizer)
        history, best, part = state.history, dict(state.best), state.part

    def save(weights: Mapping[str, Tensor], part: Part | None = None) -> None:
        checkpoint = Checkpoint(weights, best, moments_of(model, optimizer), history, part)
        if rank == 0:
            save_checkpoint(settings.folder, checkpoint)
        interim.saved()

    while len(history) < train.epochs and not _should_stop(history, settings):
        torch.manual_seed(train.seed + 1000 * len(history) + rank)  # the same whether the run was interrupted or not
        losses, part = resume(part), None
        steps.done = len(history) * settings.num_steps // train.epochs + len(losses)
        for value in steps.run(rows.epoch(len(history), len(losses))):
            losses.append(value)
            if interim.is_due(len(losses)):
                agree_on_buffers(model)
                save(weights_of(model), part_of(losses, loss))
        agree_on_buffers(model)
        entry = {"epoch": len(history) + 1, "train_loss": _mean(losses), **_validate(loss, validation, config)}
        history = [*history, from_first(entry)]
        weights = weights_of(model)
        if best_epoch(history) == len(history) - 1:
            best = weights
        save(weights)
        if rank == 0:
            tell(history[-1])


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """Returns the position of the entry with the lowest validation loss.

    A mean over rows, and so much less of a lottery on a few hundred of them than a count of hits; and scores are used
    as probabilities, which is what the loss judges.
    """
    return min(range(len(history)), key=lambda k: float(history[k]["validation_loss"]))


def _should_stop(history: Sequence[Mapping[str, Any]], settings: Settings) -> bool:
    if not history:
        return False
    patience, cutoff = settings.config.train.patience, settings.cutoffs.get(len(history))
    waited = patience and len(history) - 1 - best_epoch(history) >= patience
    return bool(waited) or (cutoff is not None and history[-1]["validation_loss"] > cutoff)


@torch.no_grad()
def _validate(loss: TrainingLoss, rows: CachedRows, config: Config) -> dict[str, float | None]:
    """Measures every validation row once, over all workers."""
    loss.eval()
    head, device = loss.model.head, next(loss.parameters()).device
    logits_of, targets, losses, weights = [], [], [], []
    for batch in rows.mine(EVALUATION_BATCH):
        arrays, present, wanted = to_tensors(batch, config, device)
        logits, weight = loss.predict(arrays, present)
        logits_of.append(logits.float().cpu().numpy())
        targets.append(wanted.cpu().numpy())
        losses.append(float(head.loss(logits, wanted)) * len(wanted))
        weights += [] if weight is None else weight.tolist()
    parts = gather((logits_of, targets, sum(losses), weights))
    all_logits = torch.from_numpy(np.concatenate([array for part in parts for array in part[0]]))
    all_targets = np.concatenate([array for part in parts for array in part[1]])
    all_weights = [weight for part in parts for weight in part[3]]
    return {
        "validation_loss": sum(part[2] for part in parts) / len(all_targets),
        "image_weight": float(np.mean(all_weights)) if all_weights else None,
        **measure(config.task.kind, head.outputs(all_logits.to(device)).cpu().numpy(), all_targets),
        **_calibration(config, all_logits, torch.from_numpy(all_targets)),
    }


def _calibration(config: Config, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns the temperature for what the epoch has learned, where one is asked for; see `mmray.train.job`."""
    calibrate = getattr(config.task, "calibrate", False)
    return {"temperature": fit_temperature(logits, targets)} if calibrate else {}


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
    if "train" in settings.cached:
        cached = CachedRows(settings.cached["train"])
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


def _mean(losses: Sequence[float]) -> float:
    return float(np.mean(gather(float(np.mean(losses)))))
