"""Tensor helpers."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["interpolate", "inverse_sigmoid"]


def interpolate(
    input: Tensor, size=None, scale_factor=None, mode="nearest", align_corners=None
) -> Tensor:
    """Same as :func:`torch.nn.functional.interpolate`."""
    return F.interpolate(input, size, scale_factor, mode, align_corners)


def inverse_sigmoid(x: Tensor, eps=1e-3) -> Tensor:
    """Logit of ``x`` in [0, 1], with ``x`` and ``1 - x`` raised to at least ``eps``."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
