"""Boxes whose leading axes broadcast, without the synchronisations that checks cost on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # keeps boxes without area from dividing by zero, as in detrex


def generalized_iou(boxes: Tensor, others: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes (..., 4) in corners: (...).

    Args:
        boxes: (..., 4).
        others: (..., 4).
        epsilon: added to what is divided by.
    """
    overlap, union = _overlap_and_union(boxes, others)
    hull = _area(
        torch.minimum(boxes[..., :2], others[..., :2]),
        torch.maximum(boxes[..., 2:], others[..., 2:]),
    )
    return overlap / (union + epsilon) - (hull - union) / (hull + epsilon)


def box_iou(boxes: Tensor, others: Tensor, epsilon: float = EPSILON) -> Tensor:
    """IoU of boxes (..., 4) in corners: (...).

    Args:
        boxes: (..., 4).
        others: (..., 4).
        epsilon: added to what is divided by.
    """
    overlap, union = _overlap_and_union(boxes, others)
    return overlap / (union + epsilon)


def _overlap_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    overlap = _area(
        torch.maximum(boxes[..., :2], others[..., :2]),
        torch.minimum(boxes[..., 2:], others[..., 2:]),
    )
    areas = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:])
    return overlap, areas - overlap


def _area(low: Tensor, high: Tensor) -> Tensor:
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]
