"""ResNet with torchvision's parameter names, fixed normalisation and optional dilation (DC5)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BackboneBase", "FrozenBatchNorm2d", "TorchvisionResNet"]

_EPS = 1e-5
_BLOCKS_PER_STAGE = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_SHALLOW = ("resnet18", "resnet34")
_TRAINED = ("layer2", "layer3", "layer4")


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters, all of them buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n):
        super().__init__()
        fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        for name, value in fresh.items():
            self.register_buffer(name, torch.full((n,), value))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (B, C, H, W)."""
        scale = self.weight * torch.rsqrt(self.running_var + _EPS)
        shift = self.bias - self.running_mean * scale
        scale, shift = (t.to(x.dtype).view(-1, 1, 1) for t in (scale, shift))
        return x * scale + shift


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride=1, dilation=1) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """Residual block whose convolutions are (kernel size, output channels, stride, dilation)."""

    def __init__(self, in_channels: int, convs: list[tuple[int, int, int, int]], stride: int):
        super().__init__()
        channels = in_channels
        for i, (kernel_size, width, conv_stride, dilation) in enumerate(convs, start=1):
            self.add_module(f"conv{i}", _conv(channels, width, kernel_size, conv_stride, dilation))
            self.add_module(f"bn{i}", FrozenBatchNorm2d(width))
            channels = width
        self.depth = len(convs)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                _conv(in_channels, channels, 1, stride), FrozenBatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = F.relu_(out)
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu_(out + residual)


def _stage(name: str, in_channels: int, width: int, blocks: int, stride: int, dilated: bool):
    """Build one stage; if dilated, its stride becomes a dilation from the second block on."""
    dilation = stride if dilated else 1
    stride = 1 if dilated else stride
    layers = []
    for i in range(blocks):
        s, d = (stride, 1) if i == 0 else (1, dilation)
        if name in _SHALLOW:
            convs = [(3, width, s, 1), (3, width, 1, 1)]
        else:
            convs = [(1, width, 1, 1), (3, width, s, d), (1, 4 * width, 1, 1)]
        layers.append(_Block(in_channels, convs, s))
        in_channels = convs[-1][1]
    return nn.Sequential(*layers)


def _resnet(name: str, dilation: bool) -> nn.Sequential:
    """Build torchvision's network without its classifier."""
    if name not in _BLOCKS_PER_STAGE:
        raise ValueError(f"TorchvisionResNet: found {name!r}, expected {list(_BLOCKS_PER_STAGE)}")
    if dilation and name in _SHALLOW:
        raise NotImplementedError(f"TorchvisionResNet: {name} has no dilated version")
    expansion = 1 if name in _SHALLOW else 4
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_conv(3, 64, 7, stride=2),
        bn1=FrozenBatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    in_channels = 64
    for i, blocks in enumerate(_BLOCKS_PER_STAGE[name], start=1):
        width, stride = 32 * 2**i, 1 if i == 1 else 2
        dilated = dilation and i == 4
        parts[f"layer{i}"] = _stage(name, in_channels, width, blocks, stride, dilated)
        in_channels = width * expansion
    return nn.Sequential(parts)


class BackboneBase(nn.Module):
    """Backbone that returns the outputs of some of its children under new names.

    Only layer2, layer3 and layer4 are trained, and those only with ``train_backbone``.
    ``return_layers`` maps the children's names to the new ones; later children are left out.
    """

    def __init__(
        self, backbone: nn.Module, train_backbone: bool, num_channels: int, return_layers: dict
    ):
        super().__init__()
        for name, parameter in backbone.named_parameters():
            trained = train_backbone and any(layer in name for layer in _TRAINED)
            parameter.requires_grad_(parameter.requires_grad and trained)
        children = dict(backbone.named_children())
        unknown = set(return_layers) - set(children)
        if unknown:
            raise ValueError(f"return_layers: found {sorted(unknown)}, expected {list(children)}")
        last = max(list(children).index(name) for name in return_layers)
        self.body = nn.ModuleDict(dict(list(children.items())[: last + 1]))
        self.num_channels = num_channels
        self.return_layers = dict(return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to the feature maps that ``return_layers`` names."""
        outputs = {}
        for name, layer in self.body.items():
            x = layer(x)
            if name in self.return_layers:
                outputs[self.return_layers[name]] = x
        return outputs


class TorchvisionResNet(BackboneBase):
    """ResNet-18 to 152; with ``dilation`` layer4 keeps stride 16 (DC5), from ResNet-50 on.

    Weights are random; load a checkpoint for others.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool,
        return_layers: dict = {"layer4": "res5"},  # noqa: B006
        dilation: bool = False,
    ):
        num_channels = 512 if name in _SHALLOW else 2048
        super().__init__(_resnet(name, dilation), train_backbone, num_channels, return_layers)
