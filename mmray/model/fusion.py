"""From one embedding per modality to one embedding: the ways to fuse.

One contract: built from the width of the embeddings and the modalities' names; called with a mapping modality ->
[B, D] and a mapping modality -> bool [B] of what is present; gives one tensor [B, output_dim]. Modalities are taken in
sorted order, so the order of a mapping never matters. Where a modality is absent its embedding is the learned absent
one (`FusionModel` puts it there), and the weighted sum leaves it out altogether.

Inputs:
    embeddings: modality -> float [B, D].
    present: modality -> bool [B].
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmray.config import (
    AttentionConfig,
    BilinearConfig,
    ConcatConfig,
    ConvConfig,
    FusionConfig,
    WeightedSumConfig,
)

IMAGE = "image"


class Fusion(nn.Module, ABC):
    """One embedding out of several."""

    def __init__(self, modalities: Sequence[str], width: int) -> None:
        super().__init__()
        self.modalities = tuple(sorted(modalities))
        self.output_dim = width

    @abstractmethod
    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused embedding [B, output_dim]."""

    def image_weight(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor | None:
        """Returns the weight of the image in each row [B], where the fusion has one."""
        return None

    def _stack(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Returns the embeddings as [B, M, D]."""
        return torch.stack([embeddings[name] for name in self.modalities], dim=1)


class WeightedSum(Fusion):
    """F = sum of w_m E_m over the modalities present, the weights summing to one.

    With an image I and a text T this is F = alpha * I + (1 - alpha) * T; without the image F = T exactly, and the other
    way round; without both F = 0. alpha is fixed, one learned number, or one per row from a gate on both embeddings
    (Arevalo et al. 2017, Gated Multimodal Units, with a scalar gate).
    """

    def __init__(self, config: WeightedSumConfig, modalities: Sequence[str], width: int) -> None:
        super().__init__(modalities, width)
        logits = self._logits_of(config.initial_alpha)
        self._gate: nn.Linear | None = None
        if config.alpha == "gated":
            self._gate = nn.Linear(width * len(self.modalities), len(self.modalities))
            nn.init.zeros_(self._gate.weight)
            self._gate.bias.data.copy_(logits)
        elif config.alpha == "learned":
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)

    def _logits_of(self, alpha: float) -> Tensor:
        shares = [1.0] * len(self.modalities)
        if IMAGE in self.modalities and len(shares) > 1:
            others = (1 - alpha) / (len(shares) - 1)
            shares = [alpha if name == IMAGE else others for name in self.modalities]
        # The log of nothing would leave nothing of a row that has only that.
        return torch.tensor(shares).clamp_min(torch.finfo(torch.float32).tiny).log()

    def weights(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor], alpha: float | None = None
    ) -> Tensor:
        """Returns the weight of each modality in each row [B, M]: zero where it is absent.

        Args:
            alpha: weight of the image where nothing is absent, 0 to 1, in place of the model's own.
        """
        stacked = self._stack(embeddings)
        logits = self.logits if self._gate is None else self._gate(stacked.flatten(1))
        if alpha is not None:
            logits = self._logits_of(alpha).to(stacked.device)
        mask = torch.stack([present[name] for name in self.modalities], dim=1)
        # Masked before the softmax: one modality left then weighs exactly one, however small its weight beside others.
        masked = logits.float().expand(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return (torch.softmax(masked, dim=1) * mask).to(stacked.dtype)

    def forward(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor], alpha: float | None = None
    ) -> Tensor:
        """Returns the fused embedding [B, D], with the model's own alpha or the one given."""
        weights = self.weights(embeddings, present, alpha)
        return (self._stack(embeddings) * weights[:, :, None]).sum(dim=1)

    def image_weight(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor | None:
        """Returns alpha of each row [B]: one without the text, zero without the image."""
        if IMAGE not in self.modalities or len(self.modalities) < 2:
            return None
        return self.weights(embeddings, present)[:, self.modalities.index(IMAGE)]


class Concat(Fusion):
    """F = W [E_1; E_2; ...] + b."""

    def __init__(self, config: ConcatConfig, modalities: Sequence[str], width: int) -> None:
        super().__init__(modalities, width)
        self._linear = nn.Linear(width * len(self.modalities), width)

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused embedding [B, D]."""
        fused: Tensor = self._linear(self._stack(embeddings).flatten(1))
        return fused


class Conv(Fusion):
    """A convolution along the embedding with the modalities as channels, ReLU, and a 1x1 convolution back to one.

    F = K_2 * relu(K_1 * [E_1; E_2; ...]), where * slides over the D positions of the stacked embeddings.
    """

    def __init__(self, config: ConvConfig, modalities: Sequence[str], width: int) -> None:
        super().__init__(modalities, width)
        self._convolutions = nn.Sequential(
            nn.Conv1d(len(self.modalities), config.channels, config.kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv1d(config.channels, 1, 1),
        )

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused embedding [B, D]."""
        fused: Tensor = self._convolutions(self._stack(embeddings))
        return fused.squeeze(1)


class Attention(Fusion):
    """Multi-head self-attention over the modalities as tokens, with a residual and a norm, averaged.

    F = mean over m of LayerNorm(E + Attention(E, E, E))_m (Vaswani et al. 2017).
    """

    def __init__(self, config: AttentionConfig, modalities: Sequence[str], width: int) -> None:
        super().__init__(modalities, width)
        self._attention = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self._norm = nn.LayerNorm(width)

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused embedding [B, D]."""
        tokens = self._stack(embeddings)
        attended, _ = self._attention(tokens, tokens, tokens, need_weights=False)
        fused: Tensor = self._norm(tokens + attended).mean(dim=1)
        return fused


class Bilinear(Fusion):
    """Low-rank bilinear pooling: F = P (tanh(U_1 E_1) o tanh(U_2 E_2) o ...) + sum of E_m (Kim et al. 2017, MLB).

    The sum is a shortcut past the product, which alone is slow to start learning.
    """

    def __init__(self, config: BilinearConfig, modalities: Sequence[str], width: int) -> None:
        super().__init__(modalities, width)
        self._factors = nn.ModuleDict({name: nn.Linear(width, config.rank) for name in self.modalities})
        self._output = nn.Linear(config.rank, width)

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused embedding [B, D]."""
        product = torch.stack([torch.tanh(f(embeddings[name])) for name, f in self._factors.items()]).prod(dim=0)
        fused: Tensor = self._output(product)
        return fused + self._stack(embeddings).sum(dim=1)


def build_fusion(config: FusionConfig, modalities: Sequence[str], width: int) -> Fusion:
    """Builds the fusion that a configuration names."""
    match config:
        case WeightedSumConfig():
            return WeightedSum(config, modalities, width)
        case ConcatConfig():
            return Concat(config, modalities, width)
        case ConvConfig():
            return Conv(config, modalities, width)
        case AttentionConfig():
            return Attention(config, modalities, width)
        case BilinearConfig():
            return Bilinear(config, modalities, width)
