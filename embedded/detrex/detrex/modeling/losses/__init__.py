"""Losses with weights and reduction."""

from detrex.modeling.losses.cross_entropy_loss import CrossEntropyLoss, cross_entropy
from detrex.modeling.losses.dice_loss import DiceLoss, dice_loss
from detrex.modeling.losses.focal_loss import FocalLoss, sigmoid_focal_loss
from detrex.modeling.losses.giou_loss import GIoULoss, giou_loss
from detrex.modeling.losses.smooth_l1_loss import L1Loss, l1_loss, smooth_l1_loss
from detrex.modeling.losses.utils import reduce_loss, weight_reduce_loss

__all__ = [
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GIoULoss",
    "L1Loss",
    "cross_entropy",
    "dice_loss",
    "giou_loss",
    "l1_loss",
    "reduce_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "weight_reduce_loss",
]
