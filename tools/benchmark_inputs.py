"""What detectors give the operators: shapes and values of the benchmark's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools import benchmark_peers as peers


@dataclass(frozen=True)
class Sizes:
    """Shapes of all cases; the defaults are those of detectors on 800 x 1066 pixels."""

    heads: int = 8
    channels: int = 32
    points: int = 4
    levels: tuple[tuple[int, int], ...] = ((100, 134), (50, 67), (25, 34), (13, 17))
    encoder_batches: tuple[int, ...] = (1,)
    decoder_queries: tuple[int, ...] = (300, 900)
    decoder_batches: tuple[int, ...] = (1, 2, 8)
    maps: tuple[tuple[int, int], ...] = ((25, 34), (50, 67))
    map_queries: int = 300
    map_batches: tuple[int, ...] = (1, 2)
    matched_images: int = 16
    matched_queries: int = 300
    matched_targets: tuple[int, int] = (7, 100)
    linear: tuple[tuple[int, int], ...] = ((256, 256), (256, 1024), (1024, 256))
    feed_forward: tuple[tuple[int, int], ...] = ((256, 1024), (256, 2048))
    convolved: tuple[tuple[int, int, int], ...] = (
        (64, 200, 267),
        (128, 100, 134),
        (256, 50, 67),
        (512, 25, 34),
    )
    compiled_peers: bool = True


QUICK = Sizes(
    heads=2,
    channels=8,
    points=2,
    levels=((6, 8), (3, 4)),
    decoder_queries=(5,),
    decoder_batches=(2,),
    maps=((4, 5),),
    map_queries=6,
    map_batches=(2,),
    matched_images=2,
    matched_queries=6,
    matched_targets=(1, 4),
    linear=((16, 32),),
    feed_forward=((16, 32),),
    convolved=((16, 7, 9),),
    compiled_peers=False,
)


def random_tensor(
    shape: Sequence[int], device: str, *, seed: int = 0, uniform: bool = False
) -> Tensor:
    """Numbers that depend on the seed alone, not on the device."""
    draw = torch.rand if uniform else torch.randn
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)


def deformable_inputs(
    sizes: Sizes, batch: int, queries: int | None, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations and weights as a model makes them.

    Locations are offsets of some two cells on each level around a reference point: in the encoder
    (``queries`` None) the centre of a token's cell, in the decoder anywhere. Weights are a softmax.
    Both stay in float32 beside a value in bfloat16, as under autocast.

    Returns:
        value (B, S, H, D) in ``dtype``, locations (B, N, H, V, P, 2), weights (B, N, H, V, P).
    """
    tokens = sum(height * width for height, width in sizes.levels)
    value = random_tensor((batch, tokens, sizes.heads, sizes.channels), device).to(dtype)
    if queries is None:
        points = torch.cat(
            [
                (peers.cell_coordinates((height, width), value.device) + 0.5)
                / value.new_tensor([width, height], dtype=torch.float32)
                for height, width in sizes.levels
            ]
        ).expand(batch, -1, -1)
    else:
        points = random_tensor((batch, queries, 2), device, seed=1, uniform=True)
    extents = points.new_tensor([(width, height) for height, width in sizes.levels])
    shape = (*points.shape[:2], sizes.heads, len(sizes.levels), sizes.points)
    offsets = 2 * random_tensor((*shape, 2), device, seed=2) / extents[:, None]
    locations = points[:, :, None, None, None] + offsets
    weights = random_tensor(shape, device, seed=3).flatten(3).softmax(-1).view(shape)
    return value, locations, weights


def gaussian_inputs(
    sizes: Sizes,
    batch: int,
    shape: tuple[int, int],
    padded: bool,
    dtype: torch.dtype,
    device: str,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Inputs as SMCA starts with: Gaussians of two to three cells, a head's centre near a query's.

    Centers and precision stay in float32 beside bfloat16, as under autocast.

    Returns:
        query (B, H, N, D), key and value (B, H, S, D), centers and precision (B, H, N, 2); the mask
        (B, S) of the right fifth of the map if ``padded``, else None.
    """
    height, width = shape
    heads, queries, channels = sizes.heads, sizes.map_queries, sizes.channels
    query = random_tensor((batch, heads, queries, channels), device).to(dtype)
    key, value = (
        random_tensor((batch, heads, height * width, channels), device, seed=seed).to(dtype)
        for seed in (1, 2)
    )
    extent = torch.tensor([width, height], device=device)
    centers = random_tensor((batch, 1, queries, 2), device, seed=3, uniform=True) * extent
    centers = centers + random_tensor((batch, heads, queries, 2), device, seed=4)
    sigma = 2 + random_tensor((batch, heads, queries, 2), device, seed=5, uniform=True)
    mask = None
    if padded:
        x = peers.cell_coordinates(shape, query.device)[:, 0]
        mask = (x >= width - width // 5).expand(batch, -1).contiguous()
    return (query, key, value, centers, 1 / (2 * sigma.square())), mask


def matcher_inputs(sizes: Sizes, layers: tuple[int, ...], device: str) -> tuple[Tensor, list[int]]:
    """Costs of class and boxes where half of the queries lie near some target.

    Returns:
        costs (*layers, N, T) and the targets of each image.
    """
    low, high = sizes.matched_targets
    draw = random_tensor((sizes.matched_images,), "cpu", uniform=True)
    targets = (low + draw * (high + 1 - low)).long().tolist()
    queries = sizes.matched_queries
    blocks = []
    for image, count in enumerate(targets):
        seed = 10 * image
        boxes = random_tensor((count, 4), "cpu", seed=seed, uniform=True)
        found = random_tensor((*layers, queries, 4), "cpu", seed=seed + 1, uniform=True)
        near = boxes[torch.arange(queries // 2) % count]
        noise = random_tensor((*layers, queries // 2, 4), "cpu", seed=seed + 2)
        found[..., : queries // 2, :] = near + 0.05 * noise
        classes = random_tensor((*layers, queries, count), "cpu", seed=seed + 3, uniform=True)
        blocks.append(5 * (found[..., None, :] - boxes).abs().sum(-1) - 2 * classes)
    return torch.cat(blocks, dim=-1).to(device), targets


def linear_inputs(sizes: Sizes, batch: int, inputs: int, outputs: int) -> tuple[Tensor, ...]:
    """Tokens (B, S, K) of all levels, weight (N, K) and bias (N,), on the CPU."""
    tokens = sum(height * width for height, width in sizes.levels)
    shapes = (batch, tokens, inputs), (outputs, inputs), (outputs,)
    return tuple(random_tensor(shape, "cpu", seed=seed) for seed, shape in enumerate(shapes))


def convolution_inputs(channels: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Two images (2, C, H, W), channels last, weight (C, C, 3, 3) and bias (C,), on the CPU."""
    shapes = (2, channels, height, width), (channels, channels, 3, 3), (channels,)
    images, weight, bias = (random_tensor(x, "cpu", seed=seed) for seed, x in enumerate(shapes))
    return images.contiguous(memory_format=torch.channels_last), weight, bias
