"""The kernels of Gaussian-modulated attention: its output and its gradients.

A program holds one tile of queries of an image and head, or of keys for their gradients, and
streams the other side past it, so that no (N, S) tensor exists. Whatever is summed is summed inside
one program, without atomic additions: gradients are equal from run to run in every bit.

Every tile is computed, however far it is from the centers: the queries of a tile lie anywhere, and
their Gaussians together reach most of the map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    dot,
    dropout_factor,
    load_pair,
    load_rows,
    place_of_program,
    row_hashes,
    rows,
    store_pair,
)

__all__ = ["forward_kernel", "key_kernel", "query_kernel"]

# With these as plain numbers, one compiled kernel serves inputs of every size.
UNSPECIALIZED = ["heads", "queries", "keys", "width"]


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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
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
    """Compute outputs and the logarithms of their weights' sums."""
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = place_of_program(queries, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)[:, None]
    q = load_rows(query, place, start, queries, D, BLOCK_N, PADDED_D)
    center = load_pair(centers, place, n, queries, FLOAT)
    spread = load_pair(precision, place, n, queries, FLOAT)
    near = _nearest_cell(center, keys, width, FLOAT)
    if seed is not None:
        hashes = row_hashes(seed, place * queries + n)

    largest = tl.full([BLOCK_N, 1], float("-inf"), FLOAT)
    total = tl.full([BLOCK_N, 1], 0, FLOAT)
    result = tl.full([BLOCK_N, PADDED_DV], 0, FLOAT)
    for first in range(0, keys, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)[None, :]
        cell = _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT)
        k = load_rows(key, place, first, keys, D, BLOCK_S, PADDED_D)
        v = load_rows(value, place, first, keys, DV, BLOCK_S, PADDED_DV)
        logits = _logits(dot(q, tl.trans(k), DOTS, FLOAT), cell, center, near, spread, SCALE)
        so_far = tl.maximum(largest, tl.max(logits, 1, keep_dims=True))
        # As long as all keys are masked it is -inf, and -inf - -inf would be NaN.
        subtrahend = tl.where(so_far == float("-inf"), 0, so_far)
        decay = tl.exp(largest - subtrahend)
        weights = tl.exp(logits - subtrahend)
        total = total * decay + tl.sum(weights, 1, keep_dims=True)
        if seed is not None:
            weights *= dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
        result = result * decay + dot(weights.to(v.dtype), v, DOTS, FLOAT)
        largest = so_far

    empty = total == 0
    total = tl.where(empty, 1, total)
    pointers, exists = rows(out, place, start, queries, DV, BLOCK_N, PADDED_DV)
    tl.store(pointers, result / total, mask=exists)
    row_logsumexp = tl.where(empty, float("inf"), largest + tl.log(total))
    tl.store(logsumexp + place * queries + n, row_logsumexp, mask=n < queries)


@triton.jit
def _moments(weights, distances):
    """Sum each row's weighted distances, and their weighted squares."""
    moment = weights * distances
    return tl.sum(moment, 1, keep_dims=True), tl.sum(moment * distances, 1, keep_dims=True)


@triton.jit
def _load_statistics(logsumexp, delta, place, n, queries):
    """Return each row's logsumexp, +inf outside, and its delta."""
    exists = n < queries
    row_logsumexp = tl.load(logsumexp + place * queries + n, mask=exists, other=float("inf"))
    return row_logsumexp, tl.load(delta + place * queries + n, mask=exists, other=0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_kernel(
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
    """Compute the gradients of queries, centers and precision."""
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = place_of_program(queries, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)[:, None]
    q = load_rows(query, place, start, queries, D, BLOCK_N, PADDED_D)
    g = load_rows(grad_out, place, start, queries, DV, BLOCK_N, PADDED_DV)
    center = load_pair(centers, place, n, queries, FLOAT)
    spread = load_pair(precision, place, n, queries, FLOAT)
    row_logsumexp, row_delta = _load_statistics(logsumexp, delta, place, n, queries)
    if seed is not None:
        hashes = row_hashes(seed, place * queries + n)
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
        k = load_rows(key, place, first, keys, D, BLOCK_S, PADDED_D)
        v = load_rows(value, place, first, keys, DV, BLOCK_S, PADDED_DV)
        logits = _logits(dot(q, tl.trans(k), DOTS, FLOAT), cell, center, near, spread, SCALE)
        grad_weights = dot(g, tl.trans(v), DOTS, FLOAT)
        if seed is not None:
            grad_weights *= dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
        grad_logits = tl.exp(logits - row_logsumexp) * (grad_weights - row_delta)
        grad_q += dot(grad_logits.to(k.dtype), k, DOTS, FLOAT)
        first_x, second_x = _moments(grad_logits, cell[0] - near[0])
        first_y, second_y = _moments(grad_logits, cell[1] - near[1])
        mean_x += first_x
        mean_y += first_y
        square_x += second_x
        square_y += second_y

    pointers, exists = rows(grad_query, place, start, queries, D, BLOCK_N, PADDED_D)
    tl.store(pointers, grad_q * SCALE, mask=exists)
    store_pair(grad_centers, place, n, queries, 2 * spread[0] * mean_x, 2 * spread[1] * mean_y)
    # (x - c)^2 = (x - near)^2 + 2 (x - near) (near - c) + a constant of the row
    grad_x = 2 * (center[0] - near[0]) * mean_x - square_x
    grad_y = 2 * (center[1] - near[1]) * mean_y - square_y
    store_pair(grad_precision, place, n, queries, grad_x, grad_y)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_kernel(
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
    """Compute the gradients of keys and values.

    The tiles are transposed here, (S, N), for they multiply what has N rows.
    """
    FLOAT: tl.constexpr = logsumexp.dtype.element_ty
    place, start = place_of_program(keys, BLOCK_S)
    s = start + tl.arange(0, BLOCK_S)[:, None]
    cell = _load_cell(key_padding_mask, place, s, heads, keys, width, FLOAT)
    k = load_rows(key, place, start, keys, D, BLOCK_S, PADDED_D)
    v = load_rows(value, place, start, keys, DV, BLOCK_S, PADDED_DV)

    grad_k = tl.full([BLOCK_S, PADDED_D], 0, FLOAT)
    grad_v = tl.full([BLOCK_S, PADDED_DV], 0, FLOAT)
    for first in range(0, queries, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[None, :]
        q = load_rows(query, place, first, queries, D, BLOCK_N, PADDED_D)
        g = load_rows(grad_out, place, first, queries, DV, BLOCK_N, PADDED_DV)
        center = load_pair(centers, place, n, queries, FLOAT)
        spread = load_pair(precision, place, n, queries, FLOAT)
        near = _nearest_cell(center, keys, width, FLOAT)
        row_logsumexp, row_delta = _load_statistics(logsumexp, delta, place, n, queries)
        logits = _logits(dot(k, tl.trans(q), DOTS, FLOAT), cell, center, near, spread, SCALE)
        weights = tl.exp(logits - row_logsumexp)
        grad_weights = dot(v, tl.trans(g), DOTS, FLOAT)
        kept = weights
        if seed is not None:
            hashes = row_hashes(seed, place * queries + n)
            factor = dropout_factor(hashes, s, THRESHOLD, KEPT_FACTOR, FLOAT)
            kept = weights * factor
            grad_weights *= factor
        grad_v += dot(kept.to(g.dtype), g, DOTS, FLOAT)
        grad_logits = weights * (grad_weights - row_delta)
        grad_k += dot(grad_logits.to(q.dtype), q, DOTS, FLOAT)

    pointers, exists = rows(grad_key, place, start, keys, D, BLOCK_S, PADDED_D)
    tl.store(pointers, grad_k * SCALE, mask=exists)
    pointers, exists = rows(grad_value, place, start, keys, DV, BLOCK_S, PADDED_DV)
    tl.store(pointers, grad_v, mask=exists)
