"""The encoder, and the container of encoder and decoder with detrex's names and initialisation."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .feed_forward import feed_forward
from .structures import STUDENT, Branch, EncoderContext, FeatureMaps, Memory, Targets


class EncoderLayer(nn.Module):
    """Post-norm layer: self-attention, norm, feed-forward, norm.

    Args:
        attention: module ``(tokens, context) -> tokens`` that includes the residual; it may return
            several branches stacked along the batch axis.
        feedforward_dim: hidden width of the feed-forward network.
        ffn_dropout: dropout of the feed-forward network.
        activation: of the feed-forward network; each layer owns a copy.
    """

    def __init__(
        self,
        attention: nn.Module,
        feedforward_dim: int = 2048,
        ffn_dropout: float = 0.1,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        channels: int = attention.embed_dim  # type: ignore[assignment]
        self.embed_dim = channels
        self.attentions = nn.ModuleList([attention])
        self.ffns = nn.ModuleList(
            [feed_forward(channels, feedforward_dim, ffn_dropout, activation)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis."""
        return self.attentions[0].branches(context)  # type: ignore[operator]

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens of the context's branches to those of :meth:`branches`, each (R * B, S, C)."""
        tokens = self.norms[0](self.attentions[0](tokens, context))
        return self.norms[1](self.ffns[0](tokens))


class Encoder(nn.Module):
    """A stack of equal layers.

    Args:
        layer: prototype, copied ``num_layers`` times.
        num_layers: at least one.
        checkpoint_layers: in training, keep each layer's input alone and compute the layer again
            in the backward pass: less memory for more time.
    """

    def __init__(self, layer: EncoderLayer, num_layers: int = 6, checkpoint_layers: bool = False):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, an encoder needs at least 1")
        if checkpoint_layers not in (False, True):
            raise ValueError(f"checkpoint_layers is {checkpoint_layers!r}, expected True or False")
        self.embed_dim = layer.embed_dim
        self.checkpoint_layers = checkpoint_layers
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))

    def forward(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """Encode all levels as one sequence; ``targets`` reach layers that learn from them."""
        tokens = features.tokens()
        context = EncoderContext(
            features.token_positions(), features.token_padding(), features, targets, (STUDENT,)
        )
        for layer in self.layers:
            arguments = tokens, self.layer_context(tokens, context)
            if self.checkpoint_layers and self.training:
                tokens = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                tokens = layer(*arguments)
            branches = layer.branches(context)  # type: ignore[operator]
            if branches != context.branches:  # else what the context has computed is kept
                context = replace(context, branches=branches)
        return Memory(
            tokens,
            context.padding_mask,
            context.positions,
            features.spatial_shapes,
            context.branches,
        )

    def layer_context(self, tokens: Tensor, context: EncoderContext) -> EncoderContext:
        """What a layer may look at beside its input (R * B, S, C); the same in all layers here."""
        return context


class Transformer(nn.Module):
    """Holds encoder and decoder and initialises both as detrex does.

    Matrices are Xavier-uniform; then submodules with an ``init_weights`` method set their own.
    """

    embed_dim: int

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.embed_dim = encoder.embed_dim  # type: ignore[assignment]
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            init_weights = getattr(module, "init_weights", None)
            if init_weights is not None:
                init_weights()
