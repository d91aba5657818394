"""Prediction distillation (D3ETR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .context import DistillationContext, View
from .layerwise import LayerwiseObjective, QueryGroup
from .logits import box_losses, check_scores, soft_class_loss


class PredictionDistillation(LayerwiseObjective):
    """The student's classes and boxes follow the teacher's, pair by pair.

    Per layer the binary cross entropy with the teacher's scores, summed over classes, the L1
    distance and ``1 - GIoU``, each averaged over the pairs; summed over the layers.

    Args:
        group: see :class:`~projects.detr_distill.layerwise.LayerwiseObjective`.
        class_weight: factor of the class loss.
        box_weight: factor of the L1 loss.
        giou_weight: factor of the GIoU loss.
        layers: see :class:`~projects.detr_distill.layerwise.LayerwiseObjective`.
        weight: factor of all.
    """

    kind = "prediction"

    def __init__(
        self,
        group: QueryGroup = "adaptive",
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        layers: Sequence[int] | None = None,
        weight: float = 1.0,
    ):
        super().__init__(group, layers, weight)
        self.weights = {"class": class_weight, "bbox": box_weight, "giou": giou_weight}

    def prepare(self, student: View, teacher: View) -> None:
        """Check that both score each class by itself, in either group."""
        super().prepare(student, teacher)
        check_scores("prediction distillation", student, teacher)

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The weighted losses, each summed over the layers."""
        layers = self.chosen(context)
        logits, wanted_logits, boxes, wanted_boxes = (
            values[layers].to(torch.promote_types(values.dtype, torch.float32))
            for values in self._paired(context)
        )
        distance, overlap = box_losses(boxes, wanted_boxes)
        parts = {
            "class": soft_class_loss(logits, wanted_logits), "bbox": distance, "giou": overlap
        }  # fmt: skip
        return {
            self.loss_name(f"_{part}"): values.sum()
            * (self.weight * self.weights[part] / boxes.shape[1])
            for part, values in parts.items()
        }

    def _paired(self, context: DistillationContext) -> tuple[Tensor, ...]:
        """Logits and the teacher's, boxes and the teacher's, (L, pairs, K or 4) each."""
        learner, teacher, stages = self.learner(context), context.teacher, context.stages()
        values = (learner.logits, teacher.logits[stages], learner.boxes, teacher.boxes[stages])
        if self.needs_group:
            return tuple(value.flatten(1, 2) for value in values)
        pick = (context.pairs.of_student, context.pairs.of_teacher)
        return tuple(pick[place % 2](value) for place, value in enumerate(values))
