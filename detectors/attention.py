"""Multi-head attention, batch-first, with detrex's parameter names.

Every module takes the fused path (:func:`torch.nn.functional.scaled_dot_product_attention`) unless
its attention weights are asked for, and returns the residual sum as detrex's modules do. Rows are
R * B, or B where all branches are equal; what has fewer is repeated as late as possible.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import Linear, linear

from .late_maps import LateMap, LateMaps
from .lean import lean_attention
from .structures import Branch, EncoderContext, repeat_rows


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    dropout_p: float = 0.0,
    maps: list[Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        allowed: bool, broadcastable to (B, H, N, S), True where attending is allowed.
        dropout_p: dropout on the attention weights.
        maps: receives the attention weights (B, H, N, S), taken before dropout; :class:`LateMaps`
            what they are made of.
        bias: added to the logits, broadcastable to (B, H, N, S).

    Returns:
        (B, H, N, Dv).
    """
    if isinstance(maps, LateMaps):
        shape = torch.Size((*query.shape[:-1], key.shape[-2]))
        maps.append(LateMap(partial(_precise_weights, query, key, allowed, bias), shape))
    if maps is None or isinstance(maps, LateMaps):
        if bias is None and query.device.type == "cpu":
            return lean_attention(query, key, value, allowed, dropout_p)
        mask = allowed
        if bias is not None:
            mask = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
            mask = mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p
        )
    weights = attention_weights(query, key, allowed, bias)
    maps.append(weights)
    return F.dropout(weights, dropout_p) @ value


def attention_weights(
    query: Tensor, key: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Weights (B, H, N, S) of scaled dot-product attention; arguments as in :func:`attend`."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1)


def _precise_weights(
    query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None, rows: slice
) -> Tensor:
    """Rows of the weights in float32 at least, whatever precision the step works in."""
    precise = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return attention_weights(
            query[rows].to(precise),
            key[rows].to(precise),
            _rows_of(allowed, rows),
            _rows_of(bias, rows),
        )


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of what is broadcastable to (B, H, N, S)."""
    if mask is None or mask.dim() < 4 or mask.shape[0] == 1:
        return mask
    return mask[rows]


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, C / H)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H * D)."""
    return heads.transpose(1, 2).flatten(2)


def allow_unpadded(padding_mask: Tensor | None) -> Tensor | None:
    """Turn a padding mask (B, S), True on padding, into ``allowed`` of :func:`attend`."""
    return None if padding_mask is None else ~padding_mask[:, None, None, :]


class PackedProjection(nn.Module):
    """Parameters of a standard attention: packed q, k, v rows and the output projection."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class _PackedAttention(nn.Module):
    """What standard self- and cross-attention have in common."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.attn = PackedProjection(embed_dim)

    @property
    def active_dropout(self) -> float:
        """The dropout probability of the current mode."""
        return self.dropout if self.training else 0.0


class _PackedSelfAttention(_PackedAttention):
    """Standard self-attention; positions enter queries and keys, not values."""

    def project(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (R * B, H, S, C / H) of tokens (R * B, S, C)."""
        rows, channels = self.attn.in_proj_weight, self.embed_dim
        bias = self.attn.in_proj_bias
        positions = repeat_rows(positions, tokens)
        positioned = linear(tokens + positions, rows[: 2 * channels], bias[: 2 * channels])
        query, key = positioned.split(channels, dim=-1)
        value = linear(tokens, rows[2 * channels :], bias[2 * channels :])
        heads = self.num_heads
        return split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)


class SelfAttention(_PackedSelfAttention):
    """Self-attention of an encoder layer; positions enter queries and keys, not values.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        dropout: on the attention weights.
    """

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis: its input's."""
        return context.branches

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens (R * B, S, C) plus their attention output (R * B, S, C)."""
        query, key, value = self.project(tokens, context.positions)
        attended = attend(
            query, key, value, allow_unpadded(context.padding_of(tokens)), self.active_dropout
        )
        return tokens + self.attn.out_proj(merge_heads(attended))


class QuerySelfAttention(_PackedSelfAttention):
    """Self-attention of a decoder layer; positions enter queries and keys, not values.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        dropout: on the attention weights.
    """

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        attention_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend among queries.

        Args:
            content: (R * B, N, C).
            position: (B or R * B, N, C).
            attention_mask: (N, N), True where attending is forbidden.
            maps: receives the attention weights (R * B, H, N, N).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        allowed = None if attention_mask is None else ~attention_mask
        query_key_value = self.project(content, position)
        attended = attend(*query_key_value, allowed, self.active_dropout, maps)
        return content + self.attn.out_proj(merge_heads(attended))


class QueryCrossAttention(_PackedAttention):
    """Cross-attention of a decoder layer; positions enter queries and keys, not values.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        dropout: on the attention weights.
    """

    def project(
        self, content: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R * B, H, N, C / H), keys and values (R * B, H, S, C / H)."""
        memory_position = repeat_rows(memory_position, memory)
        inputs = (content + repeat_rows(position, content), memory + memory_position, memory)
        rows, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        query, key, value = (
            split_heads(linear(tokens, row, bias), self.num_heads)
            for tokens, row, bias in zip(inputs, rows, biases, strict=True)
        )
        return repeat_rows(query, memory), key, value

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        padding_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            content: (B or R * B, N, C).
            position: (B or R * B, N, C).
            memory: (R * B, S, C).
            memory_position: (B or R * B, S, C).
            padding_mask: (R * B, S), True on padding.
            maps: receives the attention weights (R * B, H, N, S).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        query_key_value = self.project(content, position, memory, memory_position)
        allowed = allow_unpadded(padding_mask)
        attended = attend(*query_key_value, allowed, self.active_dropout, maps)
        return repeat_rows(content, memory) + self.attn.out_proj(merge_heads(attended))


class _ConditionalAttention(nn.Module):
    """Projections that content and position have apart, in self- and cross-attention alike."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content_proj = Linear(embed_dim, embed_dim)
        self.query_pos_proj = Linear(embed_dim, embed_dim)
        self.key_content_proj = Linear(embed_dim, embed_dim)
        self.key_pos_proj = Linear(embed_dim, embed_dim)
        self.value_proj = Linear(embed_dim, embed_dim)
        self.out_proj = Linear(embed_dim, embed_dim)


class ConditionalSelfAttention(_ConditionalAttention):
    """Decoder self-attention with content and position projected apart (Conditional DETR)."""

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        attention_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend among queries.

        Args:
            content: (R * B, N, C).
            position: (B or R * B, N, C).
            attention_mask: (N, N), True where attending is forbidden.
            maps: receives the attention weights (R * B, H, N, N).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        query, key = self.query_content_proj(content), self.key_content_proj(content)
        query = query + repeat_rows(self.query_pos_proj(position), content)
        key = key + repeat_rows(self.key_pos_proj(position), content)
        attended = attend(
            split_heads(query, self.num_heads),
            split_heads(key, self.num_heads),
            split_heads(self.value_proj(content), self.num_heads),
            None if attention_mask is None else ~attention_mask,
            self.dropout if self.training else 0.0,
            maps,
        )
        return content + self.out_proj(merge_heads(attended))


class ConditionalCrossAttention(_ConditionalAttention):
    """Cross-attention with content and spatial parts concatenated (Conditional DETR, Eq. 3).

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        dropout: on the attention weights.
        first_layer: the first decoder layer also adds the position embeddings to the content part.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, first_layer: bool = False
    ):
        super().__init__(embed_dim, num_heads, dropout)
        self.first_layer = first_layer
        if not first_layer:
            del self.query_pos_proj
        self.query_pos_sine_proj = Linear(embed_dim, embed_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        sine: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        padding_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            content: (B or R * B, N, C).
            position: (B or R * B, N, C) learned position embedding of the queries.
            sine: (B or R * B, N, C) transformed sine embedding of the reference points.
            memory: (R * B, S, C).
            memory_position: (B or R * B, S, C).
            padding_mask: (R * B, S), True on padding.
            maps: receives the attention weights (R * B, H, N, S).

        Returns:
            Content plus attention output, (R * B, N, C).
        """
        query, key = self.query_content_proj(content), self.key_content_proj(memory)
        spatial_key = repeat_rows(self.key_pos_proj(memory_position), memory)
        if self.first_layer:
            query = query + repeat_rows(self.query_pos_proj(position), query)
            key = key + spatial_key
        spatial_query = repeat_rows(self.query_pos_sine_proj(sine), query)
        attended = attend(
            repeat_rows(self._join(query, spatial_query), memory),
            self._join(key, spatial_key),
            split_heads(self.value_proj(memory), self.num_heads),
            allow_unpadded(padding_mask),
            self.dropout if self.training else 0.0,
            maps,
        )
        return repeat_rows(content, memory) + self.out_proj(merge_heads(attended))

    def _join(self, content: Tensor, spatial: Tensor) -> Tensor:
        """Concatenate the two parts within each head: (B, H, N, 2 * C / H)."""
        parts = (split_heads(content, self.num_heads), split_heads(spatial, self.num_heads))
        return torch.cat(parts, dim=-1)


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Refuse a number of heads that does not divide the embedding."""
    if embed_dim % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
