"""Dice loss of masks."""

from torch import Tensor, nn

from detrex.modeling.losses.utils import weight_reduce_loss

__all__ = ["DiceLoss", "dice_loss"]


def dice_loss(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    eps: float = 1e-4,
    reduction: str = "mean",
    avg_factor: int | None = None,
) -> Tensor:
    """One minus the smoothed overlap of masks (N, ...) of probabilities with binary ones."""
    preds, targets = preds.flatten(1), targets.flatten(1).float()
    overlap = 2 * (preds * targets).sum(1)
    total = preds.sum(1) + targets.sum(1)
    smoothing = 1 + eps
    loss = 1 - (overlap + smoothing) / (total + smoothing)
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


class DiceLoss(nn.Module):
    """:func:`dice_loss` times ``loss_weight``; ``use_sigmoid``: of logits, not probabilities."""

    def __init__(self, use_sigmoid=True, reduction="mean", loss_weight=1.0, eps=1e-3):
        super().__init__()
        self.use_sigmoid = use_sigmoid
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.eps = eps

    def forward(self, preds, targets, weight=None, avg_factor=None) -> Tensor:
        """Compute the loss."""
        preds = preds.sigmoid() if self.use_sigmoid else preds
        loss = dice_loss(preds, targets, weight, self.eps, self.reduction, avg_factor)
        return self.loss_weight * loss
