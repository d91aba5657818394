"""Building blocks of convolutional networks."""

from detectron2.layers.batch_norm import FrozenBatchNorm2d, get_norm
from detectron2.layers.blocks import CNNBlockBase
from detectron2.layers.shape_spec import ShapeSpec
from detectron2.layers.wrappers import Conv2d, cat

__all__ = ["CNNBlockBase", "Conv2d", "FrozenBatchNorm2d", "ShapeSpec", "cat", "get_norm"]
