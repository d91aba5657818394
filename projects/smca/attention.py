"""Where queries look, as Gaussians, and the cross-attention that these modulate (SMCA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import ops
from detectors.attention import (
    QueryCrossAttention,
    allow_unpadded,
    attend,
    check_heads,
    merge_heads,
)
from detectors.structures import AttentionMaps, Memory, repeat_rows

Scales = Literal["fixed", "single", "independent"]

SMALLEST_SQUARE = 1e-4
"""Of a scale that divides: one near 0 selects a single cell and is not infinitely steep."""


@dataclass(frozen=True)
class Gaussians:
    """A Gaussian per query, head and level; one head instead of H is shared by all.

    Attributes:
        centers: (B, V, H or 1, N, 2) as (x, y) in cells of the level.
        precision: (B, V, H or 1, N, 2), >= 0, per squared cell: 1 / (2 sigma^2).
        selection: (B, N, V) weights of the levels; None counts each in full.
    """

    centers: Tensor
    precision: Tensor
    selection: Tensor | None = None

    def log_prior(self, level: int, spatial_shape: tuple[int, int]) -> Tensor:
        """Logarithm of the weight of every cell of a level, (B, H or 1, N, h * w)."""
        along_x, along_y = (
            self.precision[:, level, ..., axis, None]
            * (
                torch.arange(spatial_shape[1 - axis], device=self.centers.device)
                - self.centers[:, level, ..., axis, None]
            ).square()
            for axis in (0, 1)
        )
        return -(along_y[..., :, None] + along_x[..., None, :]).flatten(-2)

    def for_rows(self, like: Tensor) -> Gaussians:
        """The same for the R * B rows of a tensor."""
        selection = None if self.selection is None else repeat_rows(self.selection, like)
        return Gaussians(
            repeat_rows(self.centers, like), repeat_rows(self.precision, like), selection
        )

    def weigh(self, parts: list[Tensor]) -> list[Tensor]:
        """What the levels give, (B, H, N, ...) each, times their weights."""
        if self.selection is None:
            return parts
        weights = self.selection[:, None, :, :, None].unbind(3)
        return [part * weight.to(part.dtype) for part, weight in zip(parts, weights, strict=True)]


class Modulation(nn.Module):
    """Predicts the Gaussians of one decoder layer from its queries.

    The log prior of a level's cell (x, y) is ``-f (s_x^2 (x - p_x)^2 + s_y^2 (y - p_y)^2) / b``,
    with scales s, the bandwidth b, the level's factor f, and a centre p that is the query's initial
    centre on that level plus an offset of the head. The defaults read the paper as the released
    code does.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        strides: of the V levels, in pixels.
        level_factors: f of every level; the released code has 0.5, 1 and 2 for strides 16, 32, 64.
        scales: "independent" for width and height, "single" for one for both, or "fixed" to 1.
        head_shared: one Gaussian for all heads, without offset, instead of one for each.
        bandwidth: b.
        divide_by_scales: divide by the squared scales, as the paper's formulas do.
        half_cell_grid: a cell lies at its centre, half a cell from its index.
        query_norm: predict from normalised queries.
        level_selection: weigh the levels for each query, if there are several.
        zero_offsets: begin with the Gaussians of all heads at the query's centre, not a cell or two
            off it, which is far where maps are small.
    """

    gains: Tensor
    offsets: nn.Linear | None
    scales: nn.Linear | None
    selection: nn.Linear | None

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        strides: Sequence[int] = (32,),
        level_factors: Sequence[float] = (1.0,),
        scales: Scales = "independent",
        head_shared: bool = False,
        bandwidth: float = 8.0,
        divide_by_scales: bool = False,
        half_cell_grid: bool = False,
        query_norm: bool = True,
        level_selection: bool = True,
        zero_offsets: bool = False,
    ):
        super().__init__()
        check_heads(embed_dim, num_heads)
        if scales not in get_args(Scales):
            raise ValueError(f"scales is {scales!r}, expected one of {get_args(Scales)}")
        if len(level_factors) != len(strides):
            raise ValueError(f"{len(strides)} strides, but {len(level_factors)} level_factors")
        self.strides = tuple(strides)
        self.heads = 1 if head_shared else num_heads
        self.divide_by_scales = divide_by_scales
        self.half_cell_grid = half_cell_grid
        self.zero_offsets = zero_offsets
        levels = len(self.strides)
        gains = torch.tensor(level_factors, dtype=torch.float32) / bandwidth
        self.register_buffer("gains", gains.view(-1, 1, 1, 1), persistent=False)
        self.norm = nn.LayerNorm(embed_dim) if query_norm else nn.Identity()
        self.offsets = self.scales = self.selection = None
        if not head_shared:
            self.offsets = nn.Linear(embed_dim, levels * num_heads * 2)
        if scales != "fixed":
            width = 2 if scales == "independent" else 1
            self.scales = nn.Linear(embed_dim, levels * self.heads * width)
        if level_selection and levels > 1:
            self.selection = nn.Linear(embed_dim, levels)

    def init_weights(self) -> None:
        """Scales of 1 whatever the query; biases that differ from those of other layers."""
        for layer in (self.offsets, self.selection):
            if layer is not None:
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.bias, -bound, bound)
        if self.zero_offsets and self.offsets is not None:
            nn.init.zeros_(self.offsets.weight)
            nn.init.zeros_(self.offsets.bias)
        if self.scales is not None:
            nn.init.zeros_(self.scales.weight)
            nn.init.ones_(self.scales.bias)

    def observe(self, content: Tensor, position: Tensor) -> Tensor:
        """What Gaussians are predicted from, in the precision of the positions.

        Args:
            content: (B or R * B, N, C).
            position: (B, N, C).

        Returns:
            As many rows as ``content``.
        """
        return self.norm(content.to(position.dtype) + repeat_rows(position, content))

    def forward(self, observed: Tensor, points: Tensor) -> Gaussians:
        """Predict the Gaussians.

        Args:
            observed: (B or R * B, N, C) of :meth:`observe`.
            points: (B, N, 2) initial centres as (x, y) in pixels.
        """
        centers = torch.stack([points / stride for stride in self.strides], dim=1)[:, :, None]
        centers = repeat_rows(centers, observed)
        if self.offsets is not None:
            centers = centers + self._per_level(self.offsets(observed))
        if self.half_cell_grid:
            centers = centers - 0.5
        selection = None if self.selection is None else self.selection(observed).softmax(-1)
        return Gaussians(centers, self._precision(observed), selection)

    def _precision(self, observed: Tensor) -> Tensor:
        gains = self.gains.to(observed.dtype)
        if self.scales is None:
            return gains.expand(observed.shape[0], -1, -1, observed.shape[1], 2)
        squared = self._per_level(self.scales(observed)).square()
        if self.divide_by_scales:
            squared = squared.clamp(min=SMALLEST_SQUARE).reciprocal()
        return (gains * squared).expand(-1, -1, -1, -1, 2)

    def _per_level(self, predicted: Tensor) -> Tensor:
        """Numbers (B, N, V * H * D) to (B, V, H, N, D)."""
        return predicted.unflatten(-1, (len(self.strides), self.heads, -1)).permute(0, 2, 3, 1, 4)


class ModulatedAttention(QueryCrossAttention):
    """Cross-attention to every level by itself, modulated by Gaussians (SMCA's co-attention).

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        dropout: on the attention weights.
    """

    def forward(  # type: ignore[override]
        self,
        content: Tensor,
        position: Tensor,
        memory: Memory,
        padding_mask: Tensor | None,
        gaussians: Gaussians,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            content: (B or R * B, N, C).
            position: (B, N, C).
            memory: what is attended to.
            padding_mask: (R * B, S), True on padding.
            gaussians: where the queries look, of as many rows as ``content``.
            attention: collects the weights (R * B, H, N, S), which sum to a level's weight within
                each level, and the log priors (R * B, H, N, S).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        query, key, value = self.project(content, position, memory.tokens, memory.positions)
        gaussians = gaussians.for_rows(query)
        areas = [height * width for height, width in memory.spatial_shapes]
        keys, values = key.split(areas, dim=2), value.split(areas, dim=2)
        masks = [None] * len(areas) if padding_mask is None else padding_mask.split(areas, dim=1)
        parts: list[Tensor] = []
        weights: list[Tensor] = []
        priors: list[Tensor] = []
        for level, (shape, mask) in enumerate(zip(memory.spatial_shapes, masks, strict=True)):
            inputs, dropout = (query, keys[level], values[level]), self.active_dropout
            if attention is None:
                where = gaussians.centers[:, level], gaussians.precision[:, level]
                part = ops.gaussian_attention(*inputs, shape, *where, mask, dropout_p=dropout)
            else:
                prior = gaussians.log_prior(level, shape).expand(-1, self.num_heads, -1, -1)
                priors.append(prior)
                part = attend(*inputs, allow_unpadded(mask), dropout, weights, prior)
            parts.append(part)
        if attention is not None:
            attention.cross_attention.append(torch.cat(gaussians.weigh(weights), dim=-1))
            attention.gaussian.append(torch.cat(priors, dim=-1))
        attended = torch.stack(gaussians.weigh(parts)).sum(0) if len(parts) > 1 else parts[0]
        return repeat_rows(content, query) + self.attn.out_proj(merge_heads(attended))
