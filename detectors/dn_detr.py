"""DN-DETR (Li et al., CVPR 2022): DAB-DETR that trains on noised targets besides."""

from __future__ import annotations

from torch import Tensor

from .dab_detr import DABDETR
from .denoising import DenoisingQueries
from .structures import Memory, Queries, Targets


class DNDETR(DABDETR):
    """DAB-DETR whose queries start as targets without a label, after the noised ones in training.

    Args:
        embed_dim: C.
        uniform_anchor_centers: see :class:`~detectors.dab_detr.DABDETR`.
        denoising_groups: noised copies of every target.
        label_noise_prob: how often a copy has another label.
        box_noise_scale: how far a copy's box moves and grows, relative to its size.
        with_indicator: the last channel of the content tells noised targets from other queries.
        noise_draws_no_label: see :class:`~detectors.denoising.DenoisingQueries`.
        detector: the other arguments of :class:`~detectors.dab_detr.DABDETR`; any
            :class:`~detectors.transformer.Transformer` will do.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        uniform_anchor_centers: bool = False,
        denoising_groups: int = 5,
        label_noise_prob: float = 0.2,
        box_noise_scale: float = 0.4,
        with_indicator: bool = True,
        noise_draws_no_label: bool = True,
        **detector,
    ):
        super().__init__(
            embed_dim=embed_dim, uniform_anchor_centers=uniform_anchor_centers, **detector
        )
        if getattr(self.transformer, "num_patterns", 0):
            raise ValueError("DN-DETR's queries start from labels: expected num_patterns 0")
        self.denoising_generator = DenoisingQueries(
            self.num_classes,
            embed_dim,
            denoising_groups,
            label_noise_prob,
            box_noise_scale,
            with_indicator,
            noise_draws_no_label,
        )

    def contents(self) -> Tensor:
        """What queries start with, (1, C): the label that no target has."""
        return self.denoising_generator.matching_content(1)

    def queries(self, memory: Memory, targets: Targets | None = None) -> Queries:
        """The anchors; in training noised targets come before them."""
        queries = super().queries(memory)
        if targets is None:
            return queries
        return self.denoising_generator.prepend(queries, targets)
