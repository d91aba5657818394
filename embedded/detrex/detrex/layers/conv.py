"""Convolution with what usually follows it."""

from functools import partial

from torch import Tensor, nn

__all__ = ["ConvNorm", "ConvNormAct"]


class ConvNormAct(nn.Module):
    """Convolution, then the normalisation and the activation that are given.

    Further keyword arguments go to :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm_layer: nn.Module | None = None,
        activation: nn.Module | None = None,
        **kwargs,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            **kwargs,
        )
        self.norm = norm_layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        for step in (self.conv, self.norm, self.activation):
            if step is not None:
                x = step(x)
        return x


ConvNorm = partial(ConvNormAct, activation=None)
