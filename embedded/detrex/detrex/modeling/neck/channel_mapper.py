"""Feature maps brought to one number of channels, and further, smaller ones."""

import copy
from itertools import chain, repeat

from torch import Tensor, nn

from detrex.layers import ConvNormAct, ShapeSpec

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """One convolution per feature map, and stride-2 convolutions for further levels.

    Args:
        input_shapes: shape of each feature map, by name.
        in_features: names of the feature maps to use, from high to low resolution.
        out_channels: channels of every output.
        kernel_size: of the convolutions on the given feature maps, as ``stride`` is.
        stride: see ``kernel_size``.
        bias: of all convolutions, as ``groups`` and ``dilation`` are.
        groups: see ``bias``.
        dilation: see ``bias``.
        norm_layer: copied for every convolution, as ``activation`` is.
        activation: see ``norm_layer``.
        num_outs: number of outputs, by default that of ``input_shapes``. Further ones come from
            3x3 convolutions with stride 2, the first of them on the last feature map.
        kwargs: ignored.
    """

    def __init__(
        self,
        input_shapes: dict[str, ShapeSpec],
        in_features: list[str],
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        groups: int = 1,
        dilation: int = 1,
        norm_layer: nn.Module | None = None,
        activation: nn.Module | None = None,
        num_outs: int | None = None,
        **kwargs,
    ):
        super().__init__()

        def conv(in_channels, kernel_size, stride):
            return ConvNormAct(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding=(kernel_size - 1) // 2,
                dilation=dilation,
                groups=groups,
                bias=bias,
                norm_layer=copy.deepcopy(norm_layer),
                activation=copy.deepcopy(activation),
            )

        self.input_shapes = input_shapes
        self.in_features = in_features
        self.out_channels = out_channels
        in_channels = [input_shapes[name].channels for name in in_features]
        self.convs = nn.ModuleList(conv(channels, kernel_size, stride) for channels in in_channels)

        further = (len(input_shapes) if num_outs is None else num_outs) - len(in_channels)
        self.extra_convs = None
        if further > 0:
            widths = chain(in_channels[-1:], repeat(out_channels, further - 1))
            self.extra_convs = nn.ModuleList(conv(channels, 3, 2) for channels in widths)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Map the named feature maps to (B, out_channels, H, W) each, and add the further ones."""
        assert len(inputs) == len(self.convs), (
            f"ChannelMapper: found feature maps {list(inputs)}, expected {list(self.in_features)}"
        )
        maps = [inputs[name] for name in self.in_features]
        outputs = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        source = maps[-1]
        for conv in self.extra_convs or ():
            source = conv(source)
            outputs.append(source)
        return tuple(outputs)
