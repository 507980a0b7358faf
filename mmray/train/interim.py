"""Epochs that are saved in their middle, and go on from there as if nothing had been: when, and what it takes.

Every worker comes here at the same steps, for what is decided here is decided by the first one.
"""

import time
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmray.train.checkpoint import Part

STEPS = 10  # between two looks at the clock, which workers have to agree on
LOOK_S = 5.0  # between two questions whether a node is about to go


class Interim:
    """Says when an epoch should be saved: after some minutes, and as a node with a worker is about to go."""

    def __init__(self, minutes: float) -> None:
        self._every_s, self._told = 60 * minutes, False
        self._saved = self._looked = time.monotonic()

    def saved(self) -> None:
        """Notes that a checkpoint was written."""
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step of an epoch."""
        if step % STEPS or not from_first(time.monotonic() - self._looked >= min(LOOK_S, self._every_s)):
            return False
        self._looked = time.monotonic()
        before, self._told = self._told, ray.train.get_preemption_info() is not None
        return bool(from_first(self._looked - self._saved >= self._every_s)) or (self._told and not before)


def part_of(losses: list[float], loss: nn.Module) -> Part:
    """Returns how far an epoch is, of the losses of this worker's steps."""
    mine = torch.tensor(losses, dtype=torch.float64), _random_state(loss)
    columns = zip(*gather(mine), strict=True)
    return Part(*map(torch.stack, columns))


def resume(part: Part | None) -> list[float]:
    """Takes up an epoch where it was saved; returns the losses of this worker's steps until then.

    Where there are more workers now or fewer, chance goes on from the epoch's seed, and losses are those of all.
    """
    if part is None:
        return []
    context = ray.train.get_context()
    if len(part.losses) != context.get_world_size():
        return [float(value) for value in part.losses.mean(0)]
    state, cpu = part.random[context.get_world_rank()], len(torch.get_rng_state())
    torch.set_rng_state(state[:cpu])
    if len(state) > cpu:
        torch.cuda.set_rng_state(state[cpu:])
    return [float(value) for value in part.losses[context.get_world_rank()]]


def _random_state(loss: nn.Module) -> Tensor:
    states = [torch.get_rng_state()]
    if next(loss.parameters()).is_cuda:
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def gather(value: Any) -> list[Any]:
    """Returns every worker's value, on every worker."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Returns the first worker's value, on every worker."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
