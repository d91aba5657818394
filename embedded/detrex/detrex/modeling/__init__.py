"""Parts of DETR-like detectors: backbones, necks, matching and losses."""

from detrex.modeling.backbone import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    ResNet,
    ResNetBlockBase,
)
from detrex.modeling.criterion import BaseCriterion, SetCriterion
from detrex.modeling.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GIoULoss,
    L1Loss,
    cross_entropy,
    dice_loss,
    giou_loss,
    l1_loss,
    reduce_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
    weight_reduce_loss,
)
from detrex.modeling.matcher import HungarianMatcher
from detrex.modeling.neck import ChannelMapper

__all__ = [
    "BaseCriterion",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "ChannelMapper",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GIoULoss",
    "HungarianMatcher",
    "L1Loss",
    "ResNet",
    "ResNetBlockBase",
    "SetCriterion",
    "cross_entropy",
    "dice_loss",
    "giou_loss",
    "l1_loss",
    "reduce_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "weight_reduce_loss",
]
