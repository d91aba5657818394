"""Generalised IoU loss (Rezatofighi et al., 2019)."""

import fvcore.nn
from torch import Tensor, nn

from detrex.modeling.losses.utils import weight_reduce_loss

__all__ = ["GIoULoss", "giou_loss"]


def giou_loss(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    eps: float = 1e-6,
    reduction: str = "mean",
    avg_factor: int | None = None,
) -> Tensor:
    """One minus the generalised IoU of boxes (N, 4) in corners, row by row; 0 without boxes."""
    if targets.numel() == 0:
        return preds.sum() * 0
    loss = fvcore.nn.giou_loss(preds, targets, reduction="none", eps=eps)
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


class GIoULoss(nn.Module):
    """:func:`giou_loss` times ``loss_weight``."""

    def __init__(self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0):
        super().__init__()
        self.eps = eps
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, preds, targets, weight=None, avg_factor=None) -> Tensor:
        """Compute the loss."""
        loss = giou_loss(preds, targets, weight, self.eps, self.reduction, avg_factor)
        return self.loss_weight * loss
