"""Base class of convolutional blocks."""

from torch import nn

from detectron2.layers.batch_norm import FrozenBatchNorm2d

__all__ = ["CNNBlockBase"]


class CNNBlockBase(nn.Module):
    """A block with a known number of input and output channels and a known stride."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self):
        """Stop training this block: no gradients, fixed normalisation; return the block."""
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
