"""What every operator needs to be differentiated, mapped and traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiable(
    operator: torch._ops.OpOverload, setup_context: Callable, backward: Callable
) -> Callable[..., Any]:
    """Register an operator's gradient.

    Args:
        operator: the overload.
        setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs.
        backward: ``(ctx, *gradients of the outputs)`` to the gradients of the inputs.

    Returns:
        What to call instead of ``operator``: the same, also inside :mod:`torch.func` transforms,
        which do not look behind an operator's registered gradient.
    """
    torch.library.register_autograd(operator, backward, setup_context=setup_context)
    names = {
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type("Differentiable", (torch.autograd.Function,), names)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or is_forward_mode()
        ):
            return function.apply(*inputs)  # in forward mode it raises; an operator drops tangents
        return operator(*inputs)

    return call


def differentiable_once(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """:func:`differentiable` for an operator that is a gradient: its own gradient raises."""

    def save_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
        return

    def refuse(ctx: Any, *gradients: Any) -> Any:
        name = operator.name().removesuffix("_backward").rpartition("::")[2]
        raise RuntimeError(f"{name} has no second derivatives")

    return differentiable(operator, save_nothing, refuse)


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, for which our operators have no rules."""
    return forward_ad._current_level >= 0


def fold_mapped_axis(
    operator: torch._ops.OpOverload,
    shared: Sequence[int] = (),
    unless: Callable[[Sequence[Any]], bool] = lambda inputs: False,
) -> None:
    """Register the rule by which ``torch.vmap`` folds its axis into the images of a batch.

    Args:
        operator: all of its tensors begin with the images B, its results too.
        shared: positions of tensors without images, which stay as they are.
        unless: of which inputs one entry is to be computed after the other instead.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        if unless(inputs):
            return _one_by_one(operator, info.batch_size, in_dims, inputs)
        folded = [
            _fold(tensor, dim, info.batch_size)
            if isinstance(tensor, Tensor) and position not in shared
            else tensor
            for position, (tensor, dim) in enumerate(zip(inputs, in_dims, strict=True))
        ]
        result = operator(*folded)
        if isinstance(result, Tensor):
            return _unfold(result, info.batch_size), 0
        return tuple(_unfold(part, info.batch_size) for part in result), (0,) * len(result)

    torch.library.register_vmap(operator, rule)


def map_one_by_one(operator: torch._ops.OpOverload) -> None:
    """Register the rule by which ``torch.vmap`` calls an operator for one entry after the other.

    Args:
        operator: every entry's results are what they would be on its own.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(operator, info.batch_size, in_dims, inputs)

    torch.library.register_vmap(operator, rule)


def _one_by_one(
    operator: torch._ops.OpOverload,
    size: int,
    in_dims: Sequence[int | None],
    inputs: Sequence[Any],
) -> tuple[Any, Any]:
    """Results stacked over the mapped axis, and that this axis is the first of each."""
    results = [
        operator(
            *(
                x if dim is None else x.select(dim, entry)
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for entry in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)


def convolution_gradients(
    grad_output: Tensor,
    images: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
    stride: int = 1,
    padding: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's own for the images, the weight and the bias of ``F.conv2d``, as far as needed."""
    return torch.ops.aten.convolution_backward(
        grad_output,
        images,
        weight,
        [len(weight)],
        stride=[stride, stride],
        padding=[padding, padding],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=needed,
    )


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))
