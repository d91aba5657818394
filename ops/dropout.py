"""Dropout whose mask follows from a seed and an element's place: one pass, no mask stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import differentiable, is_forward_mode, map_one_by_one
from ._checks import FLOATS, match_device, match_type
from ._library import COMPILED_PATH, NAMESPACE, library


def dropout_add(
    values: Tensor,
    residual: Tensor | None = None,
    p: float = 0.1,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``residual + dropout(values)``, where dropout multiplies what it keeps by 1 / (1 - p).

    On the CPU the mask follows from a seed and an element's place, whatever the number of threads,
    and is made again in the backward pass. Elsewhere this is PyTorch's dropout and a sum. Without
    training or with p = 0 it is the sum alone.

    Args:
        values: of any shape and layout.
        residual: of the same shape; nothing is added if None. The result has the wider of the two
            types.
        p: probability with which an element is dropped, below 1.
        training: whether anything is dropped.
        seed: of the mask, for the CPU; if None, :func:`draw_seed` gives one.

    Returns:
        A tensor of the shape of ``values``; ``values`` itself if there is nothing to do.

    Raises:
        ValueError: if shapes or devices differ, p is no probability below 1, or a seed comes with
            values that are not on the CPU.
        TypeError: if a tensor is not floating.
    """
    _check(values, p, seed)
    if residual is not None:
        _check_residual(residual, values)
    if p == 0 or not training:
        return values if residual is None else residual + values
    if values.device.type != "cpu":
        dropped = F.dropout(values, p)
        return dropped if residual is None else residual + dropped
    if residual is not None and residual.dtype != values.dtype:
        dtype = torch.promote_types(values.dtype, residual.dtype)
        values, residual = values.to(dtype), residual.to(dtype)
    return _drop(values, residual, p, draw_seed() if seed is None else seed)


def relu_dropout(
    values: Tensor,
    p: float = 0.1,
    training: bool = True,
    inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(relu(values))``, of which the result alone is kept; see :func:`dropout_add`.

    Args:
        values: of any shape and layout.
        p: probability with which an element is dropped, below 1.
        training: whether anything is dropped.
        inplace: whether the result may overwrite ``values``. Nothing else may need them; what
            PyTorch has saved for a backward pass is guarded as in its own in-place operations.
        seed: of the mask, for the CPU; if None, :func:`draw_seed` gives one.

    Returns:
        A tensor of the shape of ``values``.

    Raises:
        ValueError: if p is no probability below 1, or a seed comes with values that are not on the
            CPU.
        TypeError: if ``values`` is not floating.
    """
    _check(values, p, seed)
    if values.device.type != "cpu":
        return F.dropout(F.relu(values), p, training)
    p = p if training else 0.0
    if p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed()
    if inplace and may_be_overwritten(values):
        return _OverwritingReLUDropout.apply(values, p, seed)
    return F.relu(values) if seed is None else _relu_drop(values, p, seed)


def draw_seed() -> Tensor:
    """The seed of one mask, int64 (1,), from PyTorch's generator of the CPU."""
    return torch.randint(2**63 - 1, (1,))


def drop_(values: Tensor, p: float, seed: Tensor) -> Tensor:
    """Drop elements of a CPU tensor in place, out of autograd's sight; returns ``values``.

    The same seed and shape drop the same elements. Arguments as in :func:`dropout_add`.
    """
    _operators.dropout_(values, p, seed, False)
    return values


def relu_gradient_(grad_output: Tensor, output: Tensor, p: float) -> Tensor:
    """Bring the gradient of :func:`relu_dropout` in place to its values, out of autograd's sight.

    Args:
        grad_output: (..., C) on the CPU, float32 or float64; overwritten.
        output: (..., C), the result of :func:`relu_dropout`.
        p: probability with which an element was dropped.

    Returns:
        The new gradient's sum over all axes but the last (C,).
    """
    return _operators.relu_dropout_backward_(grad_output, output, p)


def reference(values: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """The same as :func:`dropout_add` with a seed (1,), in plain PyTorch."""
    wide = torch.promote_types(values.dtype, torch.float32)
    result = (values.to(wide) * (1 / (1 - p))).masked_fill(~kept(values.shape, p, seed), 0)
    if residual is not None:
        result += residual
    return result.to(values.dtype)


def kept(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """Which elements of a tensor of some shape the seed (1,) keeps, as booleans.

    An element's 32 random bits are a hash of the seed and its number, counted along the last axis
    first. It is kept if they are no smaller than p * 2^32, rounded down.
    """
    count, number = torch.Size(shape).numel(), _scrambled(int(seed))
    rows = [
        _random_bits(number, start >> 32, min(count - start, 2**32)) >= int(p * 2**32)
        for start in range(0, count, 2**32)
    ]
    return torch.cat(rows or [torch.empty(0, dtype=torch.bool)]).view(shape)


def _scrambled(seed: int) -> int:
    """As in ops/csrc/cpu/dropout.cpp, by the last step of SplitMix64."""
    x = seed % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _random_bits(number: int, row: int, keys: int) -> Tensor:
    """Those of ``DropoutRow`` in ops/csrc/cpu/dropout_bits.h, as int64 (keys,)."""
    first = _mix((row ^ number) & _WORD)
    second = _mix(first + (number >> 32) + 0x9E3779B9 & _WORD)
    x = torch.arange(keys).mul_(0x9E3779B9).bitwise_and_(_WORD) ^ first
    x ^= x >> 16
    x = x.mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    x = x.add_(second).mul_(0x846CA68B).bitwise_and_(_WORD)
    return x.bitwise_xor_(x >> 16)


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


_WORD = 2**32 - 1


def _check(values: Tensor, p: float, seed: Tensor | None) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values is {type(values).__name__}, expected a tensor")
    match_type("values", values, FLOATS)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}, expected a probability below 1")
    if seed is not None and values.device.type != "cpu":
        raise ValueError(f"values are on {values.device}, expected the cpu beside a seed")


def _check_residual(residual: Tensor, values: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual is {type(residual).__name__}, expected a tensor")
    match_type("residual", residual, FLOATS)
    match_device("residual", residual, "values", values)
    if residual.shape != values.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected {tuple(values.shape)} as values"
        )


def may_be_overwritten(values: Tensor) -> bool:
    """Whether autograd runs eagerly and the memory is neither a leaf's nor shared by elements."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    base = values if values._base is None else values._base
    leaf = base.is_leaf and base.requires_grad
    return not traced and not is_forward_mode() and not leaf and values.is_contiguous()


class _OverwritingReLUDropout(torch.autograd.Function):
    # not marked as in-place: if the values are a view, as a linear layer's output is, autograd
    # would copy the whole gradient twice

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float, seed: Tensor | None) -> Tensor:
        result = values.detach()  # shares memory and version
        if seed is None:
            result.relu_()
        else:
            _operators.dropout_(result, p, seed, True)
            if not result.is_inference():
                torch.autograd.graph.increment_version(result)
        _save_relu(ctx, (values, p, seed), result)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _differentiate_relu(ctx, grad_output)


# --- registration -------------------------------------------------------------------------------

library.define("dropout_add(Tensor values, Tensor? residual, float p, Tensor seed) -> Tensor")
library.define("dropout_(Tensor(a!) values, float p, Tensor seed, bool relu) -> ()")
library.define("relu_dropout(Tensor values, float p, Tensor seed) -> Tensor")
library.define("relu_dropout_backward(Tensor grad_output, Tensor output, float p) -> Tensor")
library.define("relu_dropout_backward_(Tensor(a!) grad_output, Tensor output, float p) -> Tensor")
_operators = getattr(torch.ops, NAMESPACE)


def _reference_in_place(values: Tensor, p: float, seed: Tensor, relu: bool) -> None:
    values.copy_(_reference_relu(values, p, seed) if relu else reference(values, None, p, seed))


def _reference_relu(values: Tensor, p: float, seed: Tensor) -> Tensor:
    return reference(values.relu(), None, p, seed)


def _reference_relu_backward(grad_output: Tensor, output: Tensor, p: float) -> Tensor:
    wide = torch.promote_types(output.dtype, torch.float32)
    scaled = grad_output.to(wide) * (1 / (1 - p))
    return scaled.masked_fill(output <= 0, 0).to(output.dtype)


def _reference_relu_backward_in_place(grad_output: Tensor, output: Tensor, p: float) -> Tensor:
    grad_output.copy_(_reference_relu_backward(grad_output, output, p))
    return grad_output.flatten(0, -2).sum(0)


def _fake(values: Tensor, *others: Any) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device=values.device)


def _fake_in_place(values: Tensor, *others: Any) -> None:
    return


def _fake_backward(grad_output: Tensor, output: Tensor, p: float) -> Tensor:
    return _fake(output)


def _fake_backward_in_place(grad_output: Tensor, output: Tensor, p: float) -> Tensor:
    return grad_output.new_empty(grad_output.shape[-1:])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (seed,), (for_values, for_residual, *_) = ctx.saved_tensors, ctx.needs_input_grad
    grad_values = _drop(grad_output, None, ctx.p, seed) if for_values else None
    return grad_values, grad_output if for_residual else None, None, None


def _save_relu(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.p, _ = inputs
    ctx.save_for_backward(output)


def _differentiate_relu(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _relu_gradient(grad_output, *ctx.saved_tensors, ctx.p), None, None


def _save_relu_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, result, ctx.p = inputs
    ctx.save_for_backward(result)


def _register() -> None:
    kernels = (
        ("dropout_add", _fake, reference),
        ("dropout_", _fake_in_place, _reference_in_place),
        ("relu_dropout", _fake, _reference_relu),
        ("relu_dropout_backward", _fake_backward, _reference_relu_backward),
        (
            "relu_dropout_backward_",
            _fake_backward_in_place,
            _reference_relu_backward_in_place,
        ),
    )
    for name, fake, slow in kernels:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        if not name.endswith("_"):
            map_one_by_one(getattr(_operators, name).default)
        if COMPILED_PATH is None:
            library.impl(name, slow, "CPU")


_register()
_drop = differentiable(_operators.dropout_add.default, _save, _differentiate)
_relu_drop = differentiable(_operators.relu_dropout.default, _save_relu, _differentiate_relu)
_relu_gradient = differentiable(
    _operators.relu_dropout_backward.default, _save_relu_backward, _differentiate_relu
)
