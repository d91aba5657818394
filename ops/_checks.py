"""Checks of operator arguments: one line that names the argument, what was found and expected."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def match_shape(name: str, tensor: Tensor, axes: str, sizes: dict[str, int]) -> None:
    """Hold a tensor's shape against named axes.

    Args:
        name: of the argument.
        tensor: whose shape is checked.
        axes: space-separated names or numbers, such as ``"B N H 2"``.
        sizes: known sizes by name; axes seen for the first time are added.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if the number of axes or a known size differs.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    names = axes.split()
    expected = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in names]
    if tensor.dim() != len(names) or any(
        size is not None and size != found
        for size, found in zip(expected, tensor.shape, strict=True)
    ):
        values = ", ".join("?" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({', '.join(names)}) = ({values})"
        )
    for axis, found in zip(names, tensor.shape, strict=True):
        if not axis.isdigit():
            sizes.setdefault(axis, found)


def match_type(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise a TypeError unless the tensor has one of the allowed types."""
    if tensor.dtype not in allowed:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} has dtype {found}, expected {expected}")


def match_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two tensors live on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, expected {other.device} as that of {other_name}"
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in autocast's precision where it is active; float64 stays as it is."""
    return tuple(_autocast(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors)


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves the operations on ``tensor``'s device alone."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
