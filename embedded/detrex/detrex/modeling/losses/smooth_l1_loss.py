"""Absolute differences, and their smooth version."""

import fvcore.nn
from torch import Tensor, nn

from detrex.modeling.losses.utils import weight_reduce_loss

__all__ = ["L1Loss", "l1_loss", "smooth_l1_loss"]


def smooth_l1_loss(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    beta: float = 1.0,
    reduction: str = "mean",
    avg_factor: int | None = None,
) -> Tensor:
    """Absolute difference, quadratic below ``beta`` (> 0); 0 without targets."""
    assert beta > 0, f"smooth_l1_loss: found beta={beta}, expected a positive number"
    return _difference(preds, targets, beta, weight, reduction, avg_factor)


def l1_loss(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    reduction: str = "mean",
    avg_factor: int | None = None,
) -> Tensor:
    """Absolute difference; 0 without targets."""
    return _difference(preds, targets, 0.0, weight, reduction, avg_factor)


class L1Loss(nn.Module):
    """:func:`l1_loss` times ``loss_weight``."""

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0):
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, preds, targets, weight=None, avg_factor=None) -> Tensor:
        """Compute the loss."""
        return self.loss_weight * l1_loss(preds, targets, weight, self.reduction, avg_factor)


def _difference(preds, targets, beta, weight, reduction, avg_factor) -> Tensor:
    if targets.numel() == 0:
        return preds.sum() * 0
    assert preds.shape == targets.shape, (
        f"L1 loss: found predictions {tuple(preds.shape)}, targets {tuple(targets.shape)}"
    )
    loss = fvcore.nn.smooth_l1_loss(preds, targets, beta, reduction="none")
    return weight_reduce_loss(loss, weight, reduction, avg_factor)
