"""Networks that turn images into feature maps."""

from detectron2.modeling.backbone.backbone import Backbone
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    ResNet,
    ResNetBlockBase,
    make_stage,
)
from detectron2.modeling.backbone.swin import SwinTransformer

__all__ = [
    "Backbone",
    "BasicStem",
    "BottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "SwinTransformer",
    "make_stage",
]
