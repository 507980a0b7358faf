"""EfficientNet-Lite0, the network whose weights the extra `pretrained` brings (Tan and Le 2019, and its Lite variants:
no squeeze-and-excitation, ReLU6, stem and head of one width).

Its submodules are named as in the published weights, so that these load without a translation.
"""

from torch import Tensor, nn

# Repeats, kernel, stride, expansion, output channels of each stage: table 1 of the paper.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _LABELS = 32, 1280, 1000


class EfficientNetLite0(nn.Module):
    """float [B, 3, S, S] -> logits of ImageNet's labels [B, 1000]; S is best a multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        self._pad, self._conv_stem = _same_padding(3, 2), _conv(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        blocks: list[nn.Module] = []
        inputs = _STEM
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for k in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, 1 if k else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _conv(inputs, _HEAD, 1)
        self._bn1 = _norm(_HEAD)
        self._relu = nn.ReLU6(inplace=True)
        self._pool = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(_HEAD, _LABELS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns [B, 1000]."""
        features = self._relu(self._bn0(self._conv_stem(self._pad(pixels))))
        features = self._relu(self._bn1(self._conv_head(self._blocks(features))))
        logits: Tensor = self._fc(self._dropout(self._pool(features).flatten(1)))
        return logits


class _Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, depthwise convolution, project, and add the input if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expand_conv, self._bn0 = None, None
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(inputs, width, 1), _norm(width)
        self._pad = _same_padding(kernel, stride)
        self._depthwise_conv = _conv(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = _conv(width, outputs, 1)
        self._bn2 = _norm(outputs)
        self._relu = nn.ReLU6(inplace=True)
        self._adds = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        inside = features
        if self._expand_conv is not None and self._bn0 is not None:
            inside = self._relu(self._bn0(self._expand_conv(inside)))
        inside = self._relu(self._bn1(self._depthwise_conv(self._pad(inside))))
        inside = self._bn2(self._project_conv(inside))
        result: Tensor = features + inside if self._adds else inside
        return result


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = (kernel - 1) // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def _same_padding(kernel: int, stride: int) -> nn.Module:
    # The weights were learned with TensorFlow's padding, which puts the odd row and column behind.
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    return nn.Identity() if stride == 1 else nn.ZeroPad2d((before, after, before, after))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
