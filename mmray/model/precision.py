"""Which number format the forward pass uses, and where bf16 pays."""

from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str, device: str) -> Precision:
    """Returns the format to use: `auto` means bf16 where the hardware has instructions for it, else fp32."""
    if wanted == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    (precision,) = (known for known in get_args(Precision) if known == wanted)
    return precision  # type: ignore[no-any-return]


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Returns the context of a forward pass on a device (`cpu`, `cuda`, `cuda:1`)."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.split(":")[0], dtype, enabled=precision != "fp32")


def _has_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    # Without instructions for it, bf16 is slower than fp32.
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
