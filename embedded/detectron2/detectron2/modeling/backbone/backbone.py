"""Base class of backbones."""

from abc import ABCMeta, abstractmethod

from torch import nn

from detectron2.layers import ShapeSpec

__all__ = ["Backbone"]


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network that maps images (B, 3, H, W) to named feature maps."""

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    def __init__(self):
        super().__init__()

    @abstractmethod
    def forward(self):
        """Return a dict from feature name to feature map."""

    @property
    def size_divisibility(self) -> int:
        """What image height and width must be multiples of; 0 means any size is fine."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further demands on padding, such as ``square_size``; none by default."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map that ``forward`` returns."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        names = self._out_features
        return {n: ShapeSpec(channels=channels[n], stride=strides[n]) for n in names}
