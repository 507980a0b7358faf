"""torchvision, also where its binary part does not load. The only place that imports it.

torchvision's wheel links against CUDA libraries. Beside a CPU build of torch its binary is skipped, and the import then
fails with `operator torchvision::nms does not exist`, because it registers fakes for two operators that the binary
would have declared. Declaring their schemas first makes its models and transforms work; `torchvision.io` and
`torchvision.ops` do not, and are not used.
"""

import warnings
from functools import cache
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARIES: list[torch.library.Library] = []  # a library's operators live as long as it does


@cache
def torchvision() -> Any:
    """Returns the torchvision package."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        try:
            import torchvision
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error):
                raise
            library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for name in ("nms", "qnms"):
                library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
            _LIBRARIES.append(library)
            import torchvision
    return torchvision
