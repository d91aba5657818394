"""Multi-scale deformable attention on CUDA, in Triton.

A program handles a tile of queries of one image and head, with all their channels. A thread holds
16 bytes of channels, so a sampling point is located once for a row of channels, loads and additions
are vectors, and a sum over the channels stays inside a warp. Tiles of the same head follow one
another: what neighbouring queries read is still in the L2 cache.

Callers have checked shapes and dtypes and made every tensor contiguous.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

NUM_WARPS = 2
VECTOR_BYTES = 16
# With these as plain numbers, one compiled kernel serves images of every size.
UNSPECIALIZED = ["tokens", "queries", "heads"]


def forward(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    r"""Sum what each query samples from the levels (Deformable DETR, eq. 3).

    .. math:: o_{bnh} = \sum_{v,p} A_{bnhvp} \, x_{bhv}(\phi_{bnhvp})

    with attention weights A and the value x of a level at the sampling location phi. The pixel
    coordinate is location * size - 0.5. Between pixels the value is interpolated bilinearly;
    outside its level it is zero. A location that is not finite contributes nothing.

    Args:
        value: (B, S, H, D). The levels follow one another in S, each row by row.
        spatial_shapes: (h, w) of the V levels; S is the sum of their h * w.
        sampling_locations: (B, N, H, V, P, 2) as (x, y), from 0 to 1 inside a level.
        attention_weights: (B, N, H, V, P).

    Returns:
        (B, N, H * D) in value's dtype, accumulated in float32 or, for float64, in float64.
    """
    images, queries, heads = sampling_locations.shape[:3]
    output = value.new_empty(images, queries, heads * value.shape[3])
    if not (value.numel() and attention_weights.numel()):
        return output.zero_()
    levels, points = attention_weights.shape[3:]
    tensors = value, sampling_locations, attention_weights, output
    sizes = _encode(spatial_shapes), value.shape[1], queries, heads
    tiling = _tiling(value, value.dtype)
    grid = _grid(sampling_locations, tiling)
    with _device_of(value):
        _forward_kernel[grid](*tensors, *sizes, V=levels, P=points, **tiling)
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, sampling locations and attention weights.

    Args:
        grad_output: Gradient of what :func:`forward` returned, (B, N, H * D) in value's dtype.
        value: As in :func:`forward`, and so are the next three.
        spatial_shapes: See there.
        sampling_locations: See there.
        attention_weights: See there.
        deterministic: Sum the gradient of value in a fixed order, so that it is equal from run to
            run in every bit, instead of by atomic additions. It costs a sort of the 4 B N H V P
            contributions and about 30 bytes of memory for each.

    Returns:
        The three gradients, each in its input's dtype.
    """
    if not (value.numel() and attention_weights.numel()):
        zeros = torch.zeros_like
        return zeros(value), zeros(sampling_locations), zeros(attention_weights)
    grad_locations = torch.empty_like(sampling_locations)
    grad_weights = torch.empty_like(attention_weights)
    inputs = grad_output, value, sampling_locations, attention_weights
    others = grad_locations, grad_weights, _encode(spatial_shapes)
    with _device_of(value):
        if deterministic:
            grad_value = _add_in_order(*inputs, *others)
        else:
            grad_value = torch.zeros_like(value, dtype=_accumulator(value))
            _launch_backward(*inputs, *others, grad_value=grad_value)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch_backward(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    sizes: tuple[int, ...],
    *,
    grad_value: Tensor | None = None,
    keys: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> None:
    """Add the gradient of value to grad_value or, without it, write its contributions."""
    levels, points = weights.shape[3:]
    # The atomic additions go to the accumulator's dtype. Were the tile made for value's narrower
    # one, a thread would load other channels than it adds.
    tiling = _tiling(value, _accumulator(value)) | {"V": levels, "P": points}
    inputs = grad_output, value, locations, weights
    outputs = grad_value, keys, coefficients, grad_locations, grad_weights
    counts = value.shape[1], locations.shape[1], value.shape[2]
    samples = triton.next_power_of_2(levels * points)
    grid = _grid(locations, tiling)
    _backward_kernel[grid](*inputs, *outputs, sizes, *counts, SAMPLES=samples, **tiling)


def _add_in_order(
    grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *others: Any
) -> Tensor:
    """Return the gradient of value: each row's contributions, added from first to last."""
    rows = value.numel() // value.shape[3]
    # A contribution is a row of grad_output times its coefficient; its key is the row it goes to.
    key_dtype = torch.int32 if rows < 2**31 else torch.int64
    keys = value.new_empty((*weights.shape, 4), dtype=key_dtype)
    coefficients = torch.empty_like(keys, dtype=_accumulator(value))
    inputs = grad_output, value, locations, weights
    _launch_backward(*inputs, *others, keys=keys, coefficients=coefficients)
    keys_in_order, order = torch.sort(keys.flatten(), stable=True)
    every_row = torch.arange(rows + 1, dtype=key_dtype, device=keys.device)
    bounds = torch.searchsorted(keys_in_order, every_row)
    grad_value = torch.empty_like(value)
    tensors = grad_output, order, coefficients, bounds, grad_value
    tiling = _tiling(value, value.dtype)
    grid = (triton.cdiv(rows, tiling["ROWS"]),)
    _sum_kernel[grid](*tensors, rows, FAN_OUT=keys[0, 0, 0].numel(), **tiling)
    return grad_value


def _accumulator(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _tiling(value: Tensor, widest: torch.dtype) -> dict[str, Any]:
    """Return the launch options under which a thread holds a vector of the widest dtype."""
    channels = value.shape[3]
    padded = triton.next_power_of_2(channels)
    threads_per_row = max(1, padded * widest.itemsize // VECTOR_BYTES)
    return {
        "D": channels,
        "PADDED_D": padded,
        "ROWS": max(1, 32 * NUM_WARPS // threads_per_row),
        "FLOAT": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
    }


def _grid(sampling_locations: Tensor, tiling: dict[str, Any]) -> tuple[int]:
    images, queries, heads = sampling_locations.shape[:3]
    return (images * heads * triton.cdiv(queries, tiling["ROWS"]),)


def _encode(spatial_shapes: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Return the sizes as odd numbers above 1; ``_size_of`` reads them.

    Triton compiles a kernel again for a number in a tuple that is 1 or a multiple of 16.
    """
    return tuple(2 * size + 3 for shape in spatial_shapes for size in shape)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def _tile(queries, heads, ROWS: tl.constexpr):
    """Return this program's image and head, its rows of (B, N, H), and which of them exist."""
    tiles = (queries + ROWS - 1) // ROWS
    program = tl.program_id(0)
    image = (program // (tiles * heads)).to(tl.int64)
    head = program // tiles % heads
    query = program % tiles * ROWS + tl.arange(0, ROWS)
    return image, head, (image * queries + query) * heads + head, query < queries


@triton.jit
def _size_of(sizes, level: tl.constexpr):
    return (sizes[2 * level] >> 1) - 1, (sizes[2 * level + 1] >> 1) - 1


@triton.jit
def _locate(locations, weights, sample, exists, height, width, FLOAT: tl.constexpr):
    """Return each sample's weight and place: upper left pixel, rest, and whether it counts."""
    pair = sample[:, None] * 2 + tl.arange(0, 2)[None, :]
    x, y = tl.split(tl.load(locations + pair, mask=exists[:, None], other=0).to(FLOAT))
    x = x * width - 0.5
    y = y * height - 0.5
    counts = exists & (x > -1) & (y > -1) & (x < width) & (y < height)
    x = tl.where(counts, x, 0)
    y = tl.where(counts, y, 0)
    left = tl.floor(x)
    top = tl.floor(y)
    weight = tl.load(weights + sample, mask=counts, other=0).to(FLOAT)
    return weight, (left.to(tl.int32), top.to(tl.int32), x - left, y - top, counts)


@triton.jit
def _offset(place, start, head, heads, width, D: tl.constexpr):
    """Return where the upper left corner's channels begin in value; it may lie outside."""
    left, top, _, _, _ = place
    return ((start + (top * width + left)) * heads + head) * D


@triton.jit
def _corner(place, offset, heads, height, width, corner: tl.constexpr, D: tl.constexpr):
    """Return where a corner's channels begin, whether it is inside, its shares along x and y."""
    left, top, dx, dy, counts = place
    right = corner % 2
    below = corner // 2
    x = left + right
    y = top + below
    inside = counts & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    share_x = dx if right else 1 - dx
    share_y = dy if below else 1 - dy
    return offset + (below * width + right) * heads * D, inside, share_x, share_y


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    value,
    locations,
    weights,
    output,
    sizes,
    tokens,
    queries,
    heads,
    V: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    image, head, row, exists = _tile(queries, heads, ROWS)
    channel = tl.arange(0, PADDED_D)[None, :]
    total = tl.full([ROWS, PADDED_D], 0, FLOAT)
    start = image * tokens
    for level in tl.static_range(V):
        height, width = _size_of(sizes, level)
        # Unrolled, so that several points' loads are under way where there are few queries.
        for point in tl.range(P, loop_unroll_factor=P if P < 4 else 4):
            sample = (row * V + level) * P + point
            weight, place = _locate(locations, weights, sample, exists, height, width, FLOAT)
            offset = _offset(place, start, head, heads, width, D)
            for corner in tl.static_range(4):
                source, inside, share_x, share_y = _corner(
                    place, offset, heads, height, width, corner, D
                )
                mask = inside[:, None] & (channel < D)
                sampled = tl.load(value + source[:, None] + channel, mask=mask, other=0).to(FLOAT)
                total += (weight * share_x * share_y)[:, None] * sampled
        start += height * width
    tl.store(output + row[:, None] * D + channel, total, mask=exists[:, None] & (channel < D))


@triton.jit
def _point_gradients(grad, value, place, offset, heads, height, width, D: tl.constexpr):
    """Return the gradients of a sample's weight and, but for the weight, of its x and y in pixels.

    A corner's row of value is needed only as its product with the gradient of the output.
    """
    channel = tl.arange(0, grad.shape[1])[None, :]
    grad_weight = tl.full([grad.shape[0]], 0, grad.dtype)
    grad_x = grad_weight
    grad_y = grad_weight
    for corner in tl.static_range(4):
        source, inside, share_x, share_y = _corner(place, offset, heads, height, width, corner, D)
        mask = inside[:, None] & (channel < D)
        sampled = tl.load(value + source[:, None] + channel, mask=mask, other=0).to(grad.dtype)
        product = tl.where(inside, tl.sum(sampled * grad, 1), 0)
        grad_weight += share_x * share_y * product
        grad_x += share_y * product if corner % 2 else -share_y * product
        grad_y += share_x * product if corner // 2 else -share_x * product
    return grad_weight, grad_x, grad_y


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    grad_output,
    value,
    locations,
    weights,
    grad_value,
    keys,
    coefficients,
    grad_locations,
    grad_weights,
    sizes,
    tokens,
    queries,
    heads,
    V: tl.constexpr,
    P: tl.constexpr,
    SAMPLES: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    image, head, row, exists = _tile(queries, heads, ROWS)
    channel = tl.arange(0, PADDED_D)[None, :]
    mask = exists[:, None] & (channel < D)
    grad = tl.load(grad_output + row[:, None] * D + channel, mask=mask, other=0).to(FLOAT)
    column = tl.arange(0, SAMPLES)[None, :]
    all_weight = tl.full([ROWS, SAMPLES], 0, FLOAT)
    all_x = all_weight
    all_y = all_weight
    start = image * tokens
    for level in tl.static_range(V):
        height, width = _size_of(sizes, level)
        # Not unrolled: a tenth more instructions, but a fifth of the time to compile.
        for point in range(P):
            sample = (row * V + level) * P + point
            weight, place = _locate(locations, weights, sample, exists, height, width, FLOAT)
            offset = _offset(place, start, head, heads, width, D)
            # All loads come before the additions, which they would wait for.
            grad_weight, grad_x, grad_y = _point_gradients(
                grad, value, place, offset, heads, height, width, D
            )
            for corner in tl.static_range(4):
                source, inside, share_x, share_y = _corner(
                    place, offset, heads, height, width, corner, D
                )
                coefficient = weight * share_x * share_y
                if grad_value is None:
                    key = tl.where(inside, source // D, -1)
                    tl.store(keys + sample * 4 + corner, key, mask=exists)
                    tl.store(coefficients + sample * 4 + corner, coefficient, mask=exists)
                else:
                    tl.atomic_add(
                        grad_value + source[:, None] + channel,
                        coefficient[:, None] * grad,
                        mask=inside[:, None] & (channel < D),
                        sem="relaxed",
                    )
            here = column == level * P + point
            all_weight = tl.where(here, grad_weight[:, None], all_weight)
            all_x = tl.where(here, (grad_x * weight * width)[:, None], all_x)
            all_y = tl.where(here, (grad_y * weight * height)[:, None], all_y)
        start += height * width
    # Stored at once, since a store for each point would move its sums between the threads first.
    sample = row[:, None] * (V * P) + column
    mask = exists[:, None] & (column < V * P)
    tl.store(grad_weights + sample, all_weight, mask=mask)
    pair = sample[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(grad_locations + pair, tl.join(all_x, all_y), mask=mask[:, :, None])


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    grad_output,
    order,
    coefficients,
    bounds,
    grad_value,
    rows,
    FAN_OUT: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Sum a tile of rows of value's gradient; FAN_OUT contributions come from a row of output's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED_D)[None, :]
    first = tl.load(bounds + row, mask=row < rows, other=0)
    last = tl.load(bounds + row + 1, mask=row < rows, other=0)
    total = tl.full([ROWS, PADDED_D], 0, FLOAT)
    steps = tl.max(last - first, 0)
    while steps > 0:
        active = first < last
        contribution = tl.load(order + first, mask=active, other=0)
        coefficient = tl.load(coefficients + contribution, mask=active, other=0)
        source = (contribution // FAN_OUT * D)[:, None] + channel
        mask = active[:, None] & (channel < D)
        grad = tl.load(grad_output + source, mask=mask, other=0).to(FLOAT)
        total += coefficient[:, None] * grad
        first += 1
        steps -= 1
    mask = (row < rows)[:, None] & (channel < D)
    tl.store(grad_value + row[:, None] * D + channel, total, mask=mask)
