"""MGD: the student restores the teacher's map from its own, most of which is hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .context import DistillationContext
from .features import FeatureObjective, Place, adapt_channels


class MGD(FeatureObjective):
    """``sum (G(A(F_S) * keep) - F_T)^2 / B``, where G is two 3 x 3 convolutions with a ReLU.

    A is a 1 x 1 convolution where the numbers of channels differ.

    Args:
        place: as :class:`~projects.detr_distill.features.FeatureObjective` takes it.
        weight: factor of the loss; as in the released code for one-stage detectors. For two-stage
            ones it is 5e-7.
        hidden: share of the cells that are set to zero in all channels; for two-stage ones 0.45.
    """

    name = "mgd"

    def __init__(self, place: Place = "neck", weight: float = 2e-5, hidden: float = 0.65):
        super().__init__(place, weight)
        self.hidden = hidden

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make A and G for every level."""
        self.adapters = adapt_channels(student, teacher)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for channels in teacher
        )

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The squared error of what is restored, summed within an image."""
        adapted = self.adapters[level](student)
        keep = self.draw(adapted) <= 1 - self.hidden
        restored = self.generators[level](adapted * keep)
        return (restored - teacher).square().sum() / len(teacher)

    def draw(self, like: Tensor) -> Tensor:
        """Uniform random numbers (B, 1, H, W) in [0, 1) for maps (B, C, H, W)."""
        return torch.rand_like(like[:, :1])
