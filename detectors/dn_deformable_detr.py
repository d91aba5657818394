"""DN-Deformable-DETR (Li et al., CVPR 2022): deformable attention, anchors, noised targets."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from detrex.layers import MLP, get_sine_pos_embed
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from .deformable_detr import DeformableDecoder, DeformableDetector
from .denoising import DenoisingQueries
from .structures import LearnedQueries, Memory, Queries, Targets, repeat_rows


class DNDeformableDecoder(DeformableDecoder):
    """Deformable decoder whose position embeddings follow the boxes as every layer refines them.

    Args:
        embed_dim: C.
        decoder: the other arguments of :class:`~detectors.deformable_detr.DeformableDecoder`.
        embed_unpadded_in_training: embed boxes relative to the unpadded image in training too.
            detrex does not, so that padding moves the embeddings that its weights learn from. In
            evaluation boxes are always relative to their image.
    """

    padding_options = ("embed_unpadded_in_training",)

    def __init__(
        self, embed_dim: int = 256, *decoder, embed_unpadded_in_training: bool = False, **named
    ):
        super().__init__(embed_dim, *decoder, **named)
        self.embed_unpadded_in_training = embed_unpadded_in_training
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        if len(self.layers) == 1:
            self.query_scale.requires_grad_(False)  # it scales from the second layer on
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)

    def query_position(
        self,
        index: int,
        content: Tensor,
        queries: Queries,
        references: Tensor,
        on_levels: Tensor,
    ) -> Tensor:
        """Embedded boxes (B or R * B, N, C), scaled by the content."""
        if self.follows_training and not self.embed_unpadded_in_training:
            references = on_levels[:, :, 0]
        sine = get_sine_pos_embed(references, self.embed_dim // 2)
        position = self.ref_point_head(sine)
        # the first layer's content is the same in all queries
        if index == 0:
            return position
        return self.query_scale(content) * repeat_rows(position, content)


class DNDeformableDETR(DeformableDetector):
    """Multi-scale detector with learned anchors that trains on noised targets besides.

    Args:
        num_queries: N, without those of noised targets.
        embed_dim: C.
        denoising_groups: noised copies of every target.
        label_noise_prob: how often a copy has another label.
        box_noise_scale: how far a copy's box moves and grows, relative to its size.
        with_indicator: the last channel of the content tells noised targets from other queries.
        noise_draws_no_label: see :class:`~detectors.denoising.DenoisingQueries`.
        detector: the arguments of :class:`~detectors.deformable_detr.DeformableDetector`.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        embed_dim: int,
        denoising_groups: int = 5,
        label_noise_prob: float = 0.2,
        box_noise_scale: float = 0.4,
        with_indicator: bool = True,
        noise_draws_no_label: bool = True,
        **detector,
    ):
        super().__init__(embed_dim=embed_dim, with_box_refine=True, **detector)
        self.with_indicator = with_indicator
        self.tgt_embed = nn.Embedding(num_queries, embed_dim - with_indicator)
        self.refpoint_embed = nn.Embedding(num_queries, 4)
        nn.init.zeros_(self.tgt_embed.weight)
        with torch.no_grad():
            anchors = torch.rand_like(self.refpoint_embed.weight)
            self.refpoint_embed.weight.copy_(inverse_sigmoid(anchors).clamp(-3, 3))
        self.denoising_generator = DenoisingQueries(
            self.num_classes,
            embed_dim,
            denoising_groups,
            label_noise_prob,
            box_noise_scale,
            with_indicator,
            noise_draws_no_label,
        )

    def queries(self, memory: Memory, targets: Targets | None = None) -> Queries:
        """Learned content and anchors; in training noised targets come before them."""
        queries = super().queries(memory)
        if targets is None:
            return queries
        queries = self.denoising_generator.prepend(queries, targets)
        return replace(queries, references=queries.position.sigmoid())

    def learned_queries(self) -> LearnedQueries:
        """Contents and anchors."""
        content = F.pad(self.tgt_embed.weight, (0, int(self.with_indicator)))
        return LearnedQueries(content, self.refpoint_embed.weight)

    def start(self, learned: LearnedQueries, memory: Memory) -> Queries:
        """Queries for every image of the memory; they refer to their anchors."""
        queries = super().start(learned, memory)
        return replace(queries, references=queries.position.sigmoid())
