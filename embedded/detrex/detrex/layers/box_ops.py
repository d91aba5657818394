"""Boxes as (..., 4) tensors, in corners (x1, y1, x2, y2) or centre and size (cx, cy, w, h)."""

import torch
from torch import Tensor

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "masks_to_boxes",
]

_EPS = 1e-6  # keeps boxes without area from dividing by zero


def box_cxcywh_to_xyxy(bbox: Tensor) -> Tensor:
    """Turn centre and size into corners."""
    centre, size = bbox[..., :2], bbox[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def box_xyxy_to_cxcywh(bbox: Tensor) -> Tensor:
    """Turn corners into centre and size."""
    low, high = bbox[..., :2], bbox[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union's area, of every pair of boxes in corners.

    Args:
        boxes1: (N, 4).
        boxes2: (M, 4).

    Returns:
        Two tensors of shape (N, M).
    """
    return _iou(boxes1[:, None], boxes2)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of every pair of boxes in corners: (N, 4) and (M, 4) to (N, M)."""
    return _giou(boxes1[:, None], boxes2)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Corners of the smallest box around each mask, (N, H, W) to (N, 4).

    They are the first and last pixel indices, both included. An empty mask has its first corner
    at 1e8 and its last at 0.
    """
    if masks.numel() == 0:
        return torch.zeros(0, 4, device=masks.device)
    masks = masks.bool()
    low_high = []
    for covered in (masks.any(1), masks.any(2)):  # columns, then rows
        index = torch.arange(covered.shape[1], dtype=torch.float32, device=masks.device)
        low_high.append((torch.where(covered, index, 1e8), torch.where(covered, index, 0.0)))
    (x_low, x_high), (y_low, y_high) = low_high
    return torch.stack((x_low.amin(1), y_low.amin(1), x_high.amax(1), y_high.amax(1)), dim=1)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


def _iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of boxes whose leading axes broadcast."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    overlap = _area(low, high)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (boxes1, boxes2)]
    union = areas[0] + areas[1] - overlap
    return overlap / (union + _EPS), union


def _giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of boxes whose leading axes broadcast."""
    for boxes in (boxes1, boxes2):  # NaN passes, so that a diverged model gets a NaN loss instead
        assert not (boxes[..., 2:] < boxes[..., :2]).any(), (
            "generalized_box_iou: found boxes with x2 < x1 or y2 < y1, expected (x1, y1, x2, y2)"
        )
    iou, union = _iou(boxes1, boxes2)
    hull = _area(
        torch.minimum(boxes1[..., :2], boxes2[..., :2]),
        torch.maximum(boxes1[..., 2:], boxes2[..., 2:]),
    )
    return iou - (hull - union) / (hull + _EPS)
