"""Convolutions of one pixel, which are products of matrices, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import convolution_gradients
from ._library import is_eager_in_float32_on_cpu, is_intel

FEWEST_PRODUCTS = 2**28
"""Multiply-adds below which it does not matter by what they are done."""


def convolution_1x1(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(images, weight, bias)``, faster backward on Intel's and on AVX2 processors.

    There oneDNN is slower than MKL at the gradient of the weights, which a product by MKL then is,
    on Intel's also at that of images that have no fewer channels than the outputs. This is so for
    large images in float32 on the CPU with their channels last in memory; anywhere else this is
    PyTorch's convolution. Results are the same up to rounding.

    Args:
        images: (B, C, H, W).
        weight: (N, C, 1, 1).
        bias: (N,).

    Returns:
        (B, N, H, W).
    """
    if (
        torch.is_grad_enabled()
        and weight.requires_grad
        and is_eager_in_float32_on_cpu(images, weight)
        and not torch._C._are_functorch_transforms_active()  # where layouts cannot be asked for
        and weight_gradient_is_product()
        and images.shape[0] * images.shape[2:].numel() * weight.numel() >= FEWEST_PRODUCTS
        and images.is_contiguous(memory_format=torch.channels_last)
    ):
        return _Convolution.apply(images, weight, bias)
    return F.conv2d(images, weight, bias)


def weight_gradient_is_product() -> bool:
    """Whether PyTorch's convolutions take longer for the gradient of their weights than MKL."""
    return is_intel() or torch.backends.cpu.get_cpu_capability() == "AVX2"


def image_gradient_is_product(weight: Tensor) -> bool:
    """Whether they do for the gradient of their images, with a weight (N, C, 1, 1)."""
    return is_intel() and weight.shape[0] <= weight.shape[1]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, weight = ctx.saved_tensors
        return gradients(grad_output, images, weight, ctx.needs_input_grad)


def gradients(
    grad_output: Tensor, images: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Of images (B, C, H, W), weight (N, C, 1, 1) and bias (N,), as far as needed.

    Args:
        grad_output: (B, N, H, W).
        images: what was convolved.
        weight: with what.
        needed: for images, weight and bias.
    """
    for_images, for_weight, for_bias = needed
    by_product = for_weight and weight_gradient_is_product()
    images_by_product = for_images and image_gradient_is_product(weight)
    products = images_by_product, by_product, for_bias and by_product
    others = (
        for_images and not images_by_product,
        for_weight and not by_product,
        for_bias and not by_product,
    )
    if not any(products):
        return convolution_gradients(grad_output, images, weight, others)
    made = _products(grad_output, images, weight, products)
    if not any(others):
        return made
    found = convolution_gradients(grad_output, images, weight, others)
    return tuple(x if by else y for x, y, by in zip(made, found, products, strict=True))


@torch.autocast("cpu", enabled=False)  # which may be on where backward is called
def _products(
    grad_output: Tensor, images: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    for_images, for_weight, for_bias = needed
    grad_rows = _rows(grad_output)
    of_images = of_weight = None
    if for_images:
        found = grad_rows @ weight[:, :, 0, 0]
        of_images = found.reshape(*_channels_last(images).shape).permute(0, 3, 1, 2)
    if for_weight:
        of_weight = _weight_gradient(grad_rows, _rows(images))[:, :, None, None]
    return of_images, of_weight, grad_rows.sum(0) if for_bias else None


def _channels_last(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def _rows(images: Tensor) -> Tensor:
    """Pixels (B * H * W, C)."""
    return _channels_last(images).reshape(-1, images.shape[1])


def _weight_gradient(grad_rows: Tensor, rows: Tensor) -> Tensor:
    """(N, K) from gradients (T, N) and pixels (T, K)."""
    pixels, outputs = grad_rows.shape
    # MKL is faster with the fewer channels first; then it must pay to turn the result around
    if outputs > rows.shape[1] and pixels > 4 * outputs:
        return (rows.mT @ grad_rows).mT.contiguous()
    return grad_rows.mT @ rows
