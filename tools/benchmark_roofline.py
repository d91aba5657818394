"""What an operator has to move and compute at least, and how fast this machine could do it.

The counts are lower bounds of the work, not of one algorithm: every input is read once, every
output written once, and a multiply-add is two FLOPs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """The least that a call does.

    Attributes:
        moved: bytes read and written.
        flops: floating-point operations, 0 if the work has none to speak of.
        gathered: bytes of the bilinear corners. Caches serve most of them, so they bound nothing
            by themselves, but a kernel far from its bounds usually waits for them.
        precision: whose FLOP/s bound the work.
    """

    moved: int
    flops: int = 0
    gathered: int = 0
    precision: str = "float32"


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best.

    Attributes:
        bandwidth: bytes per second of a large copy, its reads and its writes counted.
        flops: FLOP/s of a large matrix product by precision.
    """

    bandwidth: float
    flops: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """Lower bounds of a call's time in seconds."""

    memory: float
    compute: float

    def share(self, seconds: float) -> float:
        """Tell how near a measured time comes to the higher bound; 1 is perfect."""
        return max(self.memory, self.compute) / seconds


def bound(work: Work, ceilings: Ceilings) -> Bound:
    """Divide the work by the ceilings; an unknown precision counts as float32."""
    speed = ceilings.flops.get(work.precision, ceilings.flops["float32"])
    return Bound(work.moved / ceilings.bandwidth, work.flops / speed)


# --- counts -------------------------------------------------------------------------------------


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Sum of the tensors' sizes in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def deformable_work(
    value: Tensor, locations: Tensor, weights: Tensor, *, backward: bool = False
) -> Work:
    """Count multi-scale deformable attention.

    Moved: forward reads value, locations and weights and writes the output (B, N, H * D); backward
    reads those three and the output's gradient and writes three gradients.

    FLOPs for each of the B * N * H * V * P points and each channel: forward adds four weighted
    corners, 8; backward adds to the gradient of four corners, 8, and multiplies the output's
    gradient with four corners, 8. Coefficients, which all channels share, are not counted.

    Gathered: forward reads points * 4 * D elements of ``value``; backward reads them again and adds
    to as many of its gradient.

    Args:
        value: (B, S, H, D).
        locations: (B, N, H, V, P, 2).
        weights: (B, N, H, V, P).
        backward: count forward and backward.
    """
    batch, queries, heads = weights.shape[:3]
    channels, size = value.shape[3], value.element_size()
    output = batch * queries * heads * channels * size
    inputs = tensor_bytes(value, locations, weights)
    samples = weights.numel() * channels
    if not backward:
        return Work(inputs + output, 8 * samples, 4 * samples * size)
    return Work(3 * inputs + 2 * output, 24 * samples, 12 * samples * size)


def gaussian_work(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gaussian: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    backward: bool = False,
) -> Work:
    """Count Gaussian-modulated attention.

    Moved: forward reads query, key, value, centers, precision and the mask and writes the output;
    backward reads those, the output and its gradient and writes five gradients.

    FLOPs for each pair of a query and a key that is no padding: forward 2 D for the score, 2 Dv for
    the output, and 5: two additions of the bias (its squares belong to rows and columns, not to
    pairs), the maximum's subtraction, the exponential, the sum. Backward 6 D (the score again,
    gradients of query and key), 4 Dv (gradients of the weight and of value), and 8: two additions
    of the bias, subtraction, exponential, two for the score's gradient, two for its sums by row and
    column.

    A kernel that skips what lies far outside the Gaussian does less than is counted.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        gaussian: centers and precision, each (B, H, N, 2).
        mask: (B, S), True on padding.
        backward: count forward and backward.
    """
    _, heads, queries, channels = query.shape
    keys = key.shape[0] * key.shape[2] if mask is None else int((~mask).sum())
    pairs = heads * queries * keys
    value_channels = value.shape[3]
    output = query.shape[:3].numel() * value_channels * query.element_size()
    inputs = tensor_bytes(query, key, value, *gaussian)
    precision = str(query.dtype).removeprefix("torch.")
    moved = inputs + tensor_bytes(mask) + output
    flops = pairs * (2 * channels + 2 * value_channels + 5)
    if backward:
        moved += 2 * inputs + tensor_bytes(mask) + 2 * output
        flops += pairs * (6 * channels + 4 * value_channels + 8)
    return Work(moved, flops, precision=precision)


def linear_work(tokens: Tensor, weight: Tensor, bias: Tensor, *, backward: bool = False) -> Work:
    """Count a linear layer: M * K * N multiply-adds, in the backward pass twice as many.

    Moved: forward reads all three and writes the output; backward reads tokens, weight and the
    output's gradient and writes three gradients.

    Args:
        tokens: (..., K).
        weight: (N, K).
        bias: (N,).
        backward: count forward and backward.
    """
    rows = tokens.shape[:-1].numel()
    inputs, output = tensor_bytes(tokens, weight, bias), rows * bias.numel() * bias.element_size()
    flops = 2 * rows * weight.numel()
    if not backward:
        return Work(inputs + output, flops)
    return Work(3 * inputs - tensor_bytes(bias) + 2 * output, 3 * flops)


def convolution_work(
    images: Tensor, weight: Tensor, bias: Tensor, *, backward: bool = False
) -> Work:
    """Count a convolution of 3 x 3 pixels with a stride of 1 by F(4 x 4, 3 x 3).

    A tile of 4 x 4 outputs takes 36 multiply-adds for each pair of channels, in the backward pass
    twice as many; transforms are not counted. Bytes as in :func:`linear_work`.

    Args:
        images: (B, C, H, W).
        weight: (N, C, 3, 3).
        bias: (N,).
        backward: count forward and backward.
    """
    batch, channels, height, width = images.shape
    inputs = tensor_bytes(images, weight, bias)
    output = tensor_bytes(images) // channels * len(weight)
    tiles = batch * math.ceil(height / 4) * math.ceil(width / 4)
    flops = 2 * 36 * tiles * channels * len(weight)
    if not backward:
        return Work(inputs + output, flops)
    return Work(3 * inputs - tensor_bytes(bias) + 2 * output, 3 * flops)


def assignment_work(costs: Tensor, sizes: list[int]) -> Work:
    """Count linear assignments: costs are read once, two int64 indices a pair written.

    The steps of the search depend on the costs, so no FLOPs are counted.

    Args:
        costs: (..., N, T), T the sum of ``sizes``.
        sizes: columns of each image.
    """
    problems = math.prod(costs.shape[:-2])
    pairs = problems * sum(min(costs.shape[-2], size) for size in sizes)
    return Work(tensor_bytes(costs) + 16 * pairs)


# --- ceilings -----------------------------------------------------------------------------------


def measure_ceilings(
    device: str, synchronize: Callable[[], None], *, quick: bool = False
) -> Ceilings:
    """Time a large copy and large matrix products; the best of ten counts.

    Args:
        device: ``"cpu"`` or ``"cuda"``; its current number of threads is used.
        synchronize: waits for the device.
        quick: small sizes, for a trial.
    """
    on_cuda = device == "cuda"
    elements, side = (2**28, 8192) if on_cuda else (2**26, 2048)
    if quick:
        elements, side = 2**16, 64
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = _best(partial(target.copy_, source), synchronize)
    flops = {}
    for dtype in (torch.float32, torch.bfloat16) if on_cuda else (torch.float32,):
        left, right = torch.ones(2, side, side, device=device, dtype=dtype)
        seconds = _best(partial(torch.matmul, left, right), synchronize)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return Ceilings(2 * tensor_bytes(source) / copy, flops)


def _best(run: Callable[[], object], synchronize: Callable[[], None], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
