"""What a Triton program does with the tile that it holds: load, store, multiply, drop."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "dot",
    "dropout_factor",
    "load_pair",
    "load_rows",
    "place_of_program",
    "row_hashes",
    "rows",
    "store_pair",
]


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_hashes(seed, row):
    """Hash the seed and each row of (B, H, N), all in uint32."""
    seed = tl.load(seed)
    first = _mix(row.to(tl.uint32) ^ seed.to(tl.uint32))
    return first, _mix(first + (seed >> 32).to(tl.uint32) + 0x9E3779B9)


@triton.jit
def dropout_factor(
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
def place_of_program(length, BLOCK: tl.constexpr):
    """Return this program's place in (B, H) and the first row of its tile."""
    tiles = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles * BLOCK


@triton.jit
def rows(tensor, place, start, length, D: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Return pointers to a tile of (B, H, length, D), and which of them exist."""
    row = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    pointers = tensor + (place * length + start) * D + (row * D + channel)
    return pointers, (start + row < length) & (channel < D)


@triton.jit
def load_rows(
    tensor, place, start, length, D: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    """Load a tile of (B, H, length, D), zero where there is nothing."""
    pointers, exists = rows(tensor, place, start, length, D, BLOCK, PADDED)
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def load_pair(tensor, place, n, queries, FLOAT: tl.constexpr):
    """Load x and y of queries n from (B, H, N, 2)."""
    pointers = tensor + 2 * place * queries + 2 * n
    x = tl.load(pointers, mask=n < queries, other=0).to(FLOAT)
    y = tl.load(pointers + 1, mask=n < queries, other=0).to(FLOAT)
    return x, y


@triton.jit
def store_pair(tensor, place, n, queries, x, y):
    """Store x and y of queries n in (B, H, N, 2)."""
    pointers = tensor + 2 * place * queries + 2 * n
    tl.store(pointers, x, mask=n < queries)
    tl.store(pointers + 1, y, mask=n < queries)


@triton.jit
def dot(a, b, DOTS: tl.constexpr, FLOAT: tl.constexpr):
    """Multiply two matrices. Not every chain of float64 products compiles with ``tl.dot``."""
    if tl.float64 == FLOAT:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, input_precision=DOTS, out_dtype=FLOAT)
