"""FitNet: every cell and channel is imitated alike."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .context import DistillationContext
from .features import FeatureObjective, Place, adapt_channels, pointwise


class FitNet(FeatureObjective):
    """``mean (F_T - A(F_S))^2``, where A is a 1 x 1 convolution.

    Args:
        place: as :class:`~projects.detr_distill.features.FeatureObjective` takes it.
        weight: factor of the loss; 20 is what DETRDistill gives its own feature loss.
    """

    name = "fitnet"

    def __init__(self, place: Place = "neck", weight: float = 20.0):
        super().__init__(place, weight)

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make A for every level."""
        self.adapters = adapt_channels(student, teacher, pointwise)

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The mean squared difference."""
        return F.mse_loss(self.adapters[level](student), teacher)
