"""Checkpoints of a training run: create-once files, one per epoch and some in between, without pickles.

    RUN/checkpoints/epoch-<number>.safetensors               weights, best weights so far, optimiser state, history
    RUN/checkpoints/epoch-<number>.step-<number>.safetensors the same some steps later, and how far that epoch is

A file that exists is complete, so the latest one by name is always right to continue from. Ray's own checkpoint list
is rewritten in place and is not used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmray.store import open_store

KEEP = 2  # the latest, and the one before it


@dataclass(frozen=True)
class Part:
    """How far an epoch is."""

    losses: Tensor
    """Of each worker's steps [W, N], float64."""
    random: Tensor
    """State of each worker's generators [W, B], bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on."""

    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """`<parameter>/<name>` -> tensor."""
    history: list[dict[str, Any]]
    """One entry per finished epoch."""
    part: Part | None = None
    """Of the epoch after those, where it has begun."""

    @property
    def key(self) -> str:
        """The name of its file; a later one comes later in the order of names."""
        step = f".step-{self.part.losses.shape[1]:09d}" if self.part else ""
        return f"checkpoints/epoch-{len(self.history):06d}{step}.safetensors"


def save_checkpoint(folder: str, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, and removes those that are no longer needed."""
    groups = {"weights": checkpoint.weights, "best": checkpoint.best, "optimizer": checkpoint.optimizer}
    groups["part"] = vars(checkpoint.part) if checkpoint.part else {}
    # Convolution weights are channels last in memory, which the format does not know; and no tensor may share memory.
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, items in groups.items()
        for name, tensor in items.items()
    }
    metadata = {"history": json.dumps(checkpoint.history)}
    store = open_store(folder)
    store.create(checkpoint.key, safetensors.torch.save(tensors, metadata))
    for key in list(store.list("checkpoints"))[:-KEEP]:
        store.delete(key)


def latest_checkpoint(folder: str) -> Checkpoint | None:
    """Reads the last checkpoint, if there is any."""
    store = open_store(folder)
    keys = list(store.list("checkpoints"))
    if not keys:
        return None
    data = store.read(keys[-1])
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "optimizer": {}, "part": {}}
    for name, tensor in safetensors.torch.load(data).items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    part = groups.pop("part")
    return Checkpoint(**groups, history=json.loads(_metadata(data)["history"]), part=Part(**part) if part else None)


def _metadata(data: bytes) -> dict[str, str]:
    # The format: 8 bytes of header length, then the header as JSON (https://github.com/huggingface/safetensors).
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata
