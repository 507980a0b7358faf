"""Checkpoints of a training run: one create-once file per epoch, without pickles.

    RUN/checkpoints/epoch-<number>.safetensors   weights, best weights so far, optimiser state, history

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
class Checkpoint:
    """Everything that the next epoch depends on."""

    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """`<parameter>/<name>` -> tensor."""
    history: list[dict[str, Any]]
    """One entry per finished epoch."""


def save_checkpoint(folder: str, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint of the last epoch in the history, and removes those that are no longer needed."""
    groups = {"weights": checkpoint.weights, "best": checkpoint.best, "optimizer": checkpoint.optimizer}
    # Convolution weights are channels last in memory, which the format does not know; and no tensor may share memory.
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, items in groups.items()
        for name, tensor in items.items()
    }
    metadata = {"history": json.dumps(checkpoint.history)}
    store = open_store(folder)
    store.create(_key(len(checkpoint.history)), safetensors.torch.save(tensors, metadata))
    for key in list(store.list("checkpoints"))[:-KEEP]:
        store.delete(key)


def latest_checkpoint(folder: str) -> Checkpoint | None:
    """Reads the checkpoint of the last finished epoch, if any epoch is finished."""
    store = open_store(folder)
    keys = list(store.list("checkpoints"))
    if not keys:
        return None
    data = store.read(keys[-1])
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "optimizer": {}}
    for name, tensor in safetensors.torch.load(data).items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return Checkpoint(**groups, history=json.loads(_metadata(data)["history"]))


def _metadata(data: bytes) -> dict[str, str]:
    # The format: 8 bytes of header length, then the header as JSON (https://github.com/huggingface/safetensors).
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _key(epoch: int) -> str:
    return f"checkpoints/epoch-{epoch:06d}.safetensors"
