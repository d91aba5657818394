"""A decoder layer of AdaMixer: queries sample a feature pyramid in 3-d and mix what they find.

A query's position is (x, y, z, r): centre, scale z = log2 sqrt(w h) and aspect ratio
r = log2(h / w) of its box, in pixels of the unpadded image. In the pyramid z is the axis of the
levels, which lie at the logarithm of their strides.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from detrex.layers import box_cxcywh_to_xyxy, get_sine_pos_embed
from torch import Tensor, nn

import ops

from .attention import PackedProjection, attend, check_heads, merge_heads, split_heads
from .feed_forward import feed_forward
from .structures import AttentionMaps

# --- positions ----------------------------------------------------------------------------------


def whole_image(image_sizes: Tensor) -> Tensor:
    """Positions (..., 4) of boxes that cover images of sizes (..., 2) as (h, w)."""
    height, width = image_sizes.unbind(-1)
    scale = (height * width).log2() / 2
    return torch.stack([width / 2, height / 2, scale, (height / width).log2()], dim=-1)


def box_sizes(position: Tensor) -> Tensor:
    """Widths and heights (..., 2) of positions (..., 4)."""
    _, _, scale, ratio = position.unbind(-1)
    return torch.stack([scale - ratio / 2, scale + ratio / 2], dim=-1).exp2()


def to_boxes(position: Tensor) -> Tensor:
    """Boxes (..., 4) cxcywh in pixels of positions (..., 4)."""
    return torch.cat([position[..., :2], box_sizes(position)], dim=-1)


def refine(position: Tensor, offsets: Tensor) -> Tensor:
    """Move positions (..., 4) by offsets (..., 4), those of the centre in units of the scale."""
    scale = position[..., 2:3].exp2()
    return position + torch.cat([offsets[..., :2] * scale, offsets[..., 2:]], dim=-1)


def embed_positions(position: Tensor, channels: int) -> Tensor:
    """Sine embedding (..., C) of positions (..., 4)."""
    units = position.new_tensor([1000.0, 1000.0, 1.0, 1.0]) * (2 * math.pi)  # given as turns
    sine = get_sine_pos_embed(position / units, channels // 4, exchange_xy=False)
    return sine.to(position.dtype)


def covered_share(position: Tensor) -> Tensor:
    """Share of every box that every other one covers, (B, N, N), of positions (B, N, 4)."""
    low, high = box_cxcywh_to_xyxy(to_boxes(position)).split(2, dim=-1)
    sides = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(
        low[:, :, None], low[:, None]
    )
    area = (high - low).prod(-1, keepdim=True).clamp(min=1e-6)
    return sides.clamp(min=0).prod(-1) / area


# --- what a layer is made of --------------------------------------------------------------------


class Pyramid:
    """The memory's levels as a volume that can be sampled anywhere.

    Args:
        tokens: (B, S, C).
        spatial_shapes: (h, w) of every level.
        strides: of every level, in pixels.
        dtype: of points and weights.

    Attributes:
        extents: pixels that the levels' cells cover, (V, 2) as (x, y), whatever the image's size.
        depths: where the levels lie on the z axis, (V,).
    """

    def __init__(
        self,
        tokens: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
    ):
        extents = [
            (width * stride, height * stride)
            for (height, width), stride in zip(spatial_shapes, strides, strict=True)
        ]
        self.tokens = tokens
        self.spatial_shapes = spatial_shapes
        self.extents = torch.tensor(extents, dtype=dtype, device=tokens.device)
        self.depths = torch.tensor(strides, dtype=dtype, device=tokens.device).log2()

    def level_weights(self, points: Tensor) -> Tensor:
        """How much points (..., 3) take of every level, (..., V): a softmax of the distance."""
        distance = points[..., 2:] - self.depths
        return (distance.square() / -2).softmax(-1)

    def sample(self, points: Tensor, sampling: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Interpolate between cells and between levels.

        Args:
            points: (B, N, G, P, 3) as (x, y, z); those of a group see its share of the channels.
            sampling: receives locations (B, N, G, V, P, 2) and weights (B, N, G, V, P).

        Returns:
            (B, N, G, P, C / G).
        """
        queries, groups, count = points.shape[1:4]
        locations = points[..., None, :2] / self.extents  # (B, N, G, P, V, 2)
        weights = self.level_weights(points)
        if sampling is not None:
            sampling.append((locations.transpose(3, 4), weights.transpose(3, 4)))
        # the operator adds up a query's points, so every point is a query of its own
        samples = ops.multi_scale_deformable_attention(
            self.tokens.unflatten(-1, (groups, -1)),
            self.spatial_shapes,
            locations.transpose(2, 3).flatten(1, 2)[..., None, :],
            weights.transpose(2, 3).flatten(1, 2)[..., None],
        )
        samples = samples.unflatten(-1, (groups, -1)).unflatten(1, (queries, count))
        return samples.transpose(2, 3)


class BoxSelfAttention(nn.Module):
    """Self-attention whose heads look more, or less, at queries that cover the query's own box.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.attn = PackedProjection(embed_dim)
        self.iof_tau = nn.Parameter(torch.empty(num_heads).uniform_(0, 4))

    def forward(
        self,
        content: Tensor,
        covered: Tensor,
        attention_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend among queries.

        Args:
            content: (B, N, C), positions included.
            covered: (B, N, N), the share of each query's box that the others cover.
            attention_mask: (N, N), True where attending is forbidden.
            maps: receives the attention weights (B, H, N, N).

        Returns:
            Content plus attention output, (B, N, C).
        """
        projected = F.linear(content, self.attn.in_proj_weight, self.attn.in_proj_bias)
        query, key, value = (split_heads(t, self.num_heads) for t in projected.chunk(3, dim=-1))
        bias = self.iof_tau[:, None, None] * (covered + 1e-7).log()[:, None]
        allowed = None if attention_mask is None else ~attention_mask
        attended = attend(query, key, value, allowed, maps=maps, bias=bias)
        return content + self.attn.out_proj(merge_heads(attended))


class AdaptiveMixing(nn.Module):
    """Mix a query's samples, channels first and points then, with matrices that it makes itself.

    Args:
        embed_dim: C.
        num_groups: G, a divisor of C; each has matrices of its own.
        in_points: P, samples of a group.
        out_points: what they become.
    """

    def __init__(self, embed_dim: int, num_groups: int, in_points: int, out_points: int):
        super().__init__()
        channels = embed_dim // num_groups
        self.sizes = [channels * channels, out_points * in_points]
        self.num_groups = num_groups
        self.parameter_generator = nn.Linear(embed_dim, num_groups * sum(self.sizes))
        self.out_proj = nn.Linear(num_groups * out_points * channels, embed_dim)

    def forward(self, content: Tensor, samples: Tensor) -> Tensor:
        """Content (B, N, C) plus what is made of the samples (B, N, G, P, C / G)."""
        points, channels = samples.shape[-2:]
        parameters = self.parameter_generator(content).unflatten(-1, (self.num_groups, -1))
        of_channels, of_points = parameters.split(self.sizes, dim=-1)
        mixed = samples @ of_channels.unflatten(-1, (channels, channels))
        mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
        mixed = of_points.unflatten(-1, (-1, points)) @ mixed
        mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
        return content + self.out_proj(mixed.flatten(2))


class AdaMixerLayer(nn.Module):
    """Post-norm layer: self-attention, sampling and mixing, feed-forward."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        num_groups: int,
        in_points: int,
        out_points: int,
    ):
        super().__init__()
        self.num_groups = num_groups
        self.attention = BoxSelfAttention(embed_dim, num_heads)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.sampling_offsets = nn.Linear(embed_dim, num_groups * in_points * 3)
        self.mixing = AdaptiveMixing(embed_dim, num_groups, in_points, out_points)
        self.mixing_norm = nn.LayerNorm(embed_dim)
        self.ffn = feed_forward(embed_dim, feedforward_dim, 0.0, None)
        self.ffn_norm = nn.LayerNorm(embed_dim)

    def init_weights(self) -> None:
        """Sample within the box, a level below its scale; mix at random, alike for all queries."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                reset_linear(module)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.mixing.parameter_generator.weight)
        bias = self.sampling_offsets.bias.data.view(self.num_groups, -1, 3)
        points = bias.shape[1]
        nn.init.uniform_(bias, -0.5, 0.5)
        nn.init.constant_(bias[..., 2], -1.0)
        side = math.isqrt(points)
        if side * side == points:
            cells = (torch.arange(side, dtype=bias.dtype) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(cells, cells)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        pyramid: Pyramid,
        attention_mask: Tensor | None = None,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Content (R * B, N, C) to the same; ``position`` is (R * B, N, 4)."""
        self_maps = None if attention is None else attention.self_attention
        sampling = None if attention is None else attention.sampling
        place = position.detach()
        content = content + embed_positions(place, content.shape[-1])
        content = self.attention(content, covered_share(place), attention_mask, self_maps)
        content = self.attention_norm(content)
        samples = pyramid.sample(self.sampling_points(content, position), sampling)
        content = self.mixing_norm(self.mixing(content, samples))
        return self.ffn_norm(self.ffn(content))

    def sampling_points(self, content: Tensor, position: Tensor) -> Tensor:
        """Points (B, N, G, P, 3), their offsets from the position in units of the box's size."""
        with torch.autocast(content.device.type, enabled=False):
            # eight bits of bfloat16 would move the points by several pixels
            offsets = self.sampling_offsets(content.to(position.dtype))
        offsets = offsets.unflatten(-1, (self.num_groups, -1, 3))
        center, depth = position[:, :, None, None, :2], position[:, :, None, None, 2:3]
        moved = center + offsets[..., :2] * box_sizes(position)[:, :, None, None]
        return torch.cat([moved, depth + offsets[..., 2:]], dim=-1)


def reset_linear(layer: nn.Linear) -> None:
    """Xavier-uniform weights; biases random, as they come by default."""
    layer.reset_parameters()
    nn.init.xavier_uniform_(layer.weight)
