"""What all decoders have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ops

from .feed_forward import checkpoint_feedforward
from .padding import PaddingRules
from .structures import AttentionMaps

CheckpointLayers = bool | Literal["wide"]


class Decoder(PaddingRules):
    """A stack of layers that a subclass makes by :meth:`stack` and runs by :meth:`run_layer`.

    Args:
        embed_dim: C.
        num_layers: L, at least one.
        checkpoint_layers: in training, keep each layer's input alone and compute the layer again
            in the backward pass: less memory for more time. ``"wide"`` does so with what takes
            the most memory alone: hidden layers of feed-forward networks, and what deformable
            attention projects or samples.
    """

    layers: nn.ModuleList

    def __init__(
        self, embed_dim: int, num_layers: int, checkpoint_layers: CheckpointLayers = False
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, a decoder needs at least 1")
        self.embed_dim = embed_dim
        self.checkpoint_layers = checkpoint_layers

    @property
    def checkpoint_layers(self) -> CheckpointLayers:
        """What the backward pass computes again; it may be set at any time."""
        return self._checkpoint_layers

    @checkpoint_layers.setter
    def checkpoint_layers(self, value: CheckpointLayers) -> None:
        if value not in (False, True, "wide"):
            raise ValueError(f"checkpoint_layers is {value!r}, expected True, False or 'wide'")
        self._checkpoint_layers = value
        checkpoint_wide(self, value == "wide")

    def stack(self, layers: Iterable[nn.Module]) -> nn.ModuleList:
        """The layers as a list, prepared for what ``checkpoint_layers`` says."""
        stacked = nn.ModuleList(layers)
        checkpoint_wide(stacked, self.checkpoint_layers == "wide")
        return stacked

    def run_layer(
        self, layer: nn.Module, *arguments: Any, attention: AttentionMaps | None
    ) -> Tensor:
        """Content (R * B, N, C) that a layer makes of its arguments.

        Args:
            layer: one of the layers.
            arguments: all of the layer's but ``attention``.
            attention: collects its attention maps.
        """
        if self._checkpoint_layers in (False, "wide") or not self.training:
            return layer(*arguments, attention=attention)
        content, maps = checkpoint(_run, layer, arguments, attention, use_reentrant=False)
        if attention is not None:
            attention.extend(maps)
        return content


def checkpoint_wide(module: nn.Module, again: bool) -> None:
    """Say whether hidden layers in a module, and what attention samples, are computed again."""
    checkpoint_feedforward(module, again)
    for attention in module.modules():
        if isinstance(attention, ops.MultiScaleDeformableAttention):
            attention.checkpoint_value = again


def _run(
    layer: nn.Module, arguments: tuple, attention: AttentionMaps | None
) -> tuple[Tensor, AttentionMaps | None]:
    """A layer's content and maps, apart from those of others: the backward pass runs it again."""
    maps = None if attention is None else attention.new()
    return layer(*arguments, attention=maps), maps
