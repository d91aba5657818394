"""SMCA's transformer computed as the released implementation does it.

Every attention makes its weights and hands them back; the Gaussians are maps over all queries,
cells, images and heads, made from differences in both coordinates.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectors.attention import QueryCrossAttention, QuerySelfAttention, SelfAttention
from detectors.structures import AttentionMaps, EncoderContext, Memory
from detectors.transformer import Transformer
from projects.smca.attention import Gaussians, ModulatedAttention

BANDWIDTH = 8.0


def attend_eagerly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    dropout: float,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with weights that are made, masked, shifted, normalised and returned one by one.

    Args:
        query: (B, H, N, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        padding: (B, S), True on padding.
        dropout: probability.
        prior: (N, S, B * H), added to the logits.

    Returns:
        (B, N, H * D) and the weights (B, H, N, S).
    """
    batch, heads, count, width = query.shape
    query, key, value = (
        tensor.contiguous().view(batch * heads, -1, width)
        for tensor in (query * width**-0.5, key, value)
    )
    weights = torch.bmm(query, key.transpose(1, 2))
    if padding is not None:
        masked = weights.view(batch, heads, count, -1)
        masked = masked.masked_fill(padding[:, None, None], float("-inf"))
        weights = masked.view(batch * heads, count, -1)
    if prior is not None:
        weights = weights + prior.permute(2, 0, 1)
    weights = F.dropout(weights.softmax(-1), dropout)
    output = torch.bmm(weights, value).view(batch, heads, count, width)
    return output.transpose(1, 2).flatten(2), weights.view(batch, heads, count, -1)


def gaussian_map(gaussians: Gaussians, spatial_shape: tuple[int, int], heads: int) -> Tensor:
    """Log priors (N, S, B * H) of the first level."""
    height, width = spatial_shape
    centers, squares = (
        tensor[:, 0].expand(-1, heads, -1, -1).permute(2, 0, 1, 3).flatten(1, 2)
        for tensor in (gaussians.centers, gaussians.precision * BANDWIDTH)
    )
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([x, y], dim=-1).flatten(0, 1).to(centers)
    grid = grid[:, None].repeat(1, centers.shape[1], 1)
    distance = (centers[:, None] - grid[None]).pow(2)  # (N, S, B * H, 2)
    return -(distance * squares[:, None]).sum(-1).abs() / BANDWIDTH


class _EncoderAttention(SelfAttention):
    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        inputs = self.project(tokens, context.positions)
        output, _ = attend_eagerly(*inputs, context.padding_mask, self.active_dropout)
        return tokens + self.attn.out_proj(output)


class _SelfAttention(QuerySelfAttention):
    def forward(
        self,
        content: Tensor,
        position: Tensor,
        attention_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        output, _ = attend_eagerly(*self.project(content, position), None, self.active_dropout)
        return content + self.attn.out_proj(output)


class _CrossAttention(QueryCrossAttention):
    def forward(  # type: ignore[override]
        self,
        content: Tensor,
        position: Tensor,
        memory: Memory,
        padding_mask: Tensor | None,
        gaussians: Gaussians,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        inputs = self.project(content, position, memory.tokens, memory.positions)
        prior = gaussian_map(gaussians, memory.spatial_shapes[0], self.num_heads)
        output, _ = attend_eagerly(*inputs, padding_mask, self.active_dropout, prior)
        return content + self.attn.out_proj(output)


PEERS: dict[type[nn.Module], type[nn.Module]] = {
    SelfAttention: _EncoderAttention,
    QuerySelfAttention: _SelfAttention,
    ModulatedAttention: _CrossAttention,
}


def as_released(transformer: Transformer) -> Transformer:
    """A copy with the same weights that attends as the released implementation does."""
    transformer = copy.deepcopy(transformer)
    for module in transformer.modules():
        if type(module) in PEERS:
            module.__class__ = PEERS[type(module)]
    return transformer
