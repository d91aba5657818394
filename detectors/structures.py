"""What flows between the steps of a detector: small frozen dataclasses.

One alphabet of shapes throughout: B images, R branches, L decoder layers, N queries, S memory
tokens, C channels, H heads, K classes, V levels (feature maps). Stacked branches share the batch
axis, branch-major: rows ``[r * B, (r + 1) * B)`` belong to branch ``r``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


Targets = list[dict[str, Tensor]]
"""Per image: ``labels`` (G,) int64, ``boxes`` (G, 4) cxcywh in [0, 1], ``boxes_xyxy`` in pixels."""


@dataclass(frozen=True)
class Branch:
    """One set of memory tokens that the decoder and the criterion process.

    Attributes:
        name: suffix of the branch's losses; the student's carry none.
        aux_loss: whether the decoder layers before the last are supervised too.
    """

    name: str
    aux_loss: bool = True


STUDENT = Branch("student")


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


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder layer may look at beside the tokens.

    Attributes:
        positions: (B, S, C) position encoding of the tokens.
        padding_mask: (B, S), True on padding; None without padding.
        features: the feature maps that the tokens come from.
        targets: ground truth, in training only.
    """

    positions: Tensor
    padding_mask: Tensor | None
    features: FeatureMaps
    targets: Targets | None = None

    @computed_once
    def grid(self) -> LevelGrid:
        """Where the tokens lie."""
        return _grid(self.features.spatial_shapes, self.padding_mask, self.positions)


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
        return _grid(self.spatial_shapes, self.padding_mask, self.positions)

    def for_branches(self, per_image: Tensor) -> Tensor:
        """Repeat a tensor (B, ...) for every branch: (R * B, ...)."""
        if len(self.branches) == 1:
            return per_image
        return per_image.repeat(len(self.branches), *(1,) * (per_image.dim() - 1))


def _grid(
    spatial_shapes: tuple[tuple[int, int], ...], padding_mask: Tensor | None, positions: Tensor
) -> LevelGrid:
    return LevelGrid(spatial_shapes, padding_mask, positions.shape[0], positions.device)


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
class Queries:
    """Decoder input.

    Attributes:
        content: (R * B, N, C).
        position: (R * B, N, C) learned position embedding; or an anchor's logits (R * B, N, 2 or 4)
            in detectors whose positions are computed from anchors; or AdaMixer's (R * B, N, 4).
        attention_mask: (N, N) for self-attention, True where attending is forbidden.
        denoising: which of the queries are noised targets.
        references: (R * B, N, 2 or 4) in [0, 1], as (x, y[, w, h]), where a deformable decoder
            starts from; None in decoders that make their own of the positions.
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

    Attributes:
        self_attention: L maps (R * B, H, N, N).
        cross_attention: L maps (R * B, H, N, S).
        sampling: in deformable decoders, instead, L pairs of locations (R * B, N, H, V, P, 2) as
            (x, y) in [0, 1] within each padded level, and their weights (R * B, N, H, V, P).
    """

    self_attention: list[Tensor] = field(default_factory=list)
    cross_attention: list[Tensor] = field(default_factory=list)
    sampling: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class DecoderOutput:
    """Normalised decoder states and the references their boxes start from.

    Attributes:
        states: (L, R * B, N, C).
        references: (L or 1, R * B, N, 2 or 4) in [0, 1], as (x, y[, w, h]); or AdaMixer's
            positions; None if boxes start from nothing.
        branches: the R branches, the student first.
        attention: attention maps if they were asked for.
        denoising: which of the queries are noised targets.
        proposals: the encoder's own detections in two-stage detectors.
        image_sizes: (R * B, 2) as (h, w) in pixels if the references are in pixels.
    """

    states: Tensor
    references: Tensor | None
    branches: tuple[Branch, ...] = (STUDENT,)
    attention: AttentionMaps | None = None
    denoising: Denoising | None = None
    proposals: Predictions | None = None
    image_sizes: Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """Detections of every decoder layer and branch, in the precision of the heads' weights.

    Attributes:
        logits: (L, R * B, N, K).
        boxes: (L, R * B, N, 4) cxcywh in [0, 1] of the unpadded image.
        branches: the R branches, the student first.
        denoised: what became of the noised targets, with D queries instead of N.
        denoising: which target each of them belongs to.
        proposals: the encoder's own detections (1, R * B, S, ...) in two-stage detectors.
    """

    logits: Tensor
    boxes: Tensor
    branches: tuple[Branch, ...] = (STUDENT,)
    denoised: Predictions | None = None
    denoising: Denoising | None = None
    proposals: Predictions | None = None

    def of_branch(self, index: int) -> Predictions:
        """The predictions of one branch: logits (L, B, N, K), boxes (L, B, N, 4)."""
        batch = self.logits.shape[1] // len(self.branches)
        rows = slice(index * batch, (index + 1) * batch)
        return Predictions(self.logits[:, rows], self.boxes[:, rows], (self.branches[index],))
