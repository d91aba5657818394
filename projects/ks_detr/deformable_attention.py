"""Knowledge sharing in deformable attention: the teachers sample where the student does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops
from detectors.deformable_attention import DeformableSelfAttention
from detectors.structures import Branch, EncoderContext, repeat_rows

from .teacher import Teacher, batch_of


class DeformableTeacher(Teacher):
    """Teacher with layers for weights and values, those that its branches need."""

    def __init__(self, student: DeformableSelfAttention, *teacher, **named_teacher):
        super().__init__(*teacher, **named_teacher)
        if self.teaches("share_v"):
            samples = student.attention_weights.out_features
            self.attention_weights = _linear(student.embed_dim, samples)
        if self.teaches("share_a"):
            self.value_proj = _linear(student.embed_dim, student.embed_dim)


def _linear(inputs: int, outputs: int) -> ops.Linear:
    """Initialised as the transformer does, also outside of one."""
    layer = ops.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class KnowledgeSharingDeformableAttention(DeformableSelfAttention):
    """Deformable self-attention with teacher branches that exist only with ground truth.

    All branches sample at the student's locations. With weights a and values v of the student and
    a^t and v^t of teacher features X^t, the outputs are those of ``(v, a)`` (student), ``(v, a^t)``
    (``share_v``) and ``(v^t, a)`` (``share_a``). What else is shared, and what a later layer does,
    is as in :class:`~projects.ks_detr.attention.KnowledgeSharingAttention`. Dropout, which is on
    the output, is drawn for every branch.

    Args:
        student: the plain attention that is extended; its parameters are taken over.
        teacher: arguments of :class:`~projects.ks_detr.teacher.Teacher`.
    """

    def __init__(self, student: DeformableSelfAttention, *teacher, **named_teacher):
        super().__init__(
            student.embed_dim,
            student.num_heads,
            student.num_levels,
            student.num_points,
            student.dropout.p,
        )
        for name, layer in student.named_children():
            setattr(self, name, layer)
        self.teacher = DeformableTeacher(student, *teacher, **named_teacher)

    @property
    def teacher_branches(self) -> tuple[Branch, ...]:
        """The branches beside the student's."""
        return self.teacher.branches

    def branches(self, context: EncoderContext) -> tuple[Branch, ...]:
        """The branches that :meth:`forward` returns, stacked along the batch axis."""
        return self.teacher.all_branches(context)

    def forward(self, tokens: Tensor, context: EncoderContext) -> Tensor:  # type: ignore[override]
        """Tokens (B or R * B, S, C) to the branches (R * B, S, C), the student first."""
        if context.targets is None:
            return super().forward(tokens, context)
        batch, teacher = batch_of(tokens, context), self.teacher
        student, shapes = tokens[:batch], context.features.spatial_shapes
        query = student + context.positions[:batch]
        locations = self.sampling_locations(query, context.grid.reference_points, shapes)
        weights = self.sampling_weights(query)
        positioned, features = teacher.observe(tokens, context)
        values = [self.project_value(student, context.padding_mask)]
        if teacher.teaches("share_a"):
            values.append(self.project_value(features, context.padding_mask, teacher.value_proj))
        # where values share locations and weights, a head's channels lie side by side
        shared_a = ops.multi_scale_deformable_attention(
            torch.cat(values, dim=-1), shapes, locations, weights
        )
        heads = shared_a.unflatten(-1, (self.num_heads, len(values), -1))
        sampled = [head.flatten(-2) for head in heads.unbind(-2)]
        if teacher.teaches("share_v"):
            weights = self.sampling_weights(positioned, teacher.attention_weights)
            sampled.insert(
                1, ops.multi_scale_deformable_attention(values[0], shapes, locations, weights)
            )
        output = self.output_proj(torch.cat(sampled))
        tokens = repeat_rows(tokens, output)
        return ops.dropout_add(output, tokens, self.dropout.p, self.dropout.training)
