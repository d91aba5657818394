"""Attention and activations that keep little of the forward pass for the backward pass.

On the CPU, PyTorch's own keep attention weights unless there is no dropout and one width, and with
dropout floating-point noise and what it multiplies besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops import dropout_add, relu_dropout
from ops.dropout import draw_seed, drop_, may_be_overwritten

WEIGHTS_AT_ONCE = 2**20
"""How many attention weights are made at once; a single image's may be more."""


def lean_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout_p: float
) -> Tensor:
    """Scaled dot-product attention on the CPU that keeps no weights, nor which are dropped.

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
    if width < channels:
        query, key = (F.pad(x, (0, channels - width)) for x in (query, key))
    elif channels < width:
        value = F.pad(value, (0, width - channels))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=width**-0.5
    )
    return attended[..., :channels]


class _Attention(torch.autograd.Function):
    """A few images at a time, so that their weights stay in the cache between passes."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        parts = _parts(query, key)
        seeds = [draw_seed() for _ in parts]
        for part, seed in zip(parts, seeds, strict=True):
            weights = _weights(query[part], key[part], _rows(allowed, part))
            torch.matmul(drop_(weights, dropout_p, seed), value[part], out=output[part])
        ctx.save_for_backward(query, key, value, allowed, *seeds)
        ctx.dropout_p = dropout_p
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, allowed, *seeds = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for part, seed in zip(_parts(query, key), seeds, strict=True):
            weights = _weights(query[part], key[part], _rows(allowed, part))
            results = [tensor[part] for tensor in grads]
            inputs = query[part], key[part], value[part]
            _differentiate(grad[part], inputs, weights, ctx.dropout_p, seed, results)
        return *grads, None, None


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """The batch in parts of as many images as are treated at once."""
    return few_images((*query.shape[:-1], key.shape[2]), WEIGHTS_AT_ONCE)


def few_images(shape: Sequence[int], at_once: int) -> list[slice]:
    """The images of a tensor (B, ...), as many together as have few entries, but one at least."""
    step = max(1, at_once // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _rows(allowed: Tensor | None, part: slice) -> Tensor | None:
    shared = allowed is None or allowed.dim() < 4 or allowed.shape[0] == 1
    return allowed if shared else allowed[part]  # type: ignore[index]


def _weights(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if allowed is not None:
        logits = logits.masked_fill_(~allowed, float("-inf"))
    return logits.softmax(-1)


def _differentiate(
    grad: Tensor,
    inputs: Sequence[Tensor],
    weights: Tensor,
    dropout_p: float,
    seed: Tensor,
    results: Sequence[Tensor],
) -> None:
    """Write the gradients of query, key and value into ``results``."""
    query, key, value = inputs
    grad_query, grad_key, grad_value = results
    dropped = dropout_add(weights, None, dropout_p, seed=seed)
    torch.matmul(dropped.transpose(-2, -1), grad, out=grad_value)
    grad_weights = drop_(grad @ value.transpose(-2, -1), dropout_p, seed)
    grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_logits *= query.shape[-1] ** -0.5
    torch.matmul(grad_logits, key, out=grad_query)
    torch.matmul(grad_logits.transpose(-2, -1), query, out=grad_key)


class ReLUDropout(nn.Module):
    """ReLU, then dropout; the result alone is stored.

    Args:
        p: how often an element is dropped in training.
        inplace: whether the result may overwrite the input.
    """

    def __init__(self, p: float, inplace: bool = False):
        super().__init__()
        self.p = p
        self.inplace = inplace

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape to the same."""
        if values.device.type == "cpu" or not self.training or self.p == 0:
            return relu_dropout(values, self.p, self.training, self.inplace)
        return _ReLUDropout.apply(values, self.p)


class _ReLUDropout(torch.autograd.Function):
    """With PyTorch's own dropout, which would keep its mask and what it drops from."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        ctx.scale = 1 / (1 - p)
        result = F.dropout(values.relu(), p)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (result,) = ctx.saved_tensors  # positive where a gradient passes
        return torch.ops.aten.threshold_backward(grad, result, 0).mul_(ctx.scale), None


class LeanPReLU(nn.PReLU):
    """PReLU that overwrites its input and keeps its result alone.

    Nothing else may need the input. On other devices than the CPU, in graphs, and with a slope from
    which the input does not follow, it is PyTorch's.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape to the same."""
        lean = values.device.type == "cpu" and self.num_parameters == 1
        if not lean or torch.jit.is_tracing() or not may_be_overwritten(values):
            return super().forward(values)
        slope = self.weight.item()
        return _PReLU.apply(values, self.weight, slope) if slope > 0 else super().forward(values)


class _PReLU(torch.autograd.Function):
    """With a positive slope, results have the signs of the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, slope: float) -> Tensor:
        ctx.slope, ctx.dtype = slope, weight.dtype
        result = F.leaky_relu_(values.detach(), slope)  # see ops.dropout on marking it
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (result,) = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            products = result.clamp(max=0).mul_(grad)
            grad_weight = products.sum(dtype=ctx.dtype).div_(ctx.slope).view(1)
        grad_values = torch.ops.aten.leaky_relu_backward(grad, result, ctx.slope, True)
        return grad_values, grad_weight, None
