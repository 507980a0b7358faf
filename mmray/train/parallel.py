"""How the workers of a run hold its model: each a copy (DDP), or each a part of every weight (FSDP2).

Reads the module that gives the loss -> gives the one to call in its place; whoever calls it need not know which.
"""

import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmray.train.steps import TrainingLoss


def distribute(loss: TrainingLoss, shard: bool) -> nn.Module:
    """Returns the module to call for the loss; to be called on every worker, before there is an optimiser.

    Args:
        loss: the loss of a batch and the model in it.
        shard: whether a worker keeps only its part of the weights, and with them of the optimiser's state: an encoder
            is put together for as long as it computes.
    """
    if shard and dist.is_initialized() and dist.get_world_size() > 1:
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
