"""Attention weights that no one keeps: they are made again where they are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALL = slice(None)


class LateMap:
    """Attention weights that are made when they are asked for, each time anew.

    It keeps what they are made of, which is small, and is indexed like the weights, as long as its
    rows are the first ones. They are in float32 at least.

    Args:
        make: returns some rows of the weights (B, H, N, S).
        shape: of all of them.
    """

    def __init__(self, make: Callable[[slice], Tensor], shape: torch.Size):
        self.make = make
        self.shape = shape

    def __call__(self, rows: slice = ALL) -> Tensor:
        """Rows of the weights, with gradients to what they are made of."""
        return self.make(rows)

    def __getitem__(self, index: tuple[slice, ...]) -> LateMap:
        first, *others = index
        rest = (ALL, *others)
        shape = torch.empty(self.shape, device="meta")[index].shape
        return LateMap(lambda rows: self.make(first if rows == ALL else rows)[rest], shape)


class LateMaps(list):
    """Receives :class:`LateMap` in place of weights, and attention stays on the fused path.

    A module that makes its weights in another way than :func:`~detectors.attention.attend` may
    append them as they are.
    """
