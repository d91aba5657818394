"""Attention modulated by a Gaussian per query (SMCA, Gao et al., ICCV 2021, Eqs. 4-6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import differentiable, differentiable_once, fold_mapped_axis
from ._checks import FLOATS, autocast, match_device, match_shape, match_type, no_autocast
from ._library import HAS_TRITON, NAMESPACE, has_kernels, library


def gaussian_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shape: tuple[int, int],
    centers: Tensor,
    precision: Tensor,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    r"""Attention to the cells of a map, biased towards a centre (SMCA, Eqs. 4-6).

    ``softmax_s(q k_s * scale - precision_x (x_s - c_x)^2 - precision_y (y_s - c_y)^2) v_s``, where
    (x_s, y_s) are a cell's integer coordinates. No (N, S) tensor is made. Distances and the softmax
    are in float32 for the low precisions, so that large values of ``precision`` do no harm. Under
    autocast query, key and value take autocast's precision; centers and precision keep theirs.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        spatial_shape: (h, w) of the map, h * w == S, row-major.
        centers: (B, H, N, 2) as (x, y) in cells; one head instead of H is shared by all.
        precision: (B, H, N, 2), >= 0, per squared cell: 1 / (2 sigma^2) along x and y; one head
            instead of H is shared by all. Negative values are not looked for.
        key_padding_mask: (B, S), True on keys that no query attends to. A query without any key
            gives zeros.
        scale: of the products; 1 / sqrt(D) if None.
        dropout_p: probability with which an attention weight is dropped, whatever the mode.

    Returns:
        (B, H, N, Dv) in the type of ``query``. With kernels of our own it can be differentiated
        once, and not in forward mode.

    Raises:
        ValueError: if shapes or devices do not belong together, or ``dropout_p`` is no probability.
        TypeError: if types differ; centers and precision have the query's type or, beside a low
            precision, float32.
    """
    query, key, value = autocast(query, key, value)
    sizes = _check(query, key, value, spatial_shape, centers, precision, key_padding_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability below 1")
    if scale is None:
        scale = max(sizes["D"], 1) ** -0.5
    if not has_kernels(query):
        return reference(
            query, key, value, spatial_shape, centers, precision, key_padding_mask, scale, dropout_p
        )
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    output, _ = _call(
        query,
        key,
        value,
        spatial_shape[1],
        centers,
        precision,
        key_padding_mask,
        scale,
        dropout_p,
        seed,
    )
    return output


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shape: tuple[int, int],
    centers: Tensor,
    precision: Tensor,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The same in plain PyTorch: ordinary attention with four more channels.

    The bias is quadratic in a key's coordinates, hence a product of (x^2, y^2, x, y) with
    coefficients of the query; what is constant for a query drops out of the softmax. Coordinates
    are centred and scaled to [-1, 1]. Rounding grows with the coefficients: in float32 the logits
    are exact to about ``6e-8 * precision * extent^2``.

    Arguments and result as in :func:`gaussian_attention`, without its checks.
    """
    height, width = spatial_shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, channels, value_channels = query.shape[1], query.shape[3], value.shape[3]
    if scale is None:
        scale = max(channels, 1) ** -0.5
    extent = max(height, width, 2) / 2
    middle = query.new_tensor([(width - 1) / 2, (height - 1) / 2], dtype=dtype)
    y, x = torch.meshgrid(
        torch.arange(height, device=query.device, dtype=dtype),
        torch.arange(width, device=query.device, dtype=dtype),
        indexing="ij",
    )
    cells = (torch.stack([x, y], dim=-1).flatten(0, 1) - middle) / extent  # (S, 2)
    centers = (centers.to(dtype) - middle) / extent
    precision = precision.to(dtype) * extent**2
    coefficients = torch.cat([-precision, 2 * precision * centers], dim=-1)
    powers = torch.cat([cells.square(), cells], dim=-1)
    queries = torch.cat([query.to(dtype) * scale, coefficients.expand(-1, heads, -1, -1)], dim=-1)
    keys = torch.cat([key.to(dtype), powers.expand(*key.shape[:2], -1, -1)], dim=-1)
    # equal widths, without which the fused kernels decline
    width_of_all = max(channels + 4, value_channels)
    queries, keys, values = (
        F.pad(tensor, (0, width_of_all - tensor.shape[-1]))
        for tensor in (queries, keys, value.to(dtype))
    )
    allowed = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
    with no_autocast(query):
        output = F.scaled_dot_product_attention(
            queries, keys, values, allowed, dropout_p, scale=1.0
        )
    if allowed is not None:
        output = output.masked_fill(~allowed.any(-1, keepdim=True), 0)
    return output[..., :value_channels].to(query.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shape: tuple[int, int],
    centers: Tensor,
    precision: Tensor,
    key_padding_mask: Tensor | None,
) -> dict[str, int]:
    """Refuse what does not belong together; the sizes by their letters."""
    sizes: dict[str, int] = {}
    match_shape("query", query, "B H N D", sizes)
    match_shape("key", key, "B H S D", sizes)
    match_shape("value", value, "B H S Dv", sizes)
    match_type("query", query, FLOATS)
    for name, tensor in (("key", key), ("value", value)):
        match_type(name, tensor, (query.dtype,))
        match_device(name, tensor, "query", query)
    low = query.dtype in (torch.bfloat16, torch.float16)
    for name, tensor in (("centers", centers), ("precision", precision)):
        shared = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[1] == 1
        match_shape(name, tensor, "B 1 N 2" if shared else "B H N 2", sizes)
        match_type(name, tensor, (query.dtype, torch.float32) if low else (query.dtype,))
        match_device(name, tensor, "query", query)
    if key_padding_mask is not None:
        match_shape("key_padding_mask", key_padding_mask, "B S", sizes)
        match_type("key_padding_mask", key_padding_mask, (torch.bool,))
        match_device("key_padding_mask", key_padding_mask, "query", query)
    height, width = spatial_shape
    if height < 0 or width < 0 or height * width != sizes["S"]:
        raise ValueError(
            f"spatial_shape is {(height, width)}, expected (h, w) with h * w = S = {sizes['S']}"
        )
    return sizes


# --- registration -------------------------------------------------------------------------------

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, {}SymInt width, Tensor centers, Tensor precision, "
    "Tensor? key_padding_mask, float scale, float dropout_p, Tensor? seed"
)
_SAVED = "Tensor output, Tensor logsumexp, "
library.define(f"gaussian_attention({_INPUTS.format('')}) -> (Tensor, Tensor)")
library.define(
    f"gaussian_attention_backward(Tensor grad_output, {_INPUTS.format(_SAVED)})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward = getattr(torch.ops, NAMESPACE).gaussian_attention.default
_backward = getattr(torch.ops, NAMESPACE).gaussian_attention_backward.default


@torch.library.register_fake(_forward)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.register_fake(_backward)
def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    width: int,
    centers: Tensor,
    precision: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    inputs = query, key, value, centers, precision
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    centers: Tensor,
    precision: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import gaussian_attention as kernels

    _check(query, key, value, _map_of(key, width), centers, precision, mask)
    q, k, v, c, p, m = _contiguous(query, key, value, centers, precision, mask)
    return kernels.forward(q, k, v, width, c, p, m, scale, dropout_p, seed)


def _triton_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    width: int,
    centers: Tensor,
    precision: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    from .triton_kernels import gaussian_attention as kernels

    sizes = _check(query, key, value, _map_of(key, width), centers, precision, mask)
    match_shape("grad_output", grad_output, "B H N Dv", sizes)
    match_shape("output", output, "B H N Dv", sizes)
    match_shape("logsumexp", logsumexp, "B H N", sizes)
    g, q, k, v, o, total = _contiguous(grad_output, query, key, value, output, logsumexp)
    c, p, m = _contiguous(centers, precision, mask)
    return kernels.backward(g, q, k, v, o, total, width, c, p, m, scale, dropout_p, seed)


def _map_of(key: Tensor, width: int) -> tuple[int, int]:
    """The (h, w) of a map whose cells are the keys, as far as there is one."""
    return (key.shape[-2] // width if width > 0 else 0, width)


def _contiguous(*tensors: Any) -> list[Any]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.width, centers, precision, mask, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(query, key, value, *output, centers, precision, mask, seed)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, output, logsumexp, centers, precision, mask, seed = ctx.saved_tensors
    grads = _call_backward(
        grad_output,
        query,
        key,
        value,
        output,
        logsumexp,
        ctx.width,
        centers,
        precision,
        mask,
        ctx.scale,
        ctx.dropout_p,
        seed,
    )
    return *grads[:3], None, *grads[3:], None, None, None, None


# what an entry drops depends on its seed and on its number in the batch
fold_mapped_axis(_forward, shared=(9,), unless=lambda inputs: inputs[8] > 0)
fold_mapped_axis(_backward, shared=(12,), unless=lambda inputs: inputs[11] > 0)
_call = differentiable(_forward, _save, _differentiate)
_call_backward = differentiable_once(_backward)
if HAS_TRITON:
    library.impl("gaussian_attention", _triton_forward, "CUDA")
    library.impl("gaussian_attention_backward", _triton_backward, "CUDA")
