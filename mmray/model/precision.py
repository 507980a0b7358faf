"""Which number format the forward pass uses, and where bf16 pays."""

from typing import Literal, get_args

import torch

from mmray.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str, device: str) -> Precision:
    """Returns the format to use: `auto` means bf16 where the hardware has instructions for it, else fp32.

    Raises:
        ConfigError: bf16 is wanted, and this machine's CPU cannot compute in it.
    """
    if wanted == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if wanted == "bf16" and not computes_bf16(device):
        raise ConfigError("precision bf16: this machine's CPU cannot compute in it; take auto, which is fp32 here")
    (precision,) = (known for known in get_args(Precision) if known == wanted)
    return precision  # type: ignore[no-any-return]


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Returns the context of a forward pass on a device (`cpu`, `cuda`, `cuda:1`)."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.split(":")[0], dtype, enabled=precision != "fp32")


def computes_bf16(device: str) -> bool:
    """Whether every layer can be computed in bf16, fast or not: of CPUs, oneDNN asks x86 for AVX-512."""
    has_onednn = not device.startswith("cuda") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not has_onednn or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    # Without instructions for it, bf16 is slower than fp32.
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
