"""DETR (Carion et al., ECCV 2020): learned queries decode all objects in parallel."""

from __future__ import annotations

from typing import ClassVar

import torch
from detrex.layers import MLP
from torch import Tensor, nn

from .attention import QueryCrossAttention, QuerySelfAttention
from .decoder import CheckpointLayers, Decoder
from .detector import Detector
from .feed_forward import feed_forward
from .heads import make_classes_rare, make_zero
from .structures import AttentionMaps, DecoderOutput, LearnedQueries, Memory, Queries


class DETRDecoderLayer(nn.Module):
    """Post-norm layer: self-attention, cross-attention, feed-forward, each followed by a norm."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_dropout: float,
        feedforward_dim: int,
        ffn_dropout: float,
        activation: nn.Module | None,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(
            [
                QuerySelfAttention(embed_dim, num_heads, attn_dropout),
                QueryCrossAttention(embed_dim, num_heads, attn_dropout),
            ]
        )
        self.ffns = nn.ModuleList(
            [feed_forward(embed_dim, feedforward_dim, ffn_dropout, activation)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        queries: Queries,
        memory: Memory,
        memory_position: Tensor,
        padding_mask: Tensor | None,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Content (B or R * B, N, C) to (R * B, N, C); ``memory_position`` is (B, S, C)."""
        self_maps = None if attention is None else attention.self_attention
        cross_maps = None if attention is None else attention.cross_attention
        self_attention, cross_attention = self.attentions
        content = self_attention(content, queries.position, queries.attention_mask, self_maps)
        content = self.norms[0](content)
        content = cross_attention(
            content, queries.position, memory.tokens, memory_position, padding_mask, cross_maps
        )
        return self.norms[2](self.ffns[0](self.norms[1](content)))


class DETRDecoder(Decoder):
    """Decoder that knows where its queries look from their learned positions alone.

    Padded cells are never attended to, neither in training nor in evaluation, wherever the memory
    says which they are.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        attn_dropout: dropout on attention weights.
        feedforward_dim: hidden width of the feed-forward networks.
        ffn_dropout: dropout of the feed-forward networks.
        activation: of the feed-forward networks; each layer owns a copy.
        num_layers: L, at least one.
        checkpoint_layers: see :class:`~detectors.decoder.Decoder`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        attn_dropout: float = 0.1,
        feedforward_dim: int = 2048,
        ffn_dropout: float = 0.1,
        activation: nn.Module | None = None,
        num_layers: int = 6,
        checkpoint_layers: CheckpointLayers = False,
    ):
        super().__init__(embed_dim, num_layers, checkpoint_layers)
        self.layers = self.stack(
            DETRDecoderLayer(
                embed_dim, num_heads, attn_dropout, feedforward_dim, ffn_dropout, activation
            )
            for _ in range(num_layers)
        )
        self.post_norm_layer = nn.LayerNorm(embed_dim)

    def forward(
        self, queries: Queries, memory: Memory, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Decode all branches at once; states are post-normed, boxes start from nothing."""
        padding = memory.padding_mask
        if padding is not None:
            padding = memory.for_branches(padding)
        content, states = queries.content, []
        for layer in self.layers:
            inputs = content, queries, memory, memory.positions, padding
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(self.post_norm_layer(content))
        return DecoderOutput(
            torch.stack(states), None, memory.branches, attention, queries.denoising
        )


class SingleScaleDetector(Detector):
    """Detector on one map of the backbone, with heads that all decoder layers share.

    The criterion says what the class head predicts: with focal loss a logit for each class, with
    cross entropy one more for the background.

    Args:
        in_channels: channels of the last of ``in_features``; None where a subclass projects maps.
        embed_dim: C.
        detector: the arguments of :class:`~detectors.detector.Detector`.
    """

    zero_offsets: ClassVar[bool] = True
    """Whether, before any training, boxes are exactly the references that they start from."""

    def __init__(self, *, in_channels: int | None, embed_dim: int, **detector):
        super().__init__(**detector)
        if in_channels is not None:
            self.input_proj = nn.Conv2d(in_channels, embed_dim, kernel_size=1)
        background = self.criterion.loss_class_type == "ce_loss"
        self.class_embed = nn.Linear(embed_dim, self.num_classes + background)
        self.bbox_embed = MLP(embed_dim, embed_dim, 4, 3)
        if not background:
            make_classes_rare(self.class_embed)
        if self.zero_offsets:
            make_zero(self.bbox_embed.layers[-1])

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The last backbone map, projected."""
        return [self.input_proj(features[self.in_features[-1]])]


class DETR(SingleScaleDetector):
    """Single-scale detector whose queries are learned positions with empty content.

    Args:
        embed_dim: C.
        num_queries: N.
        detector: the other arguments of :class:`SingleScaleDetector`.
    """

    zero_offsets = False  # there are no references

    def __init__(self, *, embed_dim: int, num_queries: int, **detector):
        super().__init__(embed_dim=embed_dim, **detector)
        self.query_embed = nn.Embedding(num_queries, embed_dim)

    def learned_queries(self) -> LearnedQueries:
        """Positions with empty content."""
        position = self.query_embed.weight
        return LearnedQueries(torch.zeros_like(position), position)
