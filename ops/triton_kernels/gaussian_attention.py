"""Gaussian-modulated attention on CUDA, in Triton.

Callers have checked shapes and dtypes and made query, key and value contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .gaussian_kernels import forward_kernel, key_kernel, query_kernel

__all__ = ["backward", "forward"]

MULTIPROCESSORS = 132  # of an H100; fewer programs than this leave some of them idle


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
    _launch(forward_kernel, True, tensors, width, scale, dropout_p)
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
    _launch(query_kernel, True, (*inputs, *saved, *results), width, scale, dropout_p)
    _launch(key_kernel, False, (*inputs, *saved, grad_key, grad_value), width, scale, dropout_p)
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
