"""How the workers of a run hold its model: each a copy (DDP), or each a part of every weight (FSDP2).

Reads the module that gives the loss -> gives the one to call in its place, and the whole model's state as a checkpoint;
whoever calls need not know which it is. Every worker has to make the same calls.
"""

from collections.abc import Mapping
from typing import Any, cast

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmray.train.checkpoint import Checkpoint
from mmray.train.steps import TrainingLoss

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(loss: TrainingLoss, shard: bool) -> nn.Module:
    """Returns the module to call for the loss; comes before there is an optimiser.

    Args:
        loss: the loss of a batch and the model in it.
        shard: whether a worker keeps only its part of the weights, and with them of the optimiser's state: an encoder
            is put together for as long as it computes.
    """
    if not dist.is_initialized():  # nobody trains beside it, and Ray would take a GPU that nobody asked for
        return loss
    if shard and dist.get_world_size() > 1:
        return _sharded(loss)
    # The absent embedding of a modality gets no gradient from a batch in which it is never absent.
    wrapped: nn.Module = ray.train.torch.prepare_model(loss, parallel_strategy_kwargs={"find_unused_parameters": True})
    return wrapped


def _sharded(loss: TrainingLoss) -> nn.Module:
    device = ray.train.torch.get_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Parts of a weight are cut from it as it lies in memory, which has to be in the order of its numbers.
    loss.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for encoder in loss.model.encoders.values():
        fully_shard(encoder, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    register_fsdp_forward_method(loss, "predict")
    return loss


def agree_on_buffers(model: nn.Module) -> None:
    """Gives every worker the first one's running statistics, which are those that the checkpoint holds."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `weights_of` and `moments_of` gave."""
    set_model_state_dict(model, dict(checkpoint.weights), options=_WHOLE)
    state: dict[str, Any] = {}
    for key, value in checkpoint.optimizer.items():
        parameter, _, name = key.rpartition("/")
        state.setdefault(parameter, {})[name] = value
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=_WHOLE)
    for weight, entry in optimizer.state.items():
        entry |= {name: _like(weight, value) for name, value in entry.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the whole model's weights; only the first worker gets them."""
    weights = cast(Mapping[str, Tensor], get_model_state_dict(model, options=_WHOLE))
    return {name: tensor.clone() for name, tensor in weights.items()}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns what an optimiser keeps of each weight, as in a `Checkpoint`; only the first worker gets it."""
    state = cast(Mapping[str, Any], get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {}))
    return {f"{k}/{name}": torch.as_tensor(value) for k, entry in state.items() for name, value in entry.items()}


def _like(weight: Tensor, value: Tensor) -> Tensor:
    # A fused optimiser walks a weight and its moments side by side in memory: they have to lie in the same order.
    if value.shape != weight.shape or value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)
