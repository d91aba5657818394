"""Triple and dual attention: teachers that share attention or values with the student (KS-DETR)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detectors.attention import SelfAttention, allow_unpadded, attend, merge_heads, split_heads
from detectors.structures import Branch, EncoderContext, repeat_rows
from ops import linear

from .teacher import Teacher, batch_of


class DenseTeacher(Teacher):
    """Teacher with packed rows for queries, keys and values, those that its branches need."""

    def __init__(self, embed_dim: int, *teacher, **named_teacher):
        super().__init__(*teacher, **named_teacher)
        rows = embed_dim * (2 * self.teaches("share_v") + self.teaches("share_a"))
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows))

    def project(
        self, tokens: Tensor, context: EncoderContext
    ) -> tuple[tuple[Tensor, Tensor] | None, list[Tensor]]:
        """``(Q^t, K^t)`` and ``[V^t]``, each (B, S, C); None and [] where no branch uses them."""
        positioned, features = self.observe(tokens, context)
        weight, bias, channels = self.in_proj_weight, self.in_proj_bias, tokens.shape[-1]
        query_key, value = None, []
        if self.teaches("share_v"):
            rows = slice(2 * channels)
            query, key = linear(positioned, weight[rows], bias[rows]).split(channels, dim=-1)
            query_key = query, key
        if self.teaches("share_a"):
            rows = slice(len(weight) - channels, None)
            value = [linear(features, weight[rows], bias[rows])]
        return query_key, value


class KnowledgeSharingAttention(SelfAttention):
    """Self-attention with teacher branches that exist only where ground truth is given.

    With Q, K, V and A of the student and Q^t, K^t, V^t of teacher features X^t (Sec. 3.2), the
    outputs are ``A V`` (student), ``A^t V`` (``share_v``) and ``A V^t`` (``share_a``); the output
    projection is the student's in all of them. Where the input is the student's alone, X^t and the
    residual are made of it; after another such layer they are made of each branch's own tokens.

    Args:
        student: the plain attention that is extended; its parameters are taken over.
        teacher: arguments of :class:`~projects.ks_detr.teacher.Teacher`.
    """

    def __init__(self, student: SelfAttention, *teacher, **named_teacher):
        super().__init__(student.embed_dim, student.num_heads, student.dropout)
        self.attn = student.attn
        self.teacher = DenseTeacher(student.embed_dim, *teacher, **named_teacher)
        self._init_rows(self.teacher.in_proj_weight)  # the student may be trained already

    def init_weights(self) -> None:
        """Xavier bounds of student and teacher rows taken as one packed matrix, as released."""
        self._init_rows(self.attn.in_proj_weight)
        self._init_rows(self.teacher.in_proj_weight)

    def _init_rows(self, weight: nn.Parameter) -> None:
        rows = len(self.attn.in_proj_weight) + len(self.teacher.in_proj_weight)
        bound = (6 / (rows + self.embed_dim)) ** 0.5
        nn.init.uniform_(weight, -bound, bound)

    @property
    def teacher_branches(self) -> tuple[Branch, ...]:
        """The branches beside the student's."""
        return self.teacher.branches

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis."""
        return self.teacher.all_branches(context)

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:
        """Tokens (B or R * B, S, C) to the branches (R * B, S, C), the student first."""
        if context.targets is None:
            return super().forward(tokens, context)
        batch = batch_of(tokens, context)
        query, key, value = self.project(tokens[:batch], context.positions[:batch])
        query_key_t, value_t = self.teacher.project(tokens, context)
        allowed, dropout = allow_unpadded(context.padding_mask), self.active_dropout
        # one softmax and one dropout draw serve A V and A V^t
        values = torch.cat([value, *(split_heads(v, self.num_heads) for v in value_t)], dim=-1)
        shared_a = attend(query, key, values, allowed, dropout)
        attended = list(shared_a.split(value.shape[-1], dim=-1))
        if query_key_t is not None:
            query, key = (split_heads(x, self.num_heads) for x in query_key_t)
            attended.insert(1, attend(query, key, value, allowed, dropout))
        stacked = torch.cat([merge_heads(x) for x in attended])
        return repeat_rows(tokens, stacked) + self.attn.out_proj(stacked)
