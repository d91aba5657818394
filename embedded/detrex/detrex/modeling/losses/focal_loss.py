"""Focal loss (Lin et al., 2017): cross entropy that pays less attention to easy examples."""

import fvcore.nn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrex.modeling.losses.utils import weight_reduce_loss

__all__ = ["FocalLoss", "focal_loss_with_prob", "sigmoid_focal_loss"]

_MAX_CROSS_ENTROPY = 100.0  # as torch's binary_cross_entropy


def sigmoid_focal_loss(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "mean",
    avg_factor: int | None = None,
) -> Tensor:
    """Focal loss of logits and binary targets of the same shape, in float32.

    A negative ``alpha`` switches the balance of positives and negatives off.
    """
    loss = fvcore.nn.sigmoid_focal_loss(preds, targets, alpha, gamma, reduction="none")
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


def focal_loss_with_prob(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    alpha=0.25,
    gamma=2.0,
    reduction="mean",
    avg_factor=None,
) -> Tensor:
    """Focal loss of probabilities (N, K) and labels (N,); label K is the background."""
    positive = _one_hot(targets, preds.shape[1]).bool()
    right = torch.where(positive, preds, 1 - preds)
    loss = (-right.log()).clamp(max=_MAX_CROSS_ENTROPY) * (1 - right) ** gamma
    if alpha >= 0:
        loss = loss * torch.where(positive, alpha, 1 - alpha)
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


class FocalLoss(nn.Module):
    """Focal loss of labels times ``loss_weight``; ``activated``: of probabilities, not logits."""

    def __init__(self, alpha=0.25, gamma=2.0, reduction="mean", loss_weight=1.0, activated=False):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(self, preds, targets, weight=None, avg_factor=None) -> Tensor:
        """Compute the loss of (N, K) and labels (N,); label K is the background."""
        if self.activated:
            function = focal_loss_with_prob
        else:
            function, targets = sigmoid_focal_loss, _one_hot(targets, preds.shape[1])
        loss = function(preds, targets, weight, self.alpha, self.gamma, self.reduction, avg_factor)
        return self.loss_weight * loss


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot rows; those of the label ``num_classes`` are zero."""
    return F.one_hot(labels, num_classes + 1)[..., :-1]
