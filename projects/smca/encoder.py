"""SMCA's encoder of several levels: layers that work within each level or over all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from detectors.attention import SelfAttention, allow_unpadded, attend, merge_heads
from detectors.structures import Branch, EncoderContext
from detectors.transformer import Encoder, EncoderLayer

Block = Literal["intra", "multi"]
Share = Literal["ffn_and_attention", "ffn", "attention", "none"]


class LevelAttention(nn.Module):
    """Self-attention within each level, or over all levels as one sequence.

    Args:
        attention: the plain attention, copied for every level with weights of its own.
        block: "intra" or "multi".
        copies: V if every level projects its tokens with its own weights, 1 if all share them.
    """

    def __init__(self, attention: SelfAttention, block: Block, copies: int = 1):
        super().__init__()
        self.within_levels = block == "intra"
        self.parts = nn.ModuleList(copy.deepcopy(attention) for _ in range(copies))

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens (R * B, S, C) plus their attention output (R * B, S, C)."""
        areas, whole = level_areas(context), [tokens.shape[1]]
        owned = areas if len(self.parts) > 1 else whole
        inputs = tokens.split(owned, dim=1)
        projected = [
            part.project(own, position)  # type: ignore[operator]
            for part, own, position in zip(
                self.parts, inputs, context.positions.split(owned, dim=1), strict=True
            )
        ]
        query, key, value = (_join(tensors, dim=2) for tensors in zip(*projected, strict=True))
        spans = areas if self.within_levels else whole
        attended = self._attend(query, key, value, context.padding_of(tokens), spans)
        outputs = merge_heads(attended).split(owned, dim=1)
        return _join(
            [
                own + part.attn.out_proj(output)  # type: ignore[operator, union-attr]
                for part, own, output in zip(self.parts, inputs, outputs, strict=True)
            ],
            dim=1,
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, spans: list[int]
    ) -> Tensor:
        """Attention (B, H, S, C / H) within spans of tokens."""
        masks = [None] * len(spans) if padding is None else padding.split(spans, dim=1)
        dropout: float = self.parts[0].active_dropout  # type: ignore[assignment]
        queries, keys, values = (tensor.split(spans, dim=2) for tensor in (query, key, value))
        parts = [
            attend(queries[i], keys[i], values[i], allow_unpadded(masks[i]), dropout)
            for i in range(len(spans))
        ]
        return _join(parts, dim=2)


class MultiScaleLayer(nn.Module):
    """An encoder layer for several levels.

    Args:
        layer: the plain layer whose parts are taken, with a plain self-attention.
        block: "intra" attends within each level, "multi" over all levels as one sequence.
        num_levels: V.
        share: which weights the levels share: "ffn_and_attention", "ffn", "attention" or "none".
            The norms are shared in any case.
    """

    def __init__(
        self,
        layer: EncoderLayer,
        block: Block,
        num_levels: int = 3,
        share: Share = "ffn_and_attention",
    ):
        super().__init__()
        attention = layer.attentions[0]
        if type(attention) is not SelfAttention:
            raise TypeError(
                f"the layer has {type(attention).__name__}, levels attend by a plain SelfAttention"
            )
        if block not in get_args(Block):
            raise ValueError(f"blocks has {block!r}, expected {get_args(Block)}")
        if share not in get_args(Share):
            raise ValueError(f"share is {share!r}, expected one of {get_args(Share)}")
        attentions = 1 if share in ("ffn_and_attention", "attention") else num_levels
        ffns = 1 if share in ("ffn_and_attention", "ffn") else num_levels
        self.attentions = nn.ModuleList([LevelAttention(attention, block, attentions)])
        self.ffns = nn.ModuleList(copy.deepcopy(layer.ffns[0]) for _ in range(ffns))
        self.norms = copy.deepcopy(layer.norms)

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis: its input's."""
        return context.branches

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens (R * B, S, C) to the same."""
        tokens = self.norms[0](self.attentions[0](tokens, context))
        owned = level_areas(context) if len(self.ffns) > 1 else [tokens.shape[1]]
        parts = zip(self.ffns, tokens.split(owned, dim=1), strict=True)
        return self.norms[1](_join([ffn(part) for ffn, part in parts], dim=1))


class MultiScaleEncoder(Encoder):
    """A stack of layers, each of which works within the levels or over all of them.

    Args:
        layer: prototype of the plain layer, copied for every block.
        blocks: "intra" or "multi" for each layer.
        num_levels: V.
        share: which weights the levels share, see :class:`MultiScaleLayer`.
        checkpoint_layers: see :class:`~detectors.transformer.Encoder`.
    """

    def __init__(
        self,
        layer: EncoderLayer,
        blocks: Sequence[Block] = ("intra", "intra", "multi", "intra", "intra"),
        num_levels: int = 3,
        share: Share = "ffn_and_attention",
        checkpoint_layers: bool = False,
    ):
        super().__init__(layer, len(blocks), checkpoint_layers)
        self.layers = nn.ModuleList(
            MultiScaleLayer(layer, block, num_levels, share) for block in blocks
        )


def level_areas(context: EncoderContext) -> list[int]:
    """Tokens of each level."""
    return [height * width for height, width in context.features.spatial_shapes]


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
