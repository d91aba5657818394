"""ResNet under the names that detrex's configs use."""

from detectron2.modeling.backbone import resnet as _detectron2
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNetBlockBase

__all__ = ["BasicBlock", "BasicStem", "BottleneckBlock", "ResNet", "ResNetBlockBase"]


class BasicStem(_detectron2.BasicStem):
    """detectron2's class of this name."""


class ResNet(_detectron2.ResNet):
    """detectron2's class of this name."""

    # Defined anew so that a saved config names this class.
    @staticmethod
    def make_default_stages(depth, block_class=None, **kwargs):
        """Build the four stages of ResNet-18, 34, 50, 101 or 152."""
        return _detectron2.ResNet.make_default_stages(depth, block_class, **kwargs)
