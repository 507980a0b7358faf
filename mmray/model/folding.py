"""A network made ready for inference: the same function in evaluation, in half of the time.

Batch normalisation is folded into the convolution before it: W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma
/ sqrt(var + eps) + beta. In bf16 on a CPU, the activation behind a convolution is computed with it, by oneDNN.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmray.model.precision import computes_bf16

POST_OPS: dict[type[nn.Module], tuple[str, list[float], str]] = {
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardswish: ("hardswish", [], ""),
    nn.Hardsigmoid: ("hardsigmoid", [], ""),
    nn.SiLU: ("swish", [], ""),
}
"""Activation -> oneDNN's name of it, its numbers, its algorithm."""


def fold(model: nn.Module) -> None:
    """Folds a model's torchvision network, in place; the model must be in evaluation mode, and is not trained any more.

    A network that cannot be traced stays as it is.
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
    folds: dict[tuple[type[nn.Module], ...], Callable[[Any, Any], nn.Module]] = {(nn.BatchNorm2d,): fuse_conv_bn_eval}
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if has_onednn and computes_bf16("cpu"):
        folds[tuple(POST_OPS)] = ActivatedConv
    for kinds, both in folds.items():
        for conv, after in _pairs(traced, kinds):
            _replace(traced, conv, both(*(traced.get_submodule(str(node.target)) for node in (conv, after))), after)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _pairs(
    traced: torch.fx.GraphModule, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    """Yields each convolution that is used once, by a module of such a kind, and that module."""
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in kinds:
            continue
        before = node.args[0]
        conv = modules[before.target] if before.op == "call_module" else None
        is_plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if is_plain and len(before.users) == 1 and calls[before.target] == 1:
            yield before, node


def _replace(traced: torch.fx.GraphModule, conv: torch.fx.Node, both: nn.Module, after: torch.fx.Node) -> None:
    parent, _, name = str(conv.target).rpartition(".")
    setattr(traced.get_submodule(parent), name, both)
    after.replace_all_uses_with(conv)
    traced.graph.erase_node(after)


class ActivatedConv(nn.Module):
    """A convolution and the activation behind it."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self._conv, self._activation = conv, activation
        self._post_op = POST_OPS[type(activation)]
        self._bf16: tuple[Tensor, Tensor | None] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Returns [B, C, H, W]."""
        in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if features.device.type != "cpu" or not in_bf16:
            activated: Tensor = self._activation(self._conv(features))
            return activated
        weight, bias = self._bf16 = self._bf16 or self._weights()
        conv = self._conv
        where = [*conv.padding], [*conv.stride], [*conv.dilation], conv.groups
        both: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features.bfloat16(), weight, bias, *where, *self._post_op
        )
        return both

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight = self._conv.weight.detach().bfloat16().to(memory_format=torch.channels_last)
        return weight, None if self._conv.bias is None else self._conv.bias.detach().bfloat16()
