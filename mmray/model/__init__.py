"""The model: encoders -> one width -> fusion -> head.

Inputs:
    arrays: the arrays of `mmray.preprocess.Features` as tensors, by name.
    present: modality -> bool [B]. What is absent is replaced by a learned embedding, in training and afterwards alike.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmray.config import AutoTaskConfig, Config
from mmray.model.encoders import ENCODERS
from mmray.model.fusion import WeightedSum, build_fusion
from mmray.model.heads import build_head

ABSENT_STD = 0.02  # of the absent embedding's start: near nothing


class FusionModel(nn.Module):
    """Predicts a row from the modalities it has."""

    def __init__(
        self,
        config: Config,
        *,
        num_labels: int,
        words: Sequence[str] = (),
        class_counts: Tensor | None = None,
        num_rows: int = 0,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        assert not isinstance(config.task, AutoTaskConfig), "the task is settled before there is a model"
        model, self.modalities = config.model, config.table.modalities
        self._modality_dropout = model.modality_dropout
        encoders = {name: ENCODERS[name](config, words) for name in self.modalities}
        self._encoders = nn.ModuleDict(encoders)
        # Normalised over the batch and not over each row: the length of a row's embedding says how much its encoder has
        # recognised, and a sum of two embeddings has to know which one to trust.
        self._projections = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(encoder.output_dim, model.width), nn.BatchNorm1d(model.width), nn.Dropout(model.dropout)
                )
                for name, encoder in encoders.items()
            }
        )
        self._absent = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(model.width) * ABSENT_STD) for name in self.modalities}
        )
        self._fusion = build_fusion(model.fusion, self.modalities, model.width)
        self._dropout = nn.Dropout(model.dropout)
        self.head = build_head(
            config.task,
            self._fusion.output_dim,
            num_labels=num_labels,
            class_counts=class_counts,
            num_rows=num_rows,
            target_mean=target_mean,
            target_std=target_std,
        )

    @property
    def encoders(self) -> nn.ModuleDict:
        """Modality -> encoder: where most of the weights are."""
        return self._encoders

    def forward(self, arrays: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, K]."""
        return self.fuse(self.encode(arrays), self.withhold(present))

    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns one embedding per modality, modality -> [B, width]."""
        return {name: self._projections[name](self._encoders[name](arrays)) for name in self.modalities}

    def withhold(self, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Drops present modalities at random while training, never the last one of a row."""
        if not self.training or not self._modality_dropout:
            return present
        kept = {
            name: m & (torch.rand_like(m, dtype=torch.float) >= self._modality_dropout) for name, m in present.items()
        }
        nothing_left = ~torch.stack([*kept.values()]).any(dim=0)
        return {name: torch.where(nothing_left, present[name], mask) for name, mask in kept.items()}

    def fuse(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, K] from embeddings."""
        fused = self._fusion(self._substitute(embeddings, present), present)
        logits: Tensor = self.head(self._dropout(fused))
        return logits

    def fuse_at(self, alpha: float, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, K] at this weight of the image in place of the model's own, where the fusion has one."""
        assert isinstance(self._fusion, WeightedSum), "only a weighted sum has a weight of the image"
        logits: Tensor = self.head(self._fusion(self._substitute(embeddings, present), present, alpha))
        return logits

    def image_weight(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor | None:
        """Returns the weight of the image in each row [B], where the fusion has one."""
        return self._fusion.image_weight(self._substitute(embeddings, present), present)

    def _substitute(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(present[name][:, None], embedding, self._absent[name].to(embedding.dtype))
            for name, embedding in embeddings.items()
        }
