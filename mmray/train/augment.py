"""Small random changes of training rows, each row its own: images move a little, some words are withheld."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.config import TrainConfig
from mmray.model.encoders import FEATURES, PADDING, UNKNOWN
from mmray.train.frozen import MIRRORED

MAX_TURN = math.radians(10)
MAX_SCALE = 0.15
MAX_SHIFT = 0.1  # of the image's side


def augment(arrays: Mapping[str, Tensor], train: TrainConfig) -> dict[str, Tensor]:
    """Returns the arrays of a batch as training reads them."""
    changed = dict(arrays)
    if train.augment and "image" in arrays:
        changed["image"] = move_images(arrays["image"])
    if train.augment and MIRRORED in arrays:
        changed[FEATURES] = _one_of(arrays[FEATURES], changed.pop(MIRRORED))
    if train.word_dropout and "token_ids" in arrays:
        changed["token_ids"] = _withhold(arrays["token_ids"], train.word_dropout, UNKNOWN)
    if train.word_dropout and "ngram_ids" in arrays:
        changed["ngram_ids"] = _withhold(arrays["ngram_ids"], train.word_dropout, PADDING)
    return changed


def _one_of(first: Tensor, second: Tensor) -> Tensor:
    """Takes each row from one of two [B, D], by chance."""
    return torch.where(torch.rand(len(first), 1, device=first.device) < 0.5, first, second)


def _withhold(ids: Tensor, chance: float, instead: int) -> Tensor:
    """Puts another id in the place of some that are no padding (Iyyer et al. 2015, word dropout)."""
    dropped = (torch.rand(ids.shape, device=ids.device) < chance) & (ids != PADDING)
    return ids.masked_fill(dropped, instead)


def move_images(images: Tensor) -> Tensor:
    """Returns changed copies of uint8 images [B, S, S, 3]; what an image leaves uncovered continues its border."""
    num, device = len(images), images.device
    turn = (torch.rand(num, device=device) * 2 - 1) * MAX_TURN
    scale = 1 + (torch.rand(num, device=device) * 2 - 1) * MAX_SCALE
    flip = torch.where(torch.rand(num, device=device) < 0.5, -1.0, 1.0)
    shift = (torch.rand(num, 2, device=device) * 2 - 1) * 2 * MAX_SHIFT
    cos, sin = torch.cos(turn) * scale, torch.sin(turn) * scale
    matrices = torch.stack(
        [torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)], 1
    )
    pixels = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
