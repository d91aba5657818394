"""Cross entropy over mutually exclusive classes."""

import torch.nn.functional as F
from torch import Tensor, nn

from detrex.modeling.losses.utils import weight_reduce_loss

__all__ = ["CrossEntropyLoss", "cross_entropy"]

_IGNORE_NOTHING = -100


def cross_entropy(
    preds: Tensor,
    targets: Tensor,
    weight=None,
    class_weight=None,
    reduction="mean",
    avg_factor=None,
    ignore_index=-100,
    avg_non_ignore=False,
) -> Tensor:
    """Cross entropy of logits (N, K) and labels (N,).

    Args:
        preds: logits.
        targets: labels.
        weight: (N,), weight of each entry.
        class_weight: (K,), weight of each class; it does not enter the mean's denominator.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        avg_factor: what the mean divides by, instead of N.
        ignore_index: label whose entries have no loss.
        avg_non_ignore: whether the mean leaves ignored entries out of its denominator.
    """
    ignore_index = _IGNORE_NOTHING if ignore_index is None else ignore_index
    loss = F.cross_entropy(
        preds, targets, class_weight, ignore_index=ignore_index, reduction="none"
    )
    if avg_non_ignore and avg_factor is None and reduction == "mean":
        avg_factor = (targets != ignore_index).sum()
    weight = None if weight is None else weight.float()
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy` times ``loss_weight``."""

    def __init__(self, reduction="mean", loss_weight=1.0, ignore_index=None, avg_non_ignore=False):
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.avg_non_ignore = avg_non_ignore

    def forward(
        self,
        preds,
        targets,
        weight=None,
        avg_factor=None,
        class_weight=None,
        ignore_index=None,
        **kwargs,
    ) -> Tensor:
        """Compute the loss; ``ignore_index`` overrides the constructor's."""
        loss = cross_entropy(
            preds,
            targets,
            weight,
            class_weight,
            self.reduction,
            avg_factor,
            self.ignore_index if ignore_index is None else ignore_index,
            self.avg_non_ignore,
        )
        return self.loss_weight * loss
