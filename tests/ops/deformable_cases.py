"""Random arguments of multi-scale deformable attention, and its formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ops

LEVELS = ((5, 7), (3, 4), (1, 1))


def example(
    levels=LEVELS,
    images=2,
    queries=6,
    heads=3,
    channels=5,
    points=2,
    spread=1.4,
    seed=0,
    dtype=None,
) -> tuple[Tensor, tuple[tuple[int, int], ...], Tensor, Tensor]:
    """Random arguments; locations spread beyond the borders."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in levels)
    shape = (images, queries, heads, len(levels), points)

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = draw(images, tokens, heads, channels) - 0.5
    locations = (draw(*shape, 2) - 0.5) * spread + 0.5
    weights = draw(*shape)
    return value.to(dtype), levels, locations.to(dtype), weights.to(dtype)


def by_formula(value: Tensor, levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Eq. 3 as a loop over samples in Python floats."""
    images, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(images, queries, heads, channels, dtype=torch.float64)
    starts = [sum(h * w for h, w in levels[:level]) for level in range(len(levels))]
    for b in range(images):
        for n in range(queries):
            for h in range(heads):
                for level, (height, width) in enumerate(levels):
                    for p in range(points):
                        x, y = (float(c) for c in locations[b, n, h, level, p])
                        if not (math.isfinite(x) and math.isfinite(y)):
                            continue
                        x, y = x * width - 0.5, y * height - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if not (0 <= row < height and 0 <= column < width):
                                    continue
                                part = (1 - abs(x - column)) * (1 - abs(y - row))
                                token = starts[level] + row * width + column
                                weight = float(weights[b, n, h, level, p]) * part
                                output[b, n, h] += weight * value[b, token, h].double()
    return output.flatten(2)


def gradients(arguments, grad: Tensor) -> tuple[Tensor, ...]:
    value, levels, locations, weights = arguments
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = ops.multi_scale_deformable_attention(leaves[0], levels, *leaves[1:])
    return torch.autograd.grad(output, leaves, grad)
