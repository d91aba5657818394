"""What a knowledge-sharing attention has in training only: teacher features and their branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectors.structures import STUDENT, Branch, EncoderContext, repeat_rows
from ops import Linear

from .foreground import Interpolation, foreground_mask

BranchName = Literal["share_v", "share_a"]
BRANCH_NAMES: tuple[BranchName, ...] = ("share_v", "share_a")
"""In the order in which they are stacked."""


class ForegroundMLP(nn.Module):
    """Teacher features by a linear layer and ReLU on foreground tokens only (sMLP, Eq. 10)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = Linear(embed_dim, embed_dim)

    def init_weights(self) -> None:
        """PyTorch's default for linear layers, not the transformer's Xavier."""
        self.linear.reset_parameters()

    def forward(self, tokens: Tensor, foreground: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Tokens (B, S, C), foreground (B, S) and padding (B, S) to teacher features (B, S, C)."""
        if padding_mask is not None:
            foreground = foreground & ~padding_mask
        return torch.where(foreground.unsqueeze(-1), F.relu(self.linear(tokens)), tokens)


class ForegroundMark(nn.Module):
    """Teacher features by writing the foreground mask into the last channel (Eq. 9)."""

    def forward(self, tokens: Tensor, foreground: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Tokens (B, S, C) and foreground (B, S) to teacher features (B, S, C)."""
        return torch.cat([tokens[..., :-1], foreground.unsqueeze(-1).to(tokens.dtype)], dim=-1)


class Teacher(nn.Module):
    """Everything that exists in training only: dropping this module leaves the plain attention.

    Args:
        features: makes teacher features of ``(tokens, foreground, padding_mask)``.
        branches: which teachers; both make the triple attention, one a dual attention.
        aux_loss: supervise the teachers after every decoder layer (Eq. 11 read literally); the
            released code supervises them after the last.
        loss_weights: factors of the branches' losses, 1 for one that is not listed.
        box_padding: pixels by which ground-truth boxes grow, 0 in all released settings.
        interpolation: see :func:`~projects.ks_detr.foreground.foreground_mask`.
    """

    def __init__(
        self,
        features: nn.Module,
        branches: Sequence[BranchName] = BRANCH_NAMES,
        *,
        aux_loss: bool = False,
        loss_weights: Mapping[str, float] | None = None,
        box_padding: int = 0,
        interpolation: Interpolation = "bilinear",
    ):
        super().__init__()
        if not branches or set(branches) - set(BRANCH_NAMES):
            raise ValueError(
                f"branches is {list(branches)!r}, expected 'share_v', 'share_a' or both"
            )
        weights = dict(loss_weights or {})
        if set(weights) - set(branches):
            raise ValueError(
                f"branch_loss_weights names {sorted(weights)}, the branches are {list(branches)}"
            )
        if interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation is {interpolation!r}, expected one of {get_args(Interpolation)}"
            )
        self.features = features
        self.branches = tuple(
            Branch(name, aux_loss, weights.get(name, 1.0))
            for name in BRANCH_NAMES
            if name in branches
        )
        self.box_padding = box_padding
        self.interpolation: Interpolation = interpolation

    def teaches(self, name: BranchName) -> bool:
        """Whether there is a branch of that name."""
        return any(branch.name == name for branch in self.branches)

    def all_branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The student alone without ground truth, else the student and its teachers."""
        return (STUDENT,) if context.targets is None else (STUDENT, *self.branches)

    def observe(self, tokens: Tensor, context: EncoderContext) -> tuple[Tensor, Tensor]:
        """Teacher features X^t of each branch's own tokens, of which the first are the student's.

        Args:
            tokens: (B, S, C), or (R * B, S, C) after another knowledge-sharing layer.
            context: with ground truth.

        Returns:
            ``X^t + P`` for the attention of ``share_v`` and ``X^t`` for the values of ``share_a``,
            each (B, S, C).
        """
        assert context.targets is not None
        batch = batch_of(tokens, context)
        own = slice(batch if len(tokens) > batch else 0, None)
        positions = repeat_rows(context.positions, tokens)[own]
        tokens = tokens[own]
        foreground = foreground_mask(
            context.features, context.targets, self.box_padding, self.interpolation
        )
        foreground = repeat_rows(foreground, tokens)
        features = self.features(tokens, foreground, context.padding_of(tokens))
        return features[:batch] + positions[:batch], features[-batch:]


def batch_of(tokens: Tensor, context: EncoderContext) -> int:
    """B of tokens (R * B, S, C); the first B rows are the student's."""
    return tokens.shape[0] // len(context.branches)
