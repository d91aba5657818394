"""Where the cells of padded levels lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class computed_once(Generic[Result]):
    """A property that keeps its value; unlike ``functools.cached_property`` it can be compiled."""

    def __init__(self, compute: Callable[[Any], Result]):
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Result:
        value = self.compute(instance)
        instance.__dict__[self.name] = value  # found first from now on
        return value


@dataclass(frozen=True)
class LevelGrid:
    """Where the cells of padded levels lie; computed when asked for, once.

    Attributes:
        spatial_shapes: (h, w) of every level.
        padding_mask: (B, S), True on padding; None without padding.
        batch: B.
        device: where the results live, in float32.
    """

    spatial_shapes: tuple[tuple[int, int], ...]
    padding_mask: Tensor | None
    batch: int
    device: torch.device

    @computed_once
    def unpadded_sizes(self) -> Tensor:
        """Cells of every level that are not padding, (B, V, 2) as (w, h)."""
        if self.padding_mask is None:
            return self._sizes().expand(self.batch, -1, -1)
        sizes = []
        areas = [height * width for height, width in self.spatial_shapes]
        for mask, shape in zip(self.padding_mask.split(areas, 1), self.spatial_shapes, strict=True):
            free = ~mask.unflatten(1, shape)
            sizes.append(torch.stack([free[:, 0].sum(-1), free[:, :, 0].sum(-1)], dim=-1))
        return torch.stack(sizes, dim=1).float()

    @computed_once
    def valid_ratios(self) -> Tensor:
        """Share of every level's width and height that is not padding, (B, V, 2)."""
        return self.unpadded_sizes / self._sizes()

    @computed_once
    def centers(self) -> Tensor:
        """Centres of all cells as (x, y), (B, S, 2), in [0, 1] within the unpadded image."""
        centers = []
        for level, (height, width) in enumerate(self.spatial_shapes):
            y, x = (
                torch.arange(length, dtype=torch.float32, device=self.device) + 0.5
                for length in (height, width)
            )
            cells = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)
            centers.append(cells / self.unpadded_sizes[:, None, level])
        return torch.cat(centers, dim=1)

    @computed_once
    def reference_points(self) -> Tensor:
        """The cells' centres in the padded coordinates of every level, (B, S, V, 2)."""
        return self.centers[:, :, None] * self.valid_ratios[:, None]

    def _sizes(self) -> Tensor:
        sizes = [(width, height) for height, width in self.spatial_shapes]
        return torch.tensor(sizes, dtype=torch.float32, device=self.device)


def level_grid(
    spatial_shapes: tuple[tuple[int, int], ...], padding_mask: Tensor | None, positions: Tensor
) -> LevelGrid:
    """The grid of tokens with positions (B, S, C)."""
    return LevelGrid(spatial_shapes, padding_mask, positions.shape[0], positions.device)
