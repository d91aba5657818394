"""ResNet: deep residual learning for image recognition (He et al., 2016)."""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone.backbone import Backbone

__all__ = [
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "make_stage",
]

ResNetBlockBase = CNNBlockBase

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_FIRST_STRIDES = (1, 2, 2, 2)
_STEM_CHANNELS = 64
_BASE_CHANNELS = (64, 128, 256, 512)
_BOTTLENECK_EXPANSION = 4


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm, **kwargs) -> Conv2d:
    """Convolution with normalisation that, at stride 1, keeps the spatial size."""
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=padding,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )
    c2_msra_fill(conv)
    return conv


def _shortcut(in_channels: int, out_channels: int, stride: int, norm) -> Conv2d | None:
    if in_channels == out_channels:
        return None
    return _conv(in_channels, out_channels, 1, norm, stride=stride)


class BasicBlock(CNNBlockBase):
    """Residual block of two 3x3 convolutions (ResNet-18 and 34)."""

    def __init__(self, in_channels, out_channels, *, stride=1, norm="BN"):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        out = self.conv2(F.relu_(self.conv1(x)))
        return F.relu_(out.add_(residual))


class BottleneckBlock(CNNBlockBase):
    """Residual block of 1x1, 3x3 and 1x1 convolutions (ResNet-50 and deeper).

    The stride sits on the 3x3 convolution, or on the first 1x1 with ``stride_in_1x1``.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        bottleneck_channels,
        stride=1,
        num_groups=1,
        norm="BN",
        stride_in_1x1=False,
        dilation=1,
    ):
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm,
            stride=stride_3x3,
            groups=num_groups,
            dilation=dilation,
        )
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        return F.relu_(self.conv3(out).add_(residual))


class BasicStem(CNNBlockBase):
    """7x7 convolution and max pooling: the first, stride-4 part of a ResNet."""

    def __init__(self, in_channels=3, out_channels=64, norm="BN"):
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / 4, W / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """Stem, residual stages ``res2``, ``res3``, ... and an optional classifier ``linear``.

    Args:
        stem: module with ``out_channels`` and ``stride``.
        stages: the blocks of each stage, see :meth:`make_stage`.
        num_classes: outputs of the classifier; ``None`` for no classifier.
        out_features: what ``forward`` returns, by name; by default the last layer. Stages behind
            the last one asked for are left out.
        freeze_at: number of parts to freeze, see :meth:`freeze`.
    """

    def __init__(self, stem, stages, num_classes=None, out_features=None, freeze_at=0):
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        self._out_feature_channels = {"stem": stem.out_channels}
        self._out_feature_strides = {"stem": stem.stride}

        names = [f"res{i}" for i in range(2, 2 + len(stages))]
        if out_features is not None:
            wanted = [i for i, name in enumerate(names) if name in out_features]
            names = names[: max(wanted, default=-1) + 1]
        previous = "stem"
        for name, blocks in zip(names, stages, strict=False):
            self._add_stage(name, blocks, previous)
            previous = name
        self.stage_names = tuple(names)

        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.linear = nn.Linear(self._out_feature_channels[previous], num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)  # as in "ImageNet in 1 Hour", section 5.1
            previous = "linear"

        self._out_features = [previous] if out_features is None else out_features
        available = [name for name, _ in self.named_children()]
        for feature in self._out_features:
            assert feature in available, f"ResNet has no feature {feature!r}, only {available}"
        self.freeze(freeze_at)

    def _add_stage(self, name: str, blocks: Sequence[CNNBlockBase], previous: str) -> None:
        assert len(blocks) > 0, f"ResNet stage {name} has no blocks"
        for block in blocks:
            assert isinstance(block, CNNBlockBase), f"{name}: {block} is not a CNNBlockBase"
        stride = self._out_feature_strides[previous]
        for block in blocks:
            stride *= block.stride
        self.add_module(name, nn.Sequential(*blocks))
        self._out_feature_strides[name] = stride
        self._out_feature_channels[name] = blocks[-1].out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Map images (B, C, H, W) to the features named by ``out_features``."""
        assert x.dim() == 4, f"ResNet: found an input of shape {tuple(x.shape)}, expected 4 axes"
        return {name: out for name, out in self._layer_by_layer(x) if name in self._out_features}

    def _layer_by_layer(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name in ("stem", *self.stage_names):
            x = self.get_submodule(name)(x)
            yield name, x
        if self.num_classes is not None:
            yield "linear", self.linear(self.avgpool(x).flatten(1))

    def freeze(self, freeze_at=0):
        """Freeze the stem (1), the stem and ``res2`` (2), and so on; return the network."""
        parts = [[self.stem], *(getattr(self, name) for name in self.stage_names)]
        for blocks in parts[: max(freeze_at, 0)]:
            for block in blocks:
                block.freeze()
        return self

    @staticmethod
    def make_stage(block_class, num_blocks, *, in_channels, out_channels, **kwargs):
        """Build the blocks of one stage.

        ``kwargs`` go to every block; one named ``<argument>_per_block`` holds one value per block.
        """
        shared, per_block = {}, {}
        for key, value in kwargs.items():
            argument = key.removesuffix("_per_block")
            if argument == key:
                shared[key] = value
                continue
            assert argument not in kwargs, f"make_stage: found both {argument} and {key}"
            assert len(value) == num_blocks, (
                f"make_stage: found {len(value)} values in {key}, expected {num_blocks}"
            )
            per_block[argument] = value
        return [
            block_class(
                in_channels=out_channels if i else in_channels,
                out_channels=out_channels,
                **shared,
                **{argument: values[i] for argument, values in per_block.items()},
            )
            for i in range(num_blocks)
        ]

    @staticmethod
    def make_default_stages(depth, block_class=None, **kwargs):
        """Build the four stages of ResNet-18, 34, 50, 101 or 152; ``kwargs`` go to every block."""
        bottleneck = depth >= 50
        if block_class is None:
            block_class = BottleneckBlock if bottleneck else BasicBlock
        stages = []
        in_channels = _STEM_CHANNELS
        for blocks, stride, channels in zip(
            _BLOCKS_PER_STAGE[depth], _FIRST_STRIDES, _BASE_CHANNELS, strict=True
        ):
            out_channels = channels * (_BOTTLENECK_EXPANSION if bottleneck else 1)
            width = {"bottleneck_channels": channels} if bottleneck else {}
            stages.append(
                ResNet.make_stage(
                    block_class,
                    blocks,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    stride_per_block=[stride] + [1] * (blocks - 1),
                    **{**kwargs, **width},
                )
            )
            in_channels = out_channels
        return stages


def make_stage(*args, **kwargs):
    """Same as :meth:`ResNet.make_stage`."""
    return ResNet.make_stage(*args, **kwargs)
