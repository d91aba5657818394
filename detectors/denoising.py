"""Queries made from noised targets, which the decoder learns to restore (DN-DETR, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from .structures import Denoising, Matches, Queries, Targets


class DenoisingQueries(nn.Module):
    """Makes several noised copies of every target, one group of queries for each.

    Args:
        num_classes: K; the label encoder has one more entry, that of queries without a label.
        embed_dim: C.
        groups: copies of every target.
        label_noise_prob: how often a copy has another label.
        box_noise_scale: how far a copy's centre moves and its sides grow, relative to half the box
            and to the whole.
        with_indicator: the last channel is 1 in noised targets and 0 in other queries.
        noise_draws_no_label: another label may also be that of queries without one, as in detrex.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        groups: int = 5,
        label_noise_prob: float = 0.2,
        box_noise_scale: float = 0.4,
        with_indicator: bool = True,
        noise_draws_no_label: bool = True,
    ):
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups is {groups}, noised targets need at least 1")
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.groups = groups
        self.label_noise_prob = label_noise_prob
        self.box_noise_scale = box_noise_scale
        self.with_indicator = with_indicator
        self.noise_draws_no_label = noise_draws_no_label
        self.label_encoder = nn.Embedding(num_classes + 1, embed_dim - int(with_indicator))

    def forward(self, targets: Targets) -> tuple[Tensor, Tensor, Denoising]:
        """Noise the targets of B images.

        Returns:
            Content (B, D, C), the boxes' logits (B, D, 4), and which query belongs to which target;
            D is ``groups`` times the most targets of an image. Queries without a target are zero.
        """
        labels = torch.cat([target["labels"] for target in targets]).repeat(self.groups)
        boxes = torch.cat([target["boxes"] for target in targets]).repeat(self.groups, 1)
        sizes = [len(target["labels"]) for target in targets]
        return self.embed(self.noise_labels(labels), self.noise_boxes(boxes), sizes)

    def noise_labels(self, labels: Tensor) -> Tensor:
        """Labels of which some are replaced by random ones."""
        count = self.num_classes + int(self.noise_draws_no_label)
        replaced = torch.rand(labels.shape, device=labels.device) < self.label_noise_prob
        return torch.where(replaced, torch.randint_like(labels, count), labels)

    def noise_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) cxcywh, moved and grown, within [0, 1]."""
        reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=-1) * self.box_noise_scale
        return (boxes + (torch.rand_like(boxes) * 2 - 1) * reach).clamp(0, 1)

    def embed(
        self, labels: Tensor, boxes: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Denoising]:
        """Queries of noised targets.

        Args:
            labels: (groups * T,), one group after the other, each with all images' T targets.
            boxes: (groups * T, 4) cxcywh, likewise.
            sizes: targets of each image.

        Returns:
            As :meth:`forward`.
        """
        longest = max(sizes, default=0)
        counts = torch.tensor(sizes, dtype=torch.long)
        images = torch.arange(len(sizes)).repeat_interleave(counts)
        targets = torch.arange(len(images))
        slots = targets - (counts.cumsum(0) - counts)[images]
        groups = torch.arange(self.groups).repeat_interleave(len(images))
        queries = groups * longest + slots.repeat(self.groups)
        places = images.repeat(self.groups).to(labels.device), queries.to(labels.device)

        content = self.label_encoder(labels)
        if self.with_indicator:
            content = F.pad(content, (0, 1), value=1.0)
        shape = (len(sizes), self.groups * longest)
        matches = Matches(
            places[0], places[1][None], targets.repeat(self.groups)[None].to(labels.device)
        )
        return (
            content.new_zeros(*shape, self.embed_dim).index_put(places, content),
            boxes.new_zeros(*shape, 4).index_put(places, inverse_sigmoid(boxes)),
            Denoising(shape[1], self.groups, matches),
        )

    def matching_content(self, num_queries: int) -> Tensor:
        """Content (N, C) of queries that match as usual: that of no label."""
        content = self.label_encoder.weight[-1]
        if self.with_indicator:
            content = F.pad(content, (0, 1))
        return content.expand(num_queries, -1)

    def prepend(self, queries: Queries, targets: Targets) -> Queries:
        """Put the noised targets before other queries.

        Args:
            queries: N of them, whose positions are the logits of boxes (B, N, 4).
            targets: of the B images.
        """
        content, boxes, denoising = self(targets)
        return Queries(
            torch.cat([content, queries.content], dim=1),
            torch.cat([boxes, queries.position], dim=1),
            self.attention_mask(denoising, queries.position.shape[1]),
            denoising,
        )

    def attention_mask(self, denoising: Denoising, num_queries: int) -> Tensor:
        """(D + N, D + N), True where attending is forbidden.

        Nobody sees the noised targets but those of their own group, which would give the answer
        away otherwise.
        """
        device = denoising.matches.images.device
        length = max(denoising.count // denoising.groups, 1)
        group = torch.arange(denoising.count + num_queries, device=device) // length
        noised = torch.arange(len(group), device=device) < denoising.count
        group = torch.where(noised, group, -1)
        return noised & (group[:, None] != group)
