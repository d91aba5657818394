"""From elementwise losses to one number."""

import torch
from torch import Tensor

__all__ = ["reduce_loss", "weight_reduce_loss"]


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """Reduce by ``"none"``, ``"mean"`` or ``"sum"``; other names raise ValueError."""
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: found {reduction!r}, expected 'none', 'mean' or 'sum'")
    return loss.mean() if reduction == "mean" else loss.sum()


def weight_reduce_loss(
    loss: Tensor, weight: Tensor | None = None, reduction="mean", avg_factor=None
) -> Tensor:
    """Multiply by ``weight`` and reduce; with ``avg_factor`` the mean is the sum divided by it.

    Raises:
        ValueError: ``avg_factor`` is given for the reduction ``"sum"``.
    """
    if weight is not None:
        loss = loss * weight
    if avg_factor is None:
        return reduce_loss(loss, reduction)
    if reduction == "sum":
        raise ValueError("avg_factor: expected reduction 'mean' or 'none', found 'sum'")
    if reduction == "none":
        return loss
    return loss.sum() / (avg_factor + torch.finfo(loss.dtype).eps)
