"""Deformable attention in encoder and decoder layers, with detrex's parameter names."""

from __future__ import annotations

from torch import Tensor

import ops

from .structures import Branch, EncoderContext, Memory, repeat_rows


class _DeformableAttention(ops.MultiScaleDeformableAttention):
    """Batch-first, with few arguments.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        num_levels: V.
        num_points: P, sampling points per head and level.
        dropout: on the output, before the residual sum.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__(
            embed_dim, num_heads, num_levels, num_points, dropout=dropout, batch_first=True
        )


class DeformableSelfAttention(_DeformableAttention):
    """Self-attention of an encoder layer that samples around each token's own place."""

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis: its input's."""
        return context.branches

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:  # type: ignore[override]
        """Tokens (R * B, S, C) plus their attention output (R * B, S, C)."""
        return super().forward(
            tokens,
            query_pos=repeat_rows(context.positions, tokens),
            key_padding_mask=context.padding_of(tokens),
            reference_points=repeat_rows(context.grid.reference_points, tokens),
            spatial_shapes=context.features.spatial_shapes,
        )


class DeformableCrossAttention(_DeformableAttention):
    """Cross-attention of a decoder layer that samples around reference points or boxes."""

    def forward(  # type: ignore[override]
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        padding_mask: Tensor | None = None,
        sampling: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            content: (B or R * B, N, C).
            position: (B or R * B, N, C).
            references: (B or R * B, N, V, 2 or 4) in the padded coordinates of every level.
            memory: what is sampled.
            padding_mask: (R * B, S), True on padding.
            sampling: receives the locations (R * B, N, H, V, P, 2) and their weights
                (R * B, N, H, V, P).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        shapes = memory.spatial_shapes
        content, position, references = (
            memory.for_branches(tensor) for tensor in (content, position, references)
        )
        if sampling is not None:
            query = content + position
            locations = self.sampling_locations(query, references, shapes)
            sampling.append((locations, self.sampling_weights(query)))
        return super().forward(
            content,
            value=memory.tokens,
            query_pos=position,
            key_padding_mask=padding_mask,
            reference_points=references,
            spatial_shapes=shapes,
        )
