"""Networks that turn images into feature maps."""

from detrex.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    ResNet,
    ResNetBlockBase,
)

__all__ = ["BasicBlock", "BasicStem", "BottleneckBlock", "ResNet", "ResNetBlockBase"]
