"""Attention layers; tokens come first: (N, B, C) unless ``batch_first``."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConditionalCrossAttention", "ConditionalSelfAttention", "MultiheadAttention"]


class MultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with position embeddings, dropout and a residual."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        batch_first: bool = False,
        **kwargs,
    ):
        super().__init__()
        kwargs = dict(batch_first=batch_first, **kwargs)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, attn_drop, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from ``query`` (N, B, C) to ``key`` (S, B, C); without a key, to itself.

        Args:
            query: content of the queries.
            key: content of the keys; default ``query``.
            value: values, which get no position; default ``key``.
            identity: what the result is added to; default ``query``.
            query_pos: position embedding of the queries.
            key_pos: position embedding of the keys; default ``query_pos`` where the shapes agree.
            attn_mask: (N, S), True or -inf where attention is blocked.
            key_padding_mask: (B, S), True on padding.
            kwargs: ignored; other attention layers take more.
        """
        key, value, identity, key_pos = _defaults(
            self, query, key, value, identity, query_pos, key_pos
        )
        attended, _ = self.attn(
            query if query_pos is None else query + query_pos,
            key if key_pos is None else key + key_pos,
            value,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            need_weights=False,
        )
        return identity + self.proj_drop(attended)


class _ConditionalAttention(nn.Module):
    """Projections and attention shared by the two layers of Conditional-DETR."""

    def __init__(self, embed_dim, num_heads, attn_drop, proj_drop, batch_first):
        super().__init__()
        if batch_first:  # as the original, which fails in its first forward pass
            name = type(self).__name__
            raise NotImplementedError(f"{name}: found batch_first=True, expected False")
        self.query_content_proj = nn.Linear(embed_dim, embed_dim)
        self.query_pos_proj = nn.Linear(embed_dim, embed_dim)
        self.key_content_proj = nn.Linear(embed_dim, embed_dim)
        self.key_pos_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.batch_first = batch_first

    def _heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: (N, B, C) to (B, H, N, C / H)."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)

    def _attend(self, query, key, value, attn_mask, key_padding_mask) -> Tensor:
        """Attend per head, (B, H, N, D) to (N, B, C), and project."""
        blocked = _additive(attn_mask, query.dtype)
        padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        padding = _additive(padding, query.dtype)
        if blocked is None or padding is None:
            mask = padding if blocked is None else blocked
        else:
            mask = blocked + padding
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.proj_drop(self.out_proj(out.permute(2, 0, 1, 3).flatten(-2)))


class ConditionalSelfAttention(_ConditionalAttention):
    """Self-attention whose content and position are projected apart, then added."""

    def __init__(
        self, embed_dim, num_heads, attn_drop=0.0, proj_drop=0.0, batch_first=False, **kwargs
    ):
        super().__init__(embed_dim, num_heads, attn_drop, proj_drop, batch_first)

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ) -> Tensor:
        """Attend among the queries; arguments as in :class:`MultiheadAttention`.

        ``query_pos`` is required.
        """
        key, value, identity, key_pos = _defaults(
            self, query, key, value, identity, query_pos, key_pos
        )
        _require_positions(self, query_pos, key_pos)
        q = self.query_content_proj(query) + self.query_pos_proj(query_pos)
        k = self.key_content_proj(key) + self.key_pos_proj(key_pos)
        q, k, v = map(self._heads, (q, k, self.value_proj(value)))
        return identity + self._attend(q, k, v, attn_mask, key_padding_mask)


class ConditionalCrossAttention(_ConditionalAttention):
    """Cross-attention that matches content with content and position with position.

    In each head, queries and keys are [content, position], so that the two dot products add up.
    """

    def __init__(
        self, embed_dim, num_heads, attn_drop=0.0, proj_drop=0.0, batch_first=False, **kwargs
    ):
        super().__init__(embed_dim, num_heads, attn_drop, proj_drop, batch_first)
        self.query_pos_sine_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        query_sine_embed=None,
        is_first_layer=False,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ) -> Tensor:
        """Attend from the queries to the memory; arguments as in :class:`MultiheadAttention`.

        Args:
            query: see there, as the arguments that are not listed here.
            query_sine_embed: (N, B, C) sine embedding of the queries' reference points.
            is_first_layer: whether positions are also added to the content; other layers may set
                ``query_pos_proj`` to None.
        """
        key, value, identity, key_pos = _defaults(
            self, query, key, value, identity, query_pos, key_pos
        )
        _require_positions(self, query_pos, key_pos)
        q_content, k_content = self.query_content_proj(query), self.key_content_proj(key)
        k_position = self.key_pos_proj(key_pos)
        if is_first_layer:
            q_content = q_content + self.query_pos_proj(query_pos)
            k_content = k_content + k_position
        q_position = self.query_pos_sine_proj(query_sine_embed)
        q = torch.cat((self._heads(q_content), self._heads(q_position)), dim=-1)
        k = torch.cat((self._heads(k_content), self._heads(k_position)), dim=-1)
        v = self._heads(self.value_proj(value))
        return identity + self._attend(q, k, v, attn_mask, key_padding_mask)


def _defaults(layer, query, key, value, identity, query_pos, key_pos):
    """Fill in key, value, identity and key_pos where they are not given."""
    key = query if key is None else key
    value = key if value is None else value
    identity = query if identity is None else identity
    if key_pos is None and query_pos is not None:
        if query_pos.shape == key.shape:
            key_pos = query_pos
        else:
            warnings.warn(
                f"{type(layer).__name__}: key_pos is missing and query_pos does not fit the key",
                stacklevel=3,
            )
    return key, value, identity, key_pos


def _require_positions(layer, query_pos, key_pos) -> None:
    for name, position in (("query_pos", query_pos), ("key_pos", key_pos)):
        assert position is not None, f"{type(layer).__name__}: found no {name}, expected a tensor"


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask that is True where attention is blocked into one that is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
