"""Small random changes of training images, each image its own: flip, turn, scale, shift."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TURN = math.radians(10)
MAX_SCALE = 0.15
MAX_SHIFT = 0.1  # of the image's side


def augment(images: Tensor) -> Tensor:
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
