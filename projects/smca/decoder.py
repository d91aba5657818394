"""SMCA's decoder: queries look around centres that they predict (Gao et al., ICCV 2021)."""

from __future__ import annotations

import copy

import torch
from detrex.layers import MLP
from torch import Tensor, nn

from detectors.decoder import CheckpointLayers, Decoder
from detectors.detr import DETRDecoderLayer
from detectors.structures import AttentionMaps, DecoderOutput, Memory, Queries

from .attention import Gaussians, ModulatedAttention, Modulation


class SMCADecoderLayer(DETRDecoderLayer):
    """DETR's layer with a modulated cross-attention; it predicts its own Gaussians."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_dropout: float,
        feedforward_dim: int,
        ffn_dropout: float,
        activation: nn.Module | None,
        modulation: Modulation,
    ):
        super().__init__(
            embed_dim, num_heads, attn_dropout, feedforward_dim, ffn_dropout, activation
        )
        self.attentions[1] = ModulatedAttention(embed_dim, num_heads, attn_dropout)
        self.modulation = modulation

    def forward(  # type: ignore[override]
        self,
        content: Tensor,
        queries: Queries,
        memory: Memory,
        padding_mask: Tensor | None,
        gaussians: Gaussians,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Content (B or R * B, N, C) to (R * B, N, C)."""
        self_maps = None if attention is None else attention.self_attention
        self_attention, cross_attention = self.attentions
        content = self_attention(content, queries.position, queries.attention_mask, self_maps)
        content = cross_attention(
            self.norms[0](content),
            queries.position,
            memory,
            padding_mask,
            gaussians,
            attention,
        )
        return self.norms[2](self.ffns[0](self.norms[1](content)))


class SMCADecoder(Decoder):
    """Decoder whose queries look around an initial centre, on one level or several.

    The first layer's input predicts the centre, which all layers and all boxes start from. Padded
    cells are never attended to, neither in training nor in evaluation, wherever the memory says
    which they are.

    Args:
        modulation: prototype of what predicts the Gaussians, copied for every layer.
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
        modulation: Modulation,
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
        self.strides = modulation.strides
        self.center_head = MLP(embed_dim, embed_dim, 2, 3)
        self.layers = self.stack(
            SMCADecoderLayer(
                embed_dim, num_heads, attn_dropout, feedforward_dim, ffn_dropout, activation,
                copy.deepcopy(modulation),
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.post_norm_layer = nn.LayerNorm(embed_dim)

    def forward(
        self, queries: Queries, memory: Memory, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Decode all branches at once; states are post-normed, boxes start from the centres."""
        if memory.image_sizes is None:
            raise ValueError("memory.image_sizes is None, SMCA's centres are in pixels")
        if len(memory.spatial_shapes) != len(self.strides):
            raise ValueError(
                f"the memory has {len(memory.spatial_shapes)} levels, "
                f"the decoder's modulation has strides {self.strides}"
            )
        sizes, padding = memory.image_sizes.flip(-1)[:, None], memory.padding_mask
        if padding is not None:
            padding = memory.for_branches(padding)
        content, centers, states = queries.content, None, []
        for layer in self.layers:
            # in bfloat16, a centre on a map of 40 cells would be off by up to an eighth of a cell
            with torch.autocast(content.device.type, enabled=False):
                modulation: Modulation = layer.modulation  # type: ignore[assignment]
                observed = modulation.observe(content, queries.position)
                if centers is None:
                    centers = self.center_head(observed).sigmoid()
                gaussians = modulation(observed, centers * sizes)
            inputs = content, queries, memory, padding, gaussians
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(self.post_norm_layer(content))
        assert centers is not None
        return DecoderOutput(
            torch.stack(states), centers[None], memory.branches, attention, queries.denoising
        )
