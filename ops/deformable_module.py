"""The attention layer of Deformable DETR around the operator, with detrex's parameters and call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._checks import match_shape
from .deformable_attention import Sizes, multi_scale_deformable_attention
from .dropout import dropout_add
from .linear_layer import Linear, is_plain, linear


class MultiScaleDeformableAttention(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, Eq. 3).

    Few queries on a CPU sample the value before it is projected, see :func:`samples_first`. Layers
    that something else stands in for, an adapter or one with hooks, are always called.

    Args:
        embed_dim: C, the width of queries and values.
        num_heads: H, a divisor of C.
        num_levels: V.
        num_points: P, sampling points per head and level.
        img2col_step: has no effect; detrex's kernel splits the batch by it.
        dropout: on the output, before the residual sum.
        batch_first: whether tokens come as (B, N, C) or, as detrex's default, as (N, B, C).

    Attributes:
        checkpoint_value: in training, keep the projected value, or what is sampled to be projected,
            no longer than the forward pass takes and make it again in the backward pass: less
            memory for more time.
    """

    checkpoint_value = False

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(embed_dim, samples * 2)
        self.attention_weights = Linear(embed_dim, samples)
        self.value_proj = Linear(embed_dim, embed_dim)
        self.output_proj = Linear(embed_dim, embed_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Offsets that point away from the reference, one direction a head, and equal weights."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.repeat(1, self.num_levels, 1, 1).flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Sizes | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Sample the value around each query's reference points.

        Args:
            query: (B, N, C), or (N, B, C) unless ``batch_first``; the next three likewise.
            key: has no effect.
            value: (B, S, C); the query if None.
            identity: what the output is added to; the query, without its position, if None.
            query_pos: added to the query for offsets and weights.
            key_padding_mask: (B, S), True on padding, whose values are zeroed.
            reference_points: (B, N, V, 2) as (x, y) in [0, 1], or (B, N, V, 4) as (x, y, w, h),
                whose offsets are in units of half the box divided by P.
            spatial_shapes: V pairs (h, w); as a tensor on CUDA they cost a synchronisation.
            level_start_index: has no effect; it follows from ``spatial_shapes``.

        Returns:
            ``identity`` plus the attention output, in the query's layout.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        if reference_points is None or spatial_shapes is None:
            missing = "reference_points" if reference_points is None else "spatial_shapes"
            raise ValueError(f"{missing} is None, expected one entry for each of the levels")
        locations = self.sampling_locations(query, reference_points, spatial_shapes)
        inputs = value, key_padding_mask, spatial_shapes, locations, self.sampling_weights(query)
        if self.checkpoint_value and self.training:
            # without randomness: there is no state to set back
            output = checkpoint(
                self._sample, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        else:
            output = self._sample(*inputs)
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return dropout_add(output, identity, self.dropout.p, self.dropout.training)

    def _sample(
        self,
        value: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Sizes,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Project and sample, in the order that is cheaper: sums and projection commute."""
        if not is_plain(self.value_proj) or not samples_first(value, locations):
            value = self.project_value(value, key_padding_mask)
            return multi_scale_deformable_attention(value, spatial_shapes, locations, weights)
        # every head samples all channels, as if it were a query of its own
        present = value.new_ones(*value.shape[:2], 1, 1)
        if key_padding_mask is not None:
            _match_padding(key_padding_mask, value)
            value = value.masked_fill(key_padding_mask[..., None], 0)
            present = present.masked_fill(key_padding_mask[..., None, None], 0)
        points = locations.flatten(1, 2).unsqueeze(2), weights.flatten(1, 2).unsqueeze(2)
        samples = multi_scale_deformable_attention(value.unsqueeze(2), spatial_shapes, *points)
        counts = multi_scale_deformable_attention(present, spatial_shapes, *points)
        samples = samples.unflatten(1, (-1, self.num_heads)).flatten(0, 1)  # (B * N, H, C)
        weight = self.value_proj.weight.unflatten(0, (self.num_heads, -1))  # (H, D, C)
        output = torch.matmul(samples.transpose(0, 1), weight.transpose(1, 2))  # (H, B * N, D)
        output = output.transpose(0, 1).flatten(1).unflatten(0, (-1, locations.shape[1]))
        counts = counts.unflatten(1, (-1, self.num_heads))  # (B, N, H, 1)
        # the bias counts as often as there was a value
        bias = self.value_proj.bias.unflatten(0, (self.num_heads, -1))  # (H, D)
        return output + (counts * bias).flatten(2).to(output.dtype)

    def project_value(
        self, value: Tensor, key_padding_mask: Tensor | None, layer: nn.Module | None = None
    ) -> Tensor:
        """(B, S, H, D) of (B, S, C), zero on padding; ``layer`` stands in for ``value_proj``."""
        layer = layer or self.value_proj
        value = layer(value)
        if key_padding_mask is not None:
            _match_padding(key_padding_mask, value)
            mask = key_padding_mask[..., None]
            if is_plain(layer) and not torch._C._are_functorch_transforms_active():
                value.masked_fill_(mask, 0)  # nothing else has it, nor needs a gradient of it
            else:
                value = value.masked_fill(mask, 0)
        return value.unflatten(-1, (self.num_heads, -1))

    def sampling_locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sizes
    ) -> Tensor:
        """Locations (B, N, H, V, P, 2) of queries (B, N, C); arguments as in :meth:`forward`."""
        axes = "B N V 4" if reference_points.shape[-1] == 4 else "B N V 2"
        sizes = {"B": query.shape[0], "N": query.shape[1], "V": self.num_levels}
        match_shape("reference_points", reference_points, axes, sizes)
        # a row of numbers per query and head: broadcasting along short axes is slow
        centers = self._for_points(reference_points[..., :2])
        layer = self.sampling_offsets
        shared_unit = reference_points.shape[-1] == 2 and is_plain(layer)
        if reference_points.shape[-1] == 4:
            unit = self._for_points(reference_points[..., 2:] * (0.5 / self.num_points))
        else:
            size = torch.as_tensor(spatial_shapes, device=query.device).flip(-1)  # (V, 2), (w, h)
            size = size.clamp(min=1)  # a level without cells has no samples, whatever its unit
            dtype = layer.weight.dtype if shared_unit else centers.dtype
            unit = self._for_points(size.to(dtype).reciprocal())
        if shared_unit:
            # the unit is the same for all queries: scaling the few weights saves a pass over all
            unit = unit.expand(self.num_heads, -1).flatten()
            offsets = linear(query, layer.weight * unit[:, None], layer.bias * unit)
            locations = offsets.unflatten(-1, (self.num_heads, -1)) + centers
        else:
            offsets = layer(query).unflatten(-1, (self.num_heads, -1))
            dtype = torch.promote_types(offsets.dtype, unit.dtype)
            locations = torch.addcmul(centers.to(dtype), offsets.to(dtype), unit.to(dtype))
        return locations.unflatten(-1, (self.num_levels, self.num_points, 2))

    def _for_points(self, per_level: Tensor) -> Tensor:
        """Repeat (..., V, 2) for a head's points: (..., 1, V * P * 2)."""
        repeated = per_level.unsqueeze(-2).expand(*per_level.shape[:-1], self.num_points, 2)
        return repeated.flatten(-3).unsqueeze(-2)

    def sampling_weights(self, query: Tensor, layer: nn.Module | None = None) -> Tensor:
        """Weights (B, N, H, V, P) of queries (B, N, C), or those of another layer's logits."""
        logits = (layer or self.attention_weights)(query).unflatten(-1, (self.num_heads, -1))
        return logits.softmax(-1).unflatten(-1, (self.num_levels, self.num_points))


def samples_first(value: Tensor, locations: Tensor) -> bool:
    """Whether sampling all channels for each head is cheaper than projecting all tokens.

    Projecting takes S * C * C products and keeps S * C numbers for the backward pass; sampling
    takes N * H * V * P * 4 * C products from scattered rows, each as long as three or four in a
    matrix product on a CPU. Elsewhere products are too cheap for this. What is traced, or exported
    for any size, projects, as sizes may change later.

    Args:
        value: (B, S, C), not projected.
        locations: (B, N, H, V, P, 2).
    """
    sizes = *value.shape[1:], *locations.shape[1:]
    unknown = torch.jit.is_tracing() or any(isinstance(size, torch.SymInt) for size in sizes)
    if value.device.type != "cpu" or unknown:
        return False
    corners = 4 * math.prod(locations.shape[1:5])
    return 4 * corners <= value.shape[1] * value.shape[2]


def _match_padding(key_padding_mask: Tensor, value: Tensor) -> None:
    sizes = {"B": value.shape[0], "S": value.shape[1]}
    match_shape("key_padding_mask", key_padding_mask, "B S", sizes)
