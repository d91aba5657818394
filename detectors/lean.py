"""Attention and ReLU with dropout that keep little of the forward pass for the backward pass.

On the CPU, PyTorch's own keep attention weights unless there is no dropout and one width, and with
dropout floating-point noise and what it multiplies besides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lean_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout_p: float
) -> Tensor:
    """Scaled dot-product attention that keeps no weights.

    With dropout, which of them remain is kept, a byte each.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        allowed: bool, broadcastable to (B, H, N, S), True where attending is allowed.
        dropout_p: below 1.

    Returns:
        (B, H, N, Dv).
    """
    if dropout_p == 0:
        return _of_one_width(query, key, value, allowed)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        return _Attention.apply(query, key, value, allowed, dropout_p)


def _of_one_width(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Zeros make queries, keys and values as wide as PyTorch's fused kernel wants them."""
    width, channels = query.shape[-1], value.shape[-1]
    query, key = (F.pad(x, (0, max(channels - width, 0))) for x in (query, key))
    value = F.pad(value, (0, max(width - channels, 0)))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=width**-0.5
    )
    return attended[..., :channels]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        weights = _weights(query, key, allowed)
        kept = _kept(weights, dropout_p)
        ctx.save_for_backward(query, key, value, kept, allowed)
        ctx.scale = 1 / (1 - dropout_p)
        return (weights.mul_(kept) @ value).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept, allowed = ctx.saved_tensors
        weights, grad = _weights(query, key, allowed), grad * ctx.scale
        grad_value = (weights * kept).transpose(-2, -1) @ grad
        grad_weights = (grad @ value.transpose(-2, -1)).mul_(kept)
        grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_logits = grad_logits * query.shape[-1] ** -0.5
        grad_key = grad_logits.transpose(-2, -1) @ query
        return grad_logits @ key, grad_key, grad_value, None, None


def _weights(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if allowed is not None:
        logits = logits.masked_fill_(~allowed, float("-inf"))
    return logits.softmax(-1)


class ReLUDropout(nn.Module):
    """ReLU, then dropout; the result alone is stored.

    Args:
        p: how often an element is dropped in training.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape to the same."""
        if not self.training or self.p == 0:
            return F.relu(values)
        return _ReLUDropout.apply(values, self.p)


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        ctx.scale = 1 / (1 - p)
        result = values.relu().mul_(_kept(values, p)).mul_(ctx.scale)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (result,) = ctx.saved_tensors  # positive where a gradient passes
        return torch.ops.aten.threshold_backward(grad, result, 0).mul_(ctx.scale), None


def _kept(like: Tensor, p: float) -> Tensor:
    """Bool in the shape of a tensor, False with probability ``p`` in steps of 2^-16."""
    # four draws from one 64-bit number: on the CPU, floats take longer than what they decide
    count = like.numel()
    numbers = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), device=like.device)
    draws = numbers.view(torch.int16)[:count].view(like.shape)
    return draws >= round(p * 2**16) - 2**15
