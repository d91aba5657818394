"""Costs of assigning N predictions to T targets, each an (N, T) matrix times a weight."""

from torch import Tensor, nn

from detrex.layers import generalized_box_iou

__all__ = ["CrossEntropyCost", "FocalLossCost", "GIoUCost", "L1Cost"]


class FocalLossCost(nn.Module):
    """What the focal loss gains when a prediction turns from background to the target's class."""

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, weight: float = 1.0, eps: float = 1e-8
    ):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.weight = weight
        self.eps = eps

    def forward(self, pred_logits: Tensor, gt_labels: Tensor) -> Tensor:
        """Cost of logits (N, K) and labels (T,)."""
        prob = pred_logits.sigmoid()[:, gt_labels]
        positive = -self.alpha * (1 - prob) ** self.gamma * (prob + self.eps).log()
        negative = -(1 - self.alpha) * prob**self.gamma * (1 - prob + self.eps).log()
        return self.weight * (positive - negative)


class CrossEntropyCost(nn.Module):
    """Minus the softmax probability of the target's class."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, pred_logits: Tensor, gt_labels: Tensor) -> Tensor:
        """Cost of logits (N, K) and labels (T,)."""
        return -self.weight * pred_logits.softmax(-1)[:, gt_labels]


class L1Cost(nn.Module):
    """Sum of the coordinates' absolute differences."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, pred_bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """Cost of boxes (N, 4) and (T, 4), both cxcywh."""
        return self.weight * (pred_bboxes[:, None] - gt_bboxes).abs().sum(-1)


class GIoUCost(nn.Module):
    """Minus the generalised IoU."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, pred_bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """Cost of boxes (N, 4) and (T, 4), both xyxy."""
        return -self.weight * generalized_box_iou(pred_bboxes, gt_bboxes)
