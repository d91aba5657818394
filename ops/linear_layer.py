"""Linear layers, for many tokens on the CPU by oneDNN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._library import is_eager_in_float32_on_cpu
from .pixel_convolution import FEWEST_PRODUCTS, convolution_1x1
from .watched import is_watched

FEWEST_CHANNELS = 64
"""Below which PyTorch's own way is as fast."""


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, for many tokens on the CPU in float32 as a convolution of one pixel.

    PyTorch leaves products of matrices to MKL, which is at its best on Intel's processors alone,
    and convolutions to oneDNN. Results are the same up to rounding.

    Args:
        tokens: (..., K), of any layout.
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    broadcast = bias is not None and bias.shape != weight.shape[:1]
    if broadcast or not is_faster_as_convolution(tokens, weight):
        return F.linear(tokens, weight, bias)
    output = convolution_1x1(as_image(tokens), weight[:, :, None, None], bias)
    return as_tokens(output, tokens)


def as_image(tokens: Tensor) -> Tensor:
    """Tokens (..., K) as one image (1, K, 1, T) with its channels last."""
    return tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)


def as_tokens(image: Tensor, like: Tensor) -> Tensor:
    """One image (1, N, 1, T) as tokens (..., N), in the order of others."""
    return image.permute(0, 2, 3, 1).reshape(*like.shape[:-1], image.shape[1])


def is_faster_as_convolution(tokens: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` of tokens (..., K) and a weight (N, K) is a convolution."""
    return (
        is_eager_in_float32_on_cpu(tokens)
        and tokens.shape[:-1].numel() * weight.numel() >= FEWEST_PRODUCTS
        and min(weight.shape) >= FEWEST_CHANNELS
        and torch.get_num_threads() > 1  # PyTorch's convolution of one image is its own otherwise
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


class Linear(nn.Linear):
    """PyTorch's layer by :func:`linear`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return linear(tokens, self.weight, self.bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is the product with its weight and the sum with its bias, and no more."""
    # by what it does, as torch.export puts subclasses in place of modules
    does = type(layer).forward
    known = does is Linear.forward or does is nn.Linear.forward
    return known and layer.bias is not None and not is_watched(layer)
