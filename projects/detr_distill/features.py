"""The feature maps that a student may imitate, and what makes them comparable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.errors import UserError

from .context import DistillationContext, View
from .objective import Objective

Place = Literal["neck", "memory"]

pointwise = partial(nn.Conv2d, kernel_size=1)
"""Makes a 1 x 1 convolution between two numbers of channels."""


def feature_maps(view: View, place: Place) -> list[Tensor]:
    """The V maps (B, C, H, W) before the encoder (``neck``) or behind it (``memory``)."""
    if place == "neck":
        return list(view.features.levels)
    shapes = view.memory.spatial_shapes
    tokens = view.memory.tokens.split([height * width for height, width in shapes], dim=1)
    return [
        level.transpose(1, 2).unflatten(-1, shape)
        for level, shape in zip(tokens, shapes, strict=True)
    ]


class FeatureObjective(Objective):
    """A loss between feature maps, summed over the levels.

    A subclass has :meth:`level_loss` or overrides :meth:`forward`.

    Args:
        place: ``neck`` for the maps before the encoder, ``memory`` for its output. AdaMixer has no
            encoder: both are its neck's.
        weight: factor of the loss.
    """

    name: ClassVar[str]
    """Of the loss, after ``loss_``."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of parts that are logged apart, after the loss's; :meth:`level_loss` stacks them."""

    def __init__(self, place: Place = "neck", weight: float = 1.0):
        super().__init__()
        if place not in ("neck", "memory"):
            raise UserError(f"place is {place!r}, expected 'neck' or 'memory'")
        self.place: Place = place
        self.weight = weight

    def prepare(self, student: View, teacher: View) -> None:
        """Check that the levels are the same grids, and make what each level needs."""
        maps, wanted = self.maps(student), self.maps(teacher)
        shapes, expected = ([tuple(m.shape[-2:]) for m in side] for side in (maps, wanted))
        if shapes != expected:
            raise UserError(
                f"{type(self).__name__} compares feature maps at '{self.place}': of the same image "
                f"the student's are {shapes}, the teacher's {expected}"
            )
        self.make_adapters([m.shape[1] for m in maps], [m.shape[1] for m in wanted])

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make what each level needs.

        Args:
            student: channels C of the student's levels.
            teacher: channels of the teacher's.
        """
        raise NotImplementedError

    def maps(self, view: View) -> list[Tensor]:
        """The V maps (B, C, H, W) that are compared."""
        return feature_maps(view, self.place)

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The weighted loss, or its parts, summed over the levels; in float32 in AMP too."""
        student, teacher = self.maps(context.student), self.maps(context.teacher)
        with torch.autocast(student[0].device.type, enabled=False):
            losses = [
                self.level_loss(level, own.float(), wanted.float(), context)
                for level, (own, wanted) in enumerate(zip(student, teacher, strict=True))
            ]
        total = torch.stack(losses).sum(0) * self.weight
        if not self.parts:
            return {f"loss_{self.name}": total}
        parts = zip(self.parts, total.unbind(), strict=True)
        return {f"loss_{self.name}_{part}": value for part, value in parts}

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The unweighted loss, or as many as there are parts, of a level's maps (B, C, H, W)."""
        raise NotImplementedError


def adapt_channels(
    student: list[int], teacher: list[int], make: Callable[[int, int], nn.Module] | None = None
) -> nn.ModuleList:
    """One adapter for each level, from the student's channels to the teacher's.

    Args:
        student: channels of the levels.
        teacher: channels of the levels.
        make: makes an adapter of the two; None for a 1 x 1 convolution where they differ.
    """

    def where_they_differ(channels: int, wanted: int) -> nn.Module:
        return nn.Identity() if channels == wanted else pointwise(channels, wanted)

    return nn.ModuleList(map(make or where_they_differ, student, teacher))
