"""Triple and dual attention: teachers that share attention or values with the student (KS-DETR)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectors.attention import SelfAttention, allow_unpadded, attend, merge_heads, split_heads
from detectors.structures import STUDENT, Branch, EncoderContext

from .foreground import foreground_mask

BranchName = Literal["share_v", "share_a"]


class ForegroundMLP(nn.Module):
    """Teacher features by a linear layer and ReLU on foreground tokens only (sMLP, Eq. 10)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, embed_dim)

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
    """Everything that exists in training only: dropping this module leaves the plain attention."""

    def __init__(self, features: nn.Module, embed_dim: int, branches: tuple[BranchName, ...]):
        super().__init__()
        self.features = features
        rows = embed_dim * (2 * ("share_v" in branches) + ("share_a" in branches))
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows))


class KnowledgeSharingAttention(SelfAttention):
    """Self-attention with teacher branches that exist only where ground truth is given.

    With Q, K, V and A of the student and Q^t, K^t, V^t of teacher features X^t (Sec. 3.2), the
    outputs are ``A V`` (student), ``A^t V`` (``share_v``) and ``A V^t`` (``share_a``); output
    projection and residual are the student's in all of them.

    Args:
        student: the plain attention that is extended; its parameters are taken over.
        features: makes teacher features of ``(tokens, foreground, padding_mask)``.
        branches: which teachers; both make the triple attention, one a dual attention.
        teacher_aux_loss: supervise the teachers after every decoder layer (Eq. 11 read literally);
            the released code supervises them after the last.
        box_padding: pixels by which ground-truth boxes grow, 0 in all released settings.
    """

    def __init__(
        self,
        student: SelfAttention,
        features: nn.Module,
        branches: tuple[BranchName, ...] = ("share_v", "share_a"),
        teacher_aux_loss: bool = False,
        box_padding: int = 0,
    ):
        super().__init__(student.embed_dim, student.num_heads, student.dropout)
        unknown = set(branches) - {"share_v", "share_a"}
        if unknown or not branches:
            raise ValueError(f"branches is {branches!r}, expected 'share_v', 'share_a' or both")
        self.attn = student.attn
        self.teacher = Teacher(features, student.embed_dim, branches)
        self.teacher_branches = tuple(
            Branch(name, teacher_aux_loss) for name in ("share_v", "share_a") if name in branches
        )
        self.box_padding = box_padding
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier bounds of student and teacher rows taken as one packed matrix, as released."""
        packed = (self.attn.in_proj_weight, self.teacher.in_proj_weight)
        rows = sum(weight.shape[0] for weight in packed)
        bound = (6 / (rows + self.embed_dim)) ** 0.5
        for weight in packed:
            nn.init.uniform_(weight, -bound, bound)

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The student alone without ground truth, else the student and its teachers."""
        return (STUDENT,) if context.targets is None else (STUDENT, *self.teacher_branches)

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens (B, S, C) to the stacked branches (R * B, S, C), the student first."""
        if context.targets is None:
            return super().forward(tokens, context)
        query, key, value = self.project(tokens, context.positions)
        query_key_t, value_t = self._project_teacher(tokens, context)
        allowed, dropout = allow_unpadded(context.padding_mask), self.active_dropout
        # one softmax and one dropout draw serve A V and A V^t
        shared_a = attend(query, key, torch.cat([value, *value_t], dim=-1), allowed, dropout)
        student, *share_a = shared_a.split(value.shape[-1], dim=-1)
        share_v = [attend(*query_key_t, value, allowed, dropout)] if query_key_t else []
        attended = torch.cat([merge_heads(x) for x in (student, *share_v, *share_a)])
        residual = tokens.repeat(1 + len(self.teacher_branches), 1, 1)
        return residual + self.attn.out_proj(attended)

    def _project_teacher(
        self, tokens: Tensor, context: EncoderContext
    ) -> tuple[tuple[Tensor, Tensor] | None, list[Tensor]]:
        """``(Q^t, K^t)`` and ``[V^t]``, each (B, H, S, C / H); None and [] where unused."""
        assert context.targets is not None
        teacher = self.teacher
        foreground = foreground_mask(context.features, context.targets, self.box_padding)
        features = teacher.features(tokens, foreground, context.padding_mask)
        names = [branch.name for branch in self.teacher_branches]
        weight, bias, channels = teacher.in_proj_weight, teacher.in_proj_bias, self.embed_dim
        query_key, value = None, []
        if "share_v" in names:
            rows = slice(2 * channels)
            positioned = F.linear(features + context.positions, weight[rows], bias[rows])
            query, key = positioned.split(channels, dim=-1)
            query_key = split_heads(query, self.num_heads), split_heads(key, self.num_heads)
        if "share_a" in names:
            rows = slice(len(weight) - channels, None)
            value = [split_heads(F.linear(features, weight[rows], bias[rows]), self.num_heads)]
        return query_key, value
