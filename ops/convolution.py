"""Convolutions of 3 x 3 pixels: what is faster for large images on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ._autograd import convolution_gradients, differentiable, map_one_by_one
from ._library import COMPILED_PATH, NAMESPACE, is_eager_in_float32_on_cpu, library

FEWEST_CHANNELS, FEWEST_TILES = 64, 32
"""Channels, and tiles of 4 x 4 pixels in a batch, below which PyTorch's convolution is as fast."""
MULTIPLE = 16
"""Of which numbers of channels are a multiple where the kernels take them."""
LARGE = 2**19
"""Numbers in an image that are copied to another layout by itself."""


def convolution_3x3(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1
) -> Tensor:
    """``F.conv2d(images, weight, bias, stride, padding=1)``, faster on the CPU.

    With a stride of 1, a tile of 4 x 4 outputs takes 36 multiplications for each pair of channels
    instead of 144, by F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural
    Networks" (2016). Results are the same up to rounding errors some five times as large, nine to
    sixteen times in the gradient of the weights. With a stride of 2, weights get their gradient
    from copies in the layout that oneDNN is fast with.

    This is so in float32, where the images have enough channels and tiles for it to pay, the former
    with compiled operators; anywhere else this is PyTorch's convolution.

    Args:
        images: (B, C, H, W), fastest with their channels last in memory.
        weight: (N, C, 3, 3).
        bias: (N,).
        stride: of the outputs.

    Returns:
        (B, N, H, W), with a stride (B, N, ceil(H / stride), ceil(W / stride)).
    """
    if stride == 1 and COMPILED_PATH is not None and is_large(images, weight):
        return _convolve(images, weight, bias, False)
    transformed = torch._C._are_functorch_transforms_active()
    if stride == 2 and is_large(images, weight) and not transformed:
        return _StridedConvolution.apply(images, weight, bias)
    return F.conv2d(images, weight, bias, stride, padding=1)


def is_large(images: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolution_3x3` may do anything else than PyTorch with such tensors."""
    if images.dim() != 4:
        return False
    batch, channels, height, width = images.shape
    return (
        is_eager_in_float32_on_cpu(images, weight)
        and min(channels, len(weight)) >= FEWEST_CHANNELS
        and channels % MULTIPLE == len(weight) % MULTIPLE == 0
        and batch * -(-height // 4) * -(-width // 4) >= FEWEST_TILES
    )


class _StridedConvolution(torch.autograd.Function):
    """With a stride of 2."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, weight = ctx.saved_tensors
        for_images, for_weight, for_bias = ctx.needs_input_grad
        of_images = of_weight = None
        if for_images:  # torch.nn.grad.conv2d_input takes half as long again with channels last
            needed = True, False, False
            of_images, _, _ = convolution_gradients(grad_output, images, weight, needed, 2, 1)
        if for_weight:  # with their channels last, oneDNN needs up to 2.7 times as long
            pair = _channels_first(images), _channels_first(grad_output)
            of_weight = conv2d_weight(pair[0], weight.shape, pair[1], stride=2, padding=1)
        return of_images, of_weight, grad_output.sum((0, 2, 3)) if for_bias else None


def _channels_first(images: Tensor) -> Tensor:
    """Contiguous (B, C, H, W); large images one by one, as PyTorch turns matrices around faster."""
    if images.shape[1:].numel() < LARGE:
        return images.contiguous()
    return torch.stack([image.flatten(1).contiguous() for image in images]).view(images.shape)


def _turned(weight: Tensor) -> Tensor:
    """The filters that carry gradients from the outputs (N) back to the images (C), and back."""
    return weight.flip(2, 3).transpose(0, 1)


# --- registration -------------------------------------------------------------------------------

library.define("convolution_3x3(Tensor input, Tensor weight, Tensor? bias, bool turned) -> Tensor")
library.define("convolution_3x3_weight_gradient(Tensor input, Tensor grad_output) -> Tensor")
_operators = getattr(torch.ops, NAMESPACE)


def _reference(images: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    result = F.conv2d(images, _turned(weight) if turned else weight, bias, padding=1)
    return result.contiguous(memory_format=torch.channels_last)


def _reference_weight_gradient(images: Tensor, grad_output: Tensor) -> Tensor:
    shape = (grad_output.shape[1], images.shape[1], 3, 3)
    return conv2d_weight(images, shape, grad_output, padding=1).contiguous()


def _fake(images: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    shape = (images.shape[0], weight.shape[int(turned)], *images.shape[2:])
    return images.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _fake_weight_gradient(images: Tensor, grad_output: Tensor) -> Tensor:
    return images.new_empty((grad_output.shape[1], images.shape[1], 3, 3))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.turned = inputs[3]


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    for_images, for_weight, for_bias, _ = ctx.needs_input_grad
    of_weight = _weight_gradient(images, grad_output) if for_weight else None
    if ctx.turned and of_weight is not None:
        of_weight = _turned(of_weight)
    return (
        _convolve(grad_output, weight, None, not ctx.turned) if for_images else None,
        of_weight,
        grad_output.sum((0, 2, 3)) if for_bias else None,
        None,
    )


def _save_weight_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_weight_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, grad_output = ctx.saved_tensors
    for_images, for_grad_output = ctx.needs_input_grad
    return (
        _convolve(grad_output, grad, None, True) if for_images else None,
        _convolve(images, grad, None, False) if for_grad_output else None,
    )


def _register() -> None:
    kernels = (
        ("convolution_3x3", _fake, _reference),
        ("convolution_3x3_weight_gradient", _fake_weight_gradient, _reference_weight_gradient),
    )
    for name, fake, slow in kernels:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        map_one_by_one(getattr(_operators, name).default)
        if COMPILED_PATH is None:
            library.impl(name, slow, "CPU")


_register()
_convolve = differentiable(_operators.convolution_3x3.default, _save, _differentiate)
_weight_gradient = differentiable(
    _operators.convolution_3x3_weight_gradient.default,
    _save_weight_gradient,
    _differentiate_weight_gradient,
)
