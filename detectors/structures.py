"""What flows between the steps of a detector: small frozen dataclasses.

One alphabet of shapes throughout: B images, R branches, L decoder layers, N queries, S memory
tokens, C channels, H heads, K classes, V levels (feature maps). Stacked branches share the batch
axis, branch-major: rows ``[r * B, (r + 1) * B)`` belong to branch ``r``. What is still equal in all
branches may have B rows instead; :func:`repeat_rows` repeats it where it meets what is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import LevelGrid, computed_once, level_grid


def repeat_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Repeat a tensor (B, ...) for the R * B rows of another; as it is if it has as many."""
    count = like.shape[0] // tensor.shape[0]
    return tensor if count == 1 else tensor.repeat(count, *(1,) * (tensor.dim() - 1))


Targets = list[dict[str, Tensor]]
"""Per image: ``labels`` (G,) int64, ``boxes`` (G, 4) cxcywh in [0, 1], ``boxes_xyxy`` in pixels."""


@dataclass(frozen=True)
class Branch:
    """One set of memory tokens that the decoder and the criterion process.

    Attributes:
        name: suffix of the branch's losses; the student's carry none.
        aux_loss: whether the decoder layers before the last are supervised too. If not, they
            predict nothing.
        loss_weight: factor of the branch's losses.
    """

    name: str
    aux_loss: bool = True
    loss_weight: float = 1.0


STUDENT = Branch("student")


class Group(NamedTuple):
    """What is matched by itself: the predictions of a decoder layer in a branch."""

    branch: Branch
    layer: int


def groups_of(branches: tuple[Branch, ...], num_layers: int) -> tuple[Group, ...]:
    """The groups that predict, the layers of the first branch first."""
    return tuple(
        Group(branch, layer)
        for branch in branches
        for layer in range(0 if branch.aux_loss else num_layers - 1, num_layers)
    )


@dataclass(frozen=True)
class FeatureMaps:
    """Projected feature maps of a padded batch.

    Attributes:
        levels: V maps (B, C, H, W), from high to low resolution.
        padding_masks: V masks (B, H, W), True on padding; None if no image is padded.
        positions: V position encodings (B, C, H, W).
        image_sizes: B sizes (h, w) in pixels before padding.
        padded_size: (h, w) in pixels of the batch.
    """

    levels: tuple[Tensor, ...]
    padding_masks: tuple[Tensor, ...] | None
    positions: tuple[Tensor, ...]
    image_sizes: list[tuple[int, int]]
    padded_size: tuple[int, int]

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of every level."""
        return tuple((level.shape[-2], level.shape[-1]) for level in self.levels)

    def sizes(self) -> Tensor:
        """The images' sizes in pixels before padding, (B, 2) as (h, w), in float32 or float64."""
        level = self.levels[0]
        precise = torch.promote_types(level.dtype, torch.float32)
        return torch.tensor(self.image_sizes, dtype=precise, device=level.device)

    def with_level_embeds(self, embeds: Tensor) -> FeatureMaps:
        """The same with its level's embedding, one of (V, C), added to every position.

        Raises:
            ValueError: there is not one embedding a level.
        """
        if len(embeds) != len(self.positions):
            raise ValueError(
                f"the neck gives {len(self.positions)} levels, embeddings are of {len(embeds)}"
            )
        # one an image: PyTorch sums over cells and then images in a twentieth of the time of both
        per_image = embeds[:, None].expand(-1, len(self.positions[0]), -1)
        positions = tuple(
            position + embed[:, :, None, None]
            for position, embed in zip(self.positions, per_image, strict=True)
        )
        return replace(self, positions=positions)

    def tokens(self) -> Tensor:
        """Level-major, row-major tokens (B, S, C)."""
        return _to_tokens(self.levels)

    def token_positions(self) -> Tensor:
        """Position encoding of every token (B, S, C)."""
        return _to_tokens(self.positions)

    def token_padding(self) -> Tensor | None:
        """Padding mask of the tokens (B, S), True on padding; None without padding."""
        if self.padding_masks is None:
            return None
        return torch.cat([mask.flatten(1) for mask in self.padding_masks], dim=1)


def _to_tokens(maps: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder layer may look at beside the tokens.

    Attributes:
        positions: (B or R * B, S, C) position encoding of the tokens.
        padding_mask: (B, S), True on padding; None without padding.
        features: the feature maps that the tokens come from.
        targets: ground truth, in training only.
        branches: the R branches of the layer's input, the student first.
    """

    positions: Tensor
    padding_mask: Tensor | None
    features: FeatureMaps
    targets: Targets | None = None
    branches: tuple[Branch, ...] = (STUDENT,)

    def padding_of(self, tokens: Tensor) -> Tensor | None:
        """Padding mask of every row of tokens (R * B, S, C), or None."""
        return None if self.padding_mask is None else repeat_rows(self.padding_mask, tokens)

    @computed_once
    def grid(self) -> LevelGrid:
        """Where the tokens lie."""
        return level_grid(self.features.spatial_shapes, self.padding_mask, self.positions)


@dataclass(frozen=True)
class Memory:
    """Encoder output.

    Attributes:
        tokens: (R * B, S, C).
        padding_mask: (B, S), True on padding; None without padding.
        positions: (B, S, C).
        spatial_shapes: (h, w) of every level.
        branches: the R branches, the student first.
        image_sizes: (B, 2) as (h, w) in pixels before padding, for decoders that count in pixels.
    """

    tokens: Tensor
    padding_mask: Tensor | None
    positions: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    branches: tuple[Branch, ...] = (STUDENT,)
    image_sizes: Tensor | None = None

    @computed_once
    def grid(self) -> LevelGrid:
        """Where the tokens lie."""
        return level_grid(self.spatial_shapes, self.padding_mask, self.positions)

    @property
    def batch(self) -> int:
        """B."""
        return self.positions.shape[0]

    def of_branch(self, name: str) -> Memory:
        """One branch's tokens (B, S, C), to be decoded as if they were the student's."""
        index = [branch.name for branch in self.branches].index(name)
        return replace(
            self, tokens=self.tokens.chunk(len(self.branches))[index], branches=(STUDENT,)
        )

    def for_branches(self, per_image: Tensor) -> Tensor:
        """Repeat a tensor (B, ...) for every branch: (R * B, ...)."""
        return repeat_rows(per_image, self.tokens)


@dataclass(frozen=True)
class Matches:
    """M pairs of queries and targets in each of G groups of predictions.

    Attributes:
        images: (M,) the image of each pair.
        queries: (G, M) within the image.
        targets: (G, M) counted over all images.
    """

    images: Tensor
    queries: Tensor
    targets: Tensor

    def select(self, predictions: Tensor) -> Tensor:
        """The matched entries of predictions (G, B, N, ...): (G, M, ...)."""
        return predictions[self.index]

    def of_groups(self, picked: slice | list[int]) -> Matches:
        """The matches of some of the groups."""
        return Matches(self.images, self.queries[picked], self.targets[picked])

    def for_groups(self, count: int) -> Matches:
        """The matches of one group as those of several."""
        return Matches(self.images, self.queries.expand(count, -1), self.targets.expand(count, -1))

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """What picks the matched entries out of (G, B, N, ...)."""
        groups = torch.arange(self.queries.shape[0], device=self.queries.device)
        return groups[:, None], self.images.expand_as(self.queries), self.queries


@dataclass(frozen=True)
class Denoising:
    """Queries made from noised targets, the first ones of every image (DN-DETR).

    Attributes:
        count: queries of an image, padding included; 0 in a batch without boxes.
        groups: copies of every target.
        matches: with one group of predictions; which query belongs to which target is known.
    """

    count: int
    groups: int
    matches: Matches


@dataclass(frozen=True)
class LearnedQueries:
    """What a detector's queries are before it sees an image.

    Attributes:
        content: (N, C).
        position: (N, C), or an anchor's logits (N, 2 or 4), or (N, 0) where the image gives it.
    """

    content: Tensor
    position: Tensor


@dataclass(frozen=True)
class Queries:
    """Decoder input, which is the same in all branches.

    Attributes:
        content: (B, N, C).
        position: (B, N, C) learned position embedding; or an anchor's logits (B, N, 2 or 4) in
            detectors whose positions are computed from anchors; or AdaMixer's (B, N, 4).
        attention_mask: (N, N) for self-attention, True where attending is forbidden.
        denoising: which of the queries are noised targets.
        references: (B, N, 2 or 4) in [0, 1], as (x, y[, w, h]), where a deformable decoder starts
            from; None in decoders that make their own of the positions.
        proposals: the encoder's own detections in two-stage detectors.
    """

    content: Tensor
    position: Tensor
    attention_mask: Tensor | None = None
    denoising: Denoising | None = None
    references: Tensor | None = None
    proposals: Predictions | None = None


@dataclass
class AttentionMaps:
    """Collects attention weights after the softmax and before dropout, one entry a layer.

    The first layer's self-attention sees the same queries in all branches and has B rows.

    Attributes:
        self_attention: L maps (R * B, H, N, N).
        cross_attention: L maps (R * B, H, N, S).
        sampling: in deformable decoders, instead, L pairs of locations (R * B, N, H, V, P, 2) as
            (x, y) in [0, 1] within each padded level, and their weights (R * B, N, H, V, P).
        gaussian: where Gaussians modulate the cross-attention, L log priors (R * B, H, N, S).
    """

    self_attention: list[Tensor] = field(default_factory=list)
    cross_attention: list[Tensor] = field(default_factory=list)
    sampling: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gaussian: list[Tensor] = field(default_factory=list)

    def new(self) -> AttentionMaps:
        """Empty lists of the same kinds."""
        return AttentionMaps(*(type(maps)() for maps in self._lists()))

    def extend(self, more: AttentionMaps) -> None:
        """Append the maps of further layers."""
        for maps, added in zip(self._lists(), more._lists(), strict=True):
            maps.extend(added)

    def _lists(self) -> tuple[list, ...]:
        return self.self_attention, self.cross_attention, self.sampling, self.gaussian


@dataclass(frozen=True)
class DecoderOutput:
    """Normalised decoder states and the references their boxes start from.

    Attributes:
        states: (L, R * B, N, C).
        references: (L, R * B, N, 2 or 4) in [0, 1], as (x, y[, w, h]), or (1, B, N, 2 or 4) where
            all layers and branches share them; or AdaMixer's positions; None if boxes start from
            nothing.
        branches: the R branches, the student first.
        attention: attention maps if they were asked for.
        denoising: which of the queries are noised targets.
        proposals: the encoder's own detections in two-stage detectors.
        image_sizes: (B, 2) as (h, w) in pixels if the references are in pixels.
    """

    states: Tensor
    references: Tensor | None
    branches: tuple[Branch, ...] = (STUDENT,)
    attention: AttentionMaps | None = None
    denoising: Denoising | None = None
    proposals: Predictions | None = None
    image_sizes: Tensor | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The G groups that predict."""
        return groups_of(self.branches, self.states.shape[0])

    @property
    def group_references(self) -> Tensor | None:
        """The references of the groups (G or 1, B, N, 2 or 4)."""
        if self.references is None or self.references.shape[1] != self.states.shape[1]:
            return self.references
        return self.of_groups(self.references)

    def of_groups(self, values: Tensor) -> Tensor:
        """What belongs to the groups, (G, B, ...), of a tensor (L, R * B, ...)."""
        rows = values.unflatten(1, (len(self.branches), -1)).unbind(1)
        parts = [
            part if branch.aux_loss else part[-1:]
            for part, branch in zip(rows, self.branches, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Predictions:
    """Detections of G groups, in the precision of the heads' weights.

    With the student alone there is one group for each of the L decoder layers.

    Attributes:
        logits: (G, B, N, K).
        boxes: (G, B, N, 4) cxcywh in [0, 1] of the unpadded image.
        groups: which they are, those of the student first, a branch's last layer last.
        denoised: what became of the noised targets, with D queries instead of N.
        denoising: which target each of them belongs to.
        proposals: the encoder's own detections (1, B, S, ...) in two-stage detectors.
    """

    logits: Tensor
    boxes: Tensor
    groups: tuple[Group, ...]
    denoised: Predictions | None = None
    denoising: Denoising | None = None
    proposals: Predictions | None = None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that the groups belong to, the student first."""
        return tuple(dict.fromkeys(group.branch for group in self.groups))

    def of_branch(self, index: int) -> Predictions:
        """The predictions of one branch, whose last group is the last decoder layer."""
        branch = self.branches[index]
        picked = [place for place, group in enumerate(self.groups) if group.branch == branch]
        rows = slice(picked[0], picked[-1] + 1)
        return Predictions(self.logits[rows], self.boxes[rows], self.groups[rows])
