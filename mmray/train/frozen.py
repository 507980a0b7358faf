"""What a frozen image network makes of the rows, computed once: while training, it would say the same each epoch.

Reads preprocessed rows with images -> gives them with features in the images' place, a thirtieth of their size at 224
pixels. Of augmentation, the mirror image is left: its features are kept beside the image's own.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmray.bundle import without_weight_files
from mmray.config import Config
from mmray.model.encoders import ENCODERS, FEATURES, Encoder
from mmray.model.precision import autocast, resolve_precision

MIRRORED = "mirrored_features"
BATCH = 64  # images in one forward pass


def has_frozen_images(config: Config) -> bool:
    """Whether nothing that is trained reads the pixels."""
    return "image" in config.table.modalities and bool(getattr(config.model.image_encoder, "freeze", False))


def feature_bytes(config: Config) -> int:
    """Returns the size of one row's features."""
    return 4 * _encoder(without_weight_files(config)).output_dim * (2 if config.train.augment else 1)


class FrozenImages:
    """Puts features in the place of the images of B rows; an actor of Ray Data's pool.

    Outputs:
        image_features: float32 [B, D].
        mirrored_features: float32 [B, D], of the mirror images; only where they are asked for.
    """

    def __init__(self, config: Config, mirror: bool) -> None:
        self._device, self._mirror = "cuda" if config.train.use_gpu else "cpu", mirror
        if not config.train.use_gpu:
            torch.set_num_threads(1)  # an actor for each core
        self._precision = resolve_precision(config.train.precision, self._device)
        self._encoder = _encoder(config).eval().to(self._device)

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        images = rows["image"]
        rest = {name: array for name, array in rows.items() if name != "image"}
        features = {FEATURES: self._features(images)}
        if self._mirror:
            features[MIRRORED] = self._features(images[:, :, ::-1])
        return {**rest, **features}

    @torch.inference_mode()
    def _features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [np.zeros((0, self._encoder.output_dim), np.float32)]
        for k in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.array(images[k : k + BATCH])).to(self._device)
            with autocast(self._device, self._precision):
                features: Tensor = self._encoder({"image": pixels})
            parts.append(features.float().cpu().numpy())
        return np.concatenate(parts)


def _encoder(config: Config) -> Encoder:
    return ENCODERS["image"](config, ())
