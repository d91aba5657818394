"""Gaussian-modulated attention on CUDA, in Triton.

A program holds one tile of queries of an image and head, or of keys for their gradients, and
streams the other side past it, so that no (N, S) tensor exists. Whatever is summed is summed inside
one program, without atomic additions: gradients are equal from run to run in every bit.

Every tile is computed, however far it is from the centers: the queries of a tile lie anywhere, and
their Gaussians together reach most of the map.

Callers have checked shapes and dtypes and made query, key and value contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

MULTIPROCESSORS = 132  # of an H100; fewer programs than this leave some of them idle
# With these as plain numbers, one compiled kernel serves inputs of every size.
UNSPECIALIZED = ["heads", "queries", "keys", "width"]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    centers: Tensor,
    precision: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""Attend to the cells of a map under a Gaussian for each query (SMCA, eqs. 4-6).

    .. math:: o_{bhn} = \sum_s \mathrm{dropout}\left(\mathrm{softmax}_s(
        \mathrm{scale} \, q_{bhn} \cdot k_{bhs} - p^x_{bhn} (x_s - c^x_{bhn})^2
        - p^y_{bhn} (y_s - c^y_{bhn})^2)\right) v_{bhs}

    Key s is the cell x = s % width, y = s // width. Sums, logits and softmax are in float32 or, for
    float64, in float64.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        width: Cells in a row of the map.
        centers: (B, H or 1, N, 2) as (x, y) in cells.
        precision: (B, H or 1, N, 2) for x and y, in 1 / cells^2, not negative.
        key_padding_mask: (B, S), True on padding, or None.
        scale: Factor of q.k.
        dropout_p: Probability that a weight is dropped; the others are divided by 1 - dropout_p.
        seed: int64 tensor with one element, or None without dropout. The same seed drops the same
            weights, whatever the block sizes and the device.

    Returns:
        The output, (B, H, N, Dv) in query's dtype, and the logarithm of the sum over s of
        exp(logit), (B, H, N) in float32 or float64. A query with no key to attend to has output
        zero and logarithm +inf, which makes its weights exp(logit - inf) = 0 in :func:`backward`.
    """
    accumulator = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_empty(query.shape[:3], dtype=accumulator)
    centers, precision = (x.expand(*query.shape[:3], 2) for x in (centers, precision))
    tensors = (query, key, value, centers, precision, key_padding_mask, seed, out, logsumexp)
    _launch(_forward_kernel, True, tensors, width, scale, dropout_p)
    return out, logsumexp


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    width: int,
    centers: Tensor,
    precision: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, centers and precision.

    Args:
        grad_out: Gradient of ``out``, (B, H, N, Dv) in query's dtype.
        query: As in :func:`forward`, and so are all that are not named here.
        key: See there.
        value: See there.
        out: First result of :func:`forward`.
        logsumexp: Second result of :func:`forward`.
        width: See there.
        centers: See there.
        precision: See there.
        key_padding_mask: See there.
        scale: See there.
        dropout_p: See there.
        seed: See there.

    Returns:
        The five gradients, each in its input's dtype and shape.
    """
    shapes = (centers.shape, precision.shape)
    centers, precision = (x.expand(*query.shape[:3], 2).contiguous() for x in (centers, precision))
    # What is common to the gradients of a row's weights does not reach its logits.
    delta = (grad_out.to(logsumexp.dtype) * out.to(logsumexp.dtype)).sum(-1)
    inputs = (query, key, value, centers, precision, key_padding_mask, seed)
    saved = (grad_out.contiguous(), logsumexp, delta)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_centers = torch.empty_like(centers, dtype=delta.dtype)
    grad_precision = torch.empty_like(grad_centers)
    results = (grad_query, grad_centers, grad_precision)
    _launch(_query_kernel, True, (*inputs, *saved, *results), width, scale, dropout_p)
    _launch(_key_kernel, False, (*inputs, *saved, grad_key, grad_value), width, scale, dropout_p)
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_centers.sum_to_size(shapes[0]).to(centers.dtype),
        grad_precision.sum_to_size(shapes[1]).to(precision.dtype),
    )


def _launch(
    kernel: Any,
    streams_keys: bool,
    tensors: Sequence[Any],
    width: int,
    scale: float,
    dropout_p: float,
) -> None:
    """Run a kernel on every tile of queries or, if it does not stream the keys, of keys."""
    query, _, value = tensors[:3]
    images, heads, queries, channels = query.shape
    keys, value_channels = value.shape[2:]
    padded = [max(16, triton.next_power_of_2(size)) for size in (channels, value_channels)]
    length = queries if streams_keys else keys
    held, streamed, num_warps = _tiling(images * heads, length, max(padded), query.dtype)
    programs = images * heads * triton.cdiv(length, held)
    if programs == 0:
        return
    with _device_of(query):
        kernel[(programs,)](
            *(x if x is None else x.contiguous() for x in tensors),
            heads,
            queries,
            keys,
            width,
            D=channels,
            DV=value_channels,
            PADDED_D=padded[0],
            PADDED_DV=padded[1],
            BLOCK_N=held if streams_keys else streamed,
            BLOCK_S=streamed if streams_keys else held,
            SCALE=scale,
            THRESHOLD=int(dropout_p * 2**32),
            KEPT_FACTOR=1 / (1 - dropout_p),
            DOTS="tf32" if query.dtype == torch.float32 and _allows_tf32() else "ieee",
            num_warps=num_warps,
            num_stages=2,
        )


def _tiling(places: int, length: int, channels: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return how many rows a program holds, how many it streams at a time, and its warps.

    The tiles are the largest that fit in the registers and still occupy the whole GPU.

    Args:
        places: B * H.
        length: Rows of each place that are divided among programs.
        channels: The larger of D and Dv, padded to a power of two.
        dtype: Of query, key and value.
    """
    if dtype == torch.float64:
        return 8, 8, 8
    row_bytes = channels * dtype.itemsize
    held = 64 if row_bytes <= 64 else 32 if row_bytes <= 256 else 16
    while held > 16 and places * triton.cdiv(length, held) < MULTIPROCESSORS:
        held //= 2
    # Without tensor cores a product's operands take more registers.
    return held, 32, 8 if dtype == torch.float32 else 4


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # Older releases have only allow_tf32; newer ones refuse to read it once this one was set.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_hashes(seed, row):
    """Hash the seed and each row of (B, H, N), all in uint32."""
    seed = tl.load(seed)
    first = _mix(row.to(tl.uint32) ^ seed.to(tl.uint32))
    return first, _mix(first + (seed >> 32).to(tl.uint32) + 0x9E3779B9)


@triton.jit
def _dropout_factor(
    hashes, s, THRESHOLD: tl.constexpr, KEPT_FACTOR: tl.constexpr, FLOAT: tl.constexpr
):
    """Return what dropout multiplies the weight of key s by, given its row's hashes."""
    first, second = hashes
    x = (s.to(tl.uint32) * 0x9E3779B9) ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >= THRESHOLD).to(FLOAT) * KEPT_FACTOR


@triton.jit
def _place(length, BLOCK: tl.constexpr):
    """Return this program's place in (B, H) and the first row of its tile."""
    tiles = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles * BLOCK


@triton.jit
def _rows(tensor, place, start, length, D: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Return pointers to a tile of (B, H, length, D), and which of them exist."""
    row = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    pointers = tensor + (place * length + start) * D + (row * D + channel)
    return pointers, (start + row < length) & (channel < D)


@triton.jit
def _load_rows(
    tensor, place, start, length, D: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    pointers, exists = _rows(tensor, place, start, length, D, BLOCK, PADDED)
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def _load_pair(tensor, place, n, queries, FLOAT: tl.constexpr):
    """Load x and y of queries n from (B, H, N, 2)."""
    pointers = tensor + 2 * place * queries + 2 * n
    x = tl.load(pointers, mask=n < queries, other=0).to(FLOAT)
    y = tl.load(pointers + 1, mask=n < queries, other=0).to(FLOAT)
    return x, y


@triton.jit
def _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT: tl.constexpr):
    """Return x and y of keys s, and whether they can be attended to."""
    attended = s < keys
    if key_padding_mask is not None:
        padding = tl.load(key_padding_mask + place // heads * keys + s, mask=attended, other=1)
        attended = attended & (padding == 0)
    return (s % width).to(FLOAT), (s // width).to(FLOAT), attended


@triton.jit
def _nearest_cell(center, keys, width, FLOAT: tl.constexpr):
    """Return x and y of the map's cell nearest to each center."""
    last_y = (keys - 1) // tl.maximum(width, 1)
    x = tl.floor(tl.minimum(tl.maximum(center[0], 0), (width - 1).to(FLOAT)) + 0.5)
    y = tl.floor(tl.minimum(tl.maximum(center[1], 0), last_y.to(FLOAT)) + 0.5)
    return x, y


@triton.jit
def _logits(product, cell, center, near, precision, SCALE: tl.constexpr):
    """Return a tile of logits. Forward and backward share this, so that their rounding agrees.

    Distances count from the cell nearest to the center: what that cell's own distance adds to all
    logits drops out of the softmax, but would cost them digits.
    """
    x, y, attended = cell
    dx = x - near[0]
    dy = y - near[1]
    bias_x = precision[0] * (dx * (dx - 2 * (center[0] - near[0])))
    bias_y = precision[1] * (dy * (dy - 2 * (center[1] - near[1])))
    return tl.where(attended, product * SCALE - (bias_x + bias_y), float("-inf"))


@triton.jit
def _dot(a, b, DOTS: tl.constexpr, FLOAT: tl.constexpr):
    """Multiply two matrices. Not every chain of float64 products compiles with ``tl.dot``."""
    if tl.float64 == FLOAT:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, input_precision=DOTS, out_dtype=FLOAT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    query,
    key,
    value,
    centers,
    precision,
    key_padding_mask,
    seed,
    out,
    logsumexp,
    heads,
    queries,
    keys,
    width,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_FACTOR: tl.constexpr,
    DOTS: tl.constexpr,
):
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = _place(queries, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)[:, None]
    q = _load_rows(query, place, start, queries, D, BLOCK_N, PADDED_D)
    center = _load_pair(centers, place, n, queries, FLOAT)
    spread = _load_pair(precision, place, n, queries, FLOAT)
    near = _nearest_cell(center, keys, width, FLOAT)
    if seed is not None:
        hashes = _row_hashes(seed, place * queries + n)

    largest = tl.full([BLOCK_N, 1], float("-inf"), FLOAT)
    total = tl.full([BLOCK_N, 1], 0, FLOAT)
    result = tl.full([BLOCK_N, PADDED_DV], 0, FLOAT)
    for first in range(0, keys, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)[None, :]
        cell = _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT)
        k = _load_rows(key, place, first, keys, D, BLOCK_S, PADDED_D)
        v = _load_rows(value, place, first, keys, DV, BLOCK_S, PADDED_DV)
        logits = _logits(_dot(q, tl.trans(k), DOTS, FLOAT), cell, center, near, spread, SCALE)
        so_far = tl.maximum(largest, tl.max(logits, 1, keep_dims=True))
        # As long as all keys are masked it is -inf, and -inf - -inf would be NaN.
        subtrahend = tl.where(so_far == float("-inf"), 0, so_far)
        decay = tl.exp(largest - subtrahend)
        weights = tl.exp(logits - subtrahend)
        total = total * decay + tl.sum(weights, 1, keep_dims=True)
        if seed is not None:
            weights *= _dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
        result = result * decay + _dot(weights.to(v.dtype), v, DOTS, FLOAT)
        largest = so_far

    empty = total == 0
    total = tl.where(empty, 1, total)
    pointers, exists = _rows(out, place, start, queries, DV, BLOCK_N, PADDED_DV)
    tl.store(pointers, result / total, mask=exists)
    row_logsumexp = tl.where(empty, float("inf"), largest + tl.log(total))
    tl.store(logsumexp + place * queries + n, row_logsumexp, mask=n < queries)


@triton.jit
def _store_pair(tensor, place, n, queries, x, y):
    pointers = tensor + 2 * place * queries + 2 * n
    tl.store(pointers, x, mask=n < queries)
    tl.store(pointers + 1, y, mask=n < queries)


@triton.jit
def _load_statistics(logsumexp, delta, place, n, queries):
    """Return each row's logsumexp, +inf outside, and its delta."""
    exists = n < queries
    row_logsumexp = tl.load(logsumexp + place * queries + n, mask=exists, other=float("inf"))
    return row_logsumexp, tl.load(delta + place * queries + n, mask=exists, other=0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    query,
    key,
    value,
    centers,
    precision,
    key_padding_mask,
    seed,
    grad_out,
    logsumexp,
    delta,
    grad_query,
    grad_centers,
    grad_precision,
    heads,
    queries,
    keys,
    width,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_FACTOR: tl.constexpr,
    DOTS: tl.constexpr,
):
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = _place(queries, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)[:, None]
    q = _load_rows(query, place, start, queries, D, BLOCK_N, PADDED_D)
    g = _load_rows(grad_out, place, start, queries, DV, BLOCK_N, PADDED_DV)
    center = _load_pair(centers, place, n, queries, FLOAT)
    spread = _load_pair(precision, place, n, queries, FLOAT)
    row_logsumexp, row_delta = _load_statistics(logsumexp, delta, place, n, queries)
    if seed is not None:
        hashes = _row_hashes(seed, place * queries + n)
    # The gradients of a row's logits sum to zero, but for rounding. So the moments of the distances
    # can be taken from the cell nearest to the center. Long distances would amplify that rounding.
    near = _nearest_cell(center, keys, width, FLOAT)

    grad_q = tl.full([BLOCK_N, PADDED_D], 0, FLOAT)
    mean_x = tl.full([BLOCK_N, 1], 0, FLOAT)
    mean_y = tl.full([BLOCK_N, 1], 0, FLOAT)
    square_x = tl.full([BLOCK_N, 1], 0, FLOAT)
    square_y = tl.full([BLOCK_N, 1], 0, FLOAT)
    for first in range(0, keys, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)[None, :]
        cell = _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT)
        k = _load_rows(key, place, first, keys, D, BLOCK_S, PADDED_D)
        v = _load_rows(value, place, first, keys, DV, BLOCK_S, PADDED_DV)
        logits = _logits(_dot(q, tl.trans(k), DOTS, FLOAT), cell, center, near, spread, SCALE)
        grad_weights = _dot(g, tl.trans(v), DOTS, FLOAT)
        if seed is not None:
            grad_weights *= _dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
        grad_logits = tl.exp(logits - row_logsumexp) * (grad_weights - row_delta)
        grad_q += _dot(grad_logits.to(k.dtype), k, DOTS, FLOAT)
        dx = cell[0] - near[0]
        moment_x = grad_logits * dx
        mean_x += tl.sum(moment_x, 1, keep_dims=True)
        square_x += tl.sum(moment_x * dx, 1, keep_dims=True)
        dy = cell[1] - near[1]
        moment_y = grad_logits * dy
        mean_y += tl.sum(moment_y, 1, keep_dims=True)
        square_y += tl.sum(moment_y * dy, 1, keep_dims=True)

    pointers, exists = _rows(grad_query, place, start, queries, D, BLOCK_N, PADDED_D)
    tl.store(pointers, grad_q * SCALE, mask=exists)
    _store_pair(grad_centers, place, n, queries, 2 * spread[0] * mean_x, 2 * spread[1] * mean_y)
    # (x - c)^2 = (x - near)^2 + 2 (x - near) (near - c) + a constant of the row
    grad_x = 2 * (center[0] - near[0]) * mean_x - square_x
    grad_y = 2 * (center[1] - near[1]) * mean_y - square_y
    _store_pair(grad_precision, place, n, queries, grad_x, grad_y)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    query,
    key,
    value,
    centers,
    precision,
    key_padding_mask,
    seed,
    grad_out,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    heads,
    queries,
    keys,
    width,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_FACTOR: tl.constexpr,
    DOTS: tl.constexpr,
):
    """The tiles are transposed here, (S, N), for they multiply what has N rows."""
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = _place(keys, BLOCK_S)
    s = start + tl.arange(0, BLOCK_S)[:, None]
    cell = _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT)
    k = _load_rows(key, place, start, keys, D, BLOCK_S, PADDED_D)
    v = _load_rows(value, place, start, keys, DV, BLOCK_S, PADDED_DV)

    grad_k = tl.full([BLOCK_S, PADDED_D], 0, FLOAT)
    grad_v = tl.full([BLOCK_S, PADDED_DV], 0, FLOAT)
    for first in range(0, queries, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[None, :]
        q = _load_rows(query, place, first, queries, D, BLOCK_N, PADDED_D)
        g = _load_rows(grad_out, place, first, queries, DV, BLOCK_N, PADDED_DV)
        center = _load_pair(centers, place, n, queries, FLOAT)
        spread = _load_pair(precision, place, n, queries, FLOAT)
        near = _nearest_cell(center, keys, width, FLOAT)
        row_logsumexp, row_delta = _load_statistics(logsumexp, delta, place, n, queries)
        logits = _logits(_dot(k, tl.trans(q), DOTS, FLOAT), cell, center, near, spread, SCALE)
        weights = tl.exp(logits - row_logsumexp)
        grad_weights = _dot(v, tl.trans(g), DOTS, FLOAT)
        kept = weights
        if seed is not None:
            hashes = _row_hashes(seed, place * queries + n)
            factor = _dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
            kept = weights * factor
            grad_weights *= factor
        grad_v += _dot(kept.to(g.dtype), g, DOTS, FLOAT)
        grad_logits = weights * (grad_weights - row_delta)
        grad_k += _dot(grad_logits.to(q.dtype), q, DOTS, FLOAT)

    pointers, exists = _rows(grad_key, place, start, keys, D, BLOCK_S, PADDED_D)
    tl.store(pointers, grad_k * SCALE, mask=exists)
    pointers, exists = _rows(grad_value, place, start, keys, DV, BLOCK_S, PADDED_DV)
    tl.store(pointers, grad_v, mask=exists)
