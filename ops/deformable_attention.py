"""Multi-scale deformable attention (Deformable DETR, Zhu et al., ICLR 2021, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._autograd import differentiable, differentiable_once, fold_mapped_axis
from ._checks import FLOATS, autocast, match_device, match_shape, match_type
from ._library import HAS_TRITON, NAMESPACE, WAITS_FOR_HOST, has_kernels, library

Sizes = Sequence[Sequence[int]] | Tensor
"""Per level (h, w), from high to low resolution; a tensor (V, 2) is copied to the host."""


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: Sizes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    r"""Weighted sum of bilinear samples from all levels (Deformable DETR, Eq. 3).

    Sampling is that of ``grid_sample`` with ``align_corners=False``: location 0 and 1 are the outer
    edges of a level, and outside it there is zero. A location that is not finite counts as outside.
    Sums are in float32 for the low precisions. Under autocast ``value`` takes autocast's precision;
    locations and weights keep theirs.

    Args:
        value: (B, S, H, D), the levels one after the other, each row-major.
        spatial_shapes: V pairs (h, w) whose areas add up to S. On CUDA a tensor costs a
            synchronisation, a sequence does not.
        sampling_locations: (B, N, H, V, P, 2) as (x, y), in [0, 1] within each level.
        attention_weights: (B, N, H, V, P).

    Returns:
        (B, N, H * D) in the type of ``value``. With kernels of our own it can be differentiated
        once, and not in forward mode.

    Raises:
        ValueError: if shapes, level sizes or devices do not belong together.
        TypeError: if ``value`` is not floating; locations and weights have its type or, beside a
            low precision, float32.
    """
    (value,) = autocast(value)
    pairs = _check(value, spatial_shapes, sampling_locations, attention_weights)
    sampling_locations, attention_weights = _one_type(sampling_locations, attention_weights)
    if not has_kernels(value):
        pairs = _pairs(spatial_shapes) if pairs is None else pairs
        return reference(value, pairs, sampling_locations, attention_weights)
    tensors = sampling_locations, attention_weights
    if pairs is None:
        shapes: Tensor = spatial_shapes  # type: ignore[assignment]
        return _calls["device_shapes"](value, shapes, *tensors)
    return _calls["default"](value, _flat(pairs), *tensors)


def reference(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same in plain PyTorch, differentiable: one ``grid_sample`` a level.

    Arguments and result as in :func:`multi_scale_deformable_attention`, without its checks.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)
    locations = sampling_locations.to(dtype).transpose(1, 2).flatten(0, 1)  # (B * H, N, V, P, 2)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)
    output = value.new_zeros(batch * heads, channels, queries, dtype=dtype)
    for tensor in (value, locations, weights):
        output = output + tensor[:0].sum()  # nothing, but a gradient where all is empty
    for level, (height, width) in enumerate(spatial_shapes):
        if height * width == 0 or points == 0 or output.numel() == 0:
            continue
        plane = levels[level].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = _inside(locations[:, :, level], height, width) * 2 - 1
        samples = F.grid_sample(plane, grid, padding_mode="zeros", align_corners=False)
        output = output + (samples * weights[:, None, :, level]).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _inside(locations: Tensor, height: int, width: int) -> Tensor:
    """Move what samples nothing, NaN included, to one place outside the map, without gradient."""
    size = locations.new_tensor([width, height])
    pixels = locations * size - 0.5
    inside = ((pixels > -1) & (pixels < size)).all(-1, keepdim=True)
    return torch.where(inside, locations, -2.0)


def _check(
    value: Tensor, spatial_shapes: Sizes, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[tuple[int, int], ...] | None:
    """Refuse what does not belong together; the level sizes, or None if only the run knows them."""
    sizes: dict[str, int] = {}
    match_shape("value", value, "B S H D", sizes)
    match_shape("sampling_locations", sampling_locations, "B N H V P 2", sizes)
    match_shape("attention_weights", attention_weights, "B N H V P", sizes)
    match_type("value", value, FLOATS)
    low = value.dtype in (torch.bfloat16, torch.float16)
    allowed = (value.dtype, torch.float32) if low else (value.dtype,)
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        match_type(name, tensor, allowed)
        match_device(name, tensor, "value", value)
    if isinstance(spatial_shapes, Tensor):
        match_shape("spatial_shapes", spatial_shapes, "V 2", sizes)
        match_type("spatial_shapes", spatial_shapes, (torch.int64, torch.int32))
        if torch.compiler.is_compiling() or is_fake(spatial_shapes):
            return None
    return _check_pairs(_pairs(spatial_shapes), sizes["V"], sizes["S"])


def _check_pairs(
    pairs: tuple[tuple[int, int], ...], levels: int, tokens: int
) -> tuple[tuple[int, int], ...]:
    if len(pairs) != levels:
        raise ValueError(
            f"spatial_shapes has {len(pairs)} levels, expected {levels} as in sampling_locations"
        )
    for level, (height, width) in enumerate(pairs):
        if height < 0 or width < 0:
            raise ValueError(
                f"spatial_shapes has ({height}, {width}) at level {level}, expected sizes >= 0"
            )
    area = sum(height * width for height, width in pairs)
    if area != tokens:
        raise ValueError(
            f"spatial_shapes has {area} cells in all, expected S = {tokens} as in value"
        )
    return pairs


def _pairs(spatial_shapes: Sizes) -> tuple[tuple[int, int], ...]:
    """Level sizes as Python integers."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    try:
        pairs = tuple((height, width) for height, width in spatial_shapes)
    except (TypeError, ValueError):
        raise ValueError(
            f"spatial_shapes is {spatial_shapes!r}, expected a sequence of pairs (h, w)"
        ) from None
    return tuple((_size(height), _size(width)) for height, width in pairs)


def _size(size: object) -> int:
    if isinstance(size, int | torch.SymInt):
        return size  # type: ignore[return-value]
    if isinstance(size, Tensor) and size.dim() == 0 and not size.is_floating_point():
        return int(size)  # torch.jit.trace makes tensors of sizes
    if isinstance(size, Integral):  # NumPy's
        return int(size)
    raise TypeError(f"spatial_shapes holds {size!r}, expected integers")


def _flat(pairs: Sequence[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(pairs))


def _one_type(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, the wider one."""
    if locations.dtype == weights.dtype:
        return locations, weights
    return locations.float(), weights.float()


# --- registration -------------------------------------------------------------------------------

_INPUTS = "Tensor value, {} spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
_OVERLOADS = {"default": ("", "SymInt[]"), "device_shapes": (".device_shapes", "Tensor")}
_FORWARD = f"{NAMESPACE}::multi_scale_deformable_attention"
_BACKWARD = f"{NAMESPACE}::multi_scale_deformable_attention_backward"
for _suffix, _type in _OVERLOADS.values():
    _arguments = _INPUTS.format(_type)
    _tags = WAITS_FOR_HOST if _suffix else ()
    library.define(f"multi_scale_deformable_attention{_suffix}({_arguments}) -> Tensor", tags=_tags)
    library.define(
        f"multi_scale_deformable_attention_backward{_suffix}(Tensor grad_output, {_arguments})"
        " -> (Tensor, Tensor, Tensor)",
        tags=_tags,
    )
_operators = getattr(torch.ops, NAMESPACE)


def _host_sizes(value: Tensor, spatial_shapes: Tensor, levels: int) -> list[int]:
    return _flat(_check_pairs(_pairs(spatial_shapes), levels, value.shape[1]))


def _forward_device_shapes(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    sizes = _host_sizes(value, spatial_shapes, attention_weights.shape[3])
    return _operators.multi_scale_deformable_attention.default(
        value, sizes, sampling_locations, attention_weights
    )


def _backward_device_shapes(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _host_sizes(value, spatial_shapes, attention_weights.shape[3])
    return _operators.multi_scale_deformable_attention_backward.default(
        grad_output, value, sizes, sampling_locations, attention_weights
    )


def _triton_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    from .triton_kernels import deformable_attention as kernels

    pairs = tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    _check(value, pairs, sampling_locations, attention_weights)
    return kernels.forward(
        value.contiguous(), pairs, sampling_locations.contiguous(), attention_weights.contiguous()
    )


def _triton_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import deformable_attention as kernels

    pairs = tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    _check(value, pairs, sampling_locations, attention_weights)
    match_shape(
        "grad_output",
        grad_output,
        f"{value.shape[0]} {sampling_locations.shape[1]} {value.shape[2] * value.shape[3]}",
        {},
    )
    return kernels.backward(
        grad_output.contiguous(),
        value.contiguous(),
        pairs,
        sampling_locations.contiguous(),
        attention_weights.contiguous(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _fake_forward(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, ...]:
    tensors = value, sampling_locations, attention_weights
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, spatial_shapes, *others = inputs
    on_device = isinstance(spatial_shapes, Tensor)
    ctx.sizes = None if on_device else spatial_shapes
    ctx.save_for_backward(value, *others, spatial_shapes if on_device else None)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *others, spatial_shapes = ctx.saved_tensors
    if ctx.sizes is None:
        backward, sizes = _gradients["device_shapes"], spatial_shapes
    else:
        backward, sizes = _gradients["default"], ctx.sizes
    grad_value, *grads = backward(grad_output, value, sizes, *others)
    return grad_value, None, *grads


_Calls = dict[str, Callable[..., Any]]


def _register() -> tuple[_Calls, _Calls]:
    """Register everything; per overload what is called for the result and for its gradients."""
    calls, gradients = {}, {}
    for name, (suffix, _) in _OVERLOADS.items():
        forward = getattr(_operators.multi_scale_deformable_attention, name)
        backward = getattr(_operators.multi_scale_deformable_attention_backward, name)
        torch.library.register_fake(_FORWARD + suffix, _fake_forward)
        torch.library.register_fake(_BACKWARD + suffix, _fake_backward)
        fold_mapped_axis(forward, shared=(1,))
        fold_mapped_axis(backward, shared=(2,))
        calls[name] = differentiable(forward, _save, _differentiate)
        gradients[name] = differentiable_once(backward)
    dispatch = "CompositeExplicitAutograd"
    library.impl("multi_scale_deformable_attention.device_shapes", _forward_device_shapes, dispatch)
    library.impl(
        "multi_scale_deformable_attention_backward.device_shapes", _backward_device_shapes, dispatch
    )
    if HAS_TRITON:
        library.impl("multi_scale_deformable_attention", _triton_forward, "CUDA")
        library.impl("multi_scale_deformable_attention_backward", _triton_backward, "CUDA")
    return calls, gradients


_calls, _gradients = _register()
