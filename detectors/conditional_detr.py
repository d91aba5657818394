"""Conditional DETR (Meng et al., ICCV 2021): cross-attention with a separate spatial query."""

from __future__ import annotations

import torch
from detrex.layers import MLP, get_sine_pos_embed
from torch import Tensor, nn

from .attention import ConditionalCrossAttention, ConditionalSelfAttention
from .decoder import CheckpointLayers, Decoder
from .detr import DETR
from .feed_forward import feed_forward
from .structures import AttentionMaps, DecoderOutput, Memory, Queries, repeat_rows


class ConditionalDecoderLayer(nn.Module):
    """Post-norm layer: conditional self-attention, conditional cross-attention, feed-forward."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_dropout: float,
        feedforward_dim: int,
        ffn_dropout: float,
        activation: nn.Module | None,
        first_layer: bool,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(
            [
                ConditionalSelfAttention(embed_dim, num_heads, attn_dropout),
                ConditionalCrossAttention(embed_dim, num_heads, attn_dropout, first_layer),
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
        sine: Tensor,
        memory: Memory,
        padding_mask: Tensor | None,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Content (B or R * B, N, C) to (R * B, N, C); ``sine``, likewise, is the spatial query."""
        self_maps = None if attention is None else attention.self_attention
        cross_maps = None if attention is None else attention.cross_attention
        self_attention, cross_attention = self.attentions
        content = self_attention(content, queries.position, queries.attention_mask, self_maps)
        content = self.norms[0](content)
        content = cross_attention(
            content,
            queries.position,
            sine,
            memory.tokens,
            memory.positions,
            padding_mask,
            cross_maps,
        )
        return self.norms[2](self.ffns[0](self.norms[1](content)))


class ConditionalDecoder(Decoder):
    """Decoder whose spatial queries are sine embeddings of reference points, scaled by content.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        attn_dropout: dropout on attention weights.
        feedforward_dim: hidden width of the feed-forward networks.
        ffn_dropout: dropout of the feed-forward networks.
        activation: of the feed-forward networks; each layer owns a copy.
        num_layers: L, at least one.
        temperature: of the sine embedding of reference points, that of the position embedding.
        mask_padding_in_training: keep the cross-attention off padded cells in training too.
            detrex does not, and its weights are trained that way. In evaluation padding is masked
            whenever the memory says where it is.
        checkpoint_layers: see :class:`~detectors.decoder.Decoder`.
    """

    padding_options = ("mask_padding_in_training",)

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        attn_dropout: float = 0.1,
        feedforward_dim: int = 2048,
        ffn_dropout: float = 0.1,
        activation: nn.Module | None = None,
        num_layers: int = 6,
        temperature: int = 10000,
        mask_padding_in_training: bool = False,
        checkpoint_layers: CheckpointLayers = False,
    ):
        super().__init__(embed_dim, num_layers, checkpoint_layers)
        self.temperature = temperature
        self.mask_padding_in_training = mask_padding_in_training
        self.layers = self.stack(
            ConditionalDecoderLayer(
                embed_dim, num_heads, attn_dropout, feedforward_dim, ffn_dropout, activation,
                first_layer=index == 0,
            )
            for index in range(num_layers)
        )  # fmt: skip
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        if num_layers == 1:
            self.query_scale.requires_grad_(False)  # it scales from the second layer on
        self.ref_point_head = MLP(embed_dim, embed_dim, 2, 2)
        self.post_norm_layer = nn.LayerNorm(embed_dim)

    def forward(
        self, queries: Queries, memory: Memory, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Decode all branches at once; states are post-normed."""
        with torch.autocast(queries.position.device.type, enabled=False):
            # eight bits of bfloat16 would move the points by up to half a percent of the image
            references = self.ref_point_head(queries.position).sigmoid()
        sine = get_sine_pos_embed(references, self.embed_dim // 2, self.temperature)
        sine = sine.to(references.dtype)
        padding = self.padding(memory)
        content, states = queries.content, []
        for index, layer in enumerate(self.layers):
            # the first layer's content is still empty and has nothing to say about scale
            spatial = sine
            if index > 0:
                spatial = repeat_rows(sine, content) * self.query_scale(content)
            inputs = content, queries, spatial, memory, padding
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(self.post_norm_layer(content))
        return DecoderOutput(
            torch.stack(states), references[None], memory.branches, attention, queries.denoising
        )

    def padding(self, memory: Memory) -> Tensor | None:
        """Cells (R * B, S) that the cross-attention is kept off."""
        seen = self.follows_training and not self.mask_padding_in_training
        if memory.padding_mask is None or seen:
            return None
        return memory.for_branches(memory.padding_mask)


class ConditionalDETR(DETR):
    """DETR with 2-d reference points predicted from the queries.

    Args:
        detector: the arguments of :class:`~detectors.detr.DETR`.
    """

    zero_offsets = True
