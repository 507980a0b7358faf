"""Temperature scaling: one number that makes probabilities mean what they say (Guo et al. 2017, On Calibration of
Modern Neural Networks).

p = softmax(z / T), or sigmoid(z / T), with the T > 0 that minimises the mean negative log-likelihood of held-out rows.
No prediction changes, for the order of the logits stays.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

LARGEST = 10.0  # and the smallest is its inverse: rows without a single mistake would ask for T = 0
STEPS = 60  # of bisection: more than a float32 can hold


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Returns the temperature of logits.

    In b = 1 / T the negative log-likelihood is convex, and its slope is the mean of E_p[z] - z_y, with the logits that
    the model expects and those of the targets: bisection finds where it is zero.

    Args:
        logits: [N, K], or [N, 1] of a binary task.
        targets: int64 [N] label indices, for softmax; float [N] or [N, K] of 0 and 1, for sigmoid.
    """
    z = logits.double()
    sigmoid = targets.is_floating_point()
    carried = targets.double().view_as(z) if sigmoid else one_hot(targets, z.shape[1]).double()

    def slope(b: float) -> float:
        p = torch.sigmoid(b * z) if sigmoid else torch.softmax(b * z, dim=1)
        return float(((p - carried) * z).sum())

    low, high = 1 / LARGEST, LARGEST
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / low
