"""A transformer's feed-forward network, with what a step need not keep left out."""

from __future__ import annotations

import copy

import torch
from detrex.layers import FFN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ops
from ops.feed_forward import is_one_operator
from ops.watched import is_watched

from .lean import LeanPReLU, ReLUDropout

TOKENS_AT_ONCE = 8192
"""Where hidden layers are computed again, so many tokens have theirs at the same time. They also
draw their dropout apart."""

ONE_OPERATOR = [
    nn.Sequential,
    nn.Sequential,
    ops.Linear,
    ReLUDropout,
    nn.Identity,
    ops.Linear,
    nn.Dropout,
]
"""Types of the modules that :func:`feed_forward` makes by default, in order."""


class FeedForward(FFN):
    """detrex's network, whose last dropout and residual sum are one operator.

    Attributes:
        checkpoint_hidden: in training, keep no hidden layer and compute it again in the backward
            pass; see :func:`checkpoint_feedforward`.
    """

    checkpoint_hidden = False

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """Tokens (..., C) to ``identity``, by default ``x``, plus the network's output (..., C)."""
        if self.checkpoint_hidden and self.training:
            output = self._checkpointed(x)
        else:
            output = self._in_one(x) if self._may_be_one(x) else self._in_turn(x)
        dropout = self.layers[-1]
        identity = x if identity is None else identity
        return ops.dropout_add(output, identity, dropout.p, dropout.training)

    def _checkpointed(self, x: Tensor) -> Tensor:
        """Tokens a part at a time, so that the backward pass never has the whole hidden layer."""
        tokens = x.reshape(-1, x.shape[-1])
        # a compiled graph would be made anew for every number of parts
        count = len(tokens) if torch.compiler.is_compiling() else TOKENS_AT_ONCE
        parts = [self._part(part) for part in tokens.split(max(1, count))]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(x)

    def _part(self, tokens: Tensor) -> Tensor:
        if self._may_be_one(tokens):
            return self._in_one(tokens, keep_hidden=False)
        # computing again stops at the hidden layer: nothing behind it is kept
        preserve = self.layers[-1].p > 0
        return checkpoint(self._in_turn, tokens, use_reentrant=False, preserve_rng_state=preserve)

    def _may_be_one(self, x: Tensor) -> bool:
        """Whether one operator does what the layers do, and nobody looks at them."""
        return (
            [type(module) for module in self.layers.modules()] == ONE_OPERATOR
            and is_one_operator(x, self.layers[0][0].weight, self.layers[1].weight)
            and not is_watched(*self.layers.modules())
        )

    def _in_one(self, x: Tensor, keep_hidden: bool = True) -> Tensor:
        (first, activation, _), second = self.layers[:2]
        weights = (first.weight, first.bias), (second.weight, second.bias)
        drop = activation.p, activation.training
        return ops.relu_feed_forward(x, *weights, *drop, keep_hidden)

    def _in_turn(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


def checkpoint_feedforward(module: nn.Module, again: bool = True) -> None:
    """Say whether the feed-forward networks in a module compute their hidden layer again.

    A hidden layer is the widest thing that a step keeps. To compute it adds a sixth to the
    multiply-adds that a step spends on the network.
    """
    for network in module.modules():
        if isinstance(network, FeedForward):
            network.checkpoint_hidden = again


def feed_forward(
    embed_dim: int, feedforward_dim: int, dropout: float, activation: nn.Module | None
) -> FeedForward:
    """A feed-forward network with residual and its own copy of the activation, by default ReLU."""
    # nothing else needs what the linear layer before it returns
    if activation is None:
        hidden: nn.Module = ReLUDropout(dropout, inplace=True)
    else:
        hidden = copy.deepcopy(activation)
        if type(hidden) is nn.PReLU:
            hidden.__class__ = LeanPReLU
    network = FeedForward(embed_dim, feedforward_dim, ffn_drop=dropout, activation=hidden)
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = ops.Linear
    if activation is None:
        network.layers[0][2] = nn.Identity()  # what drops is the activation
    return network
