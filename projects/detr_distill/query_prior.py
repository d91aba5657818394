"""Query-prior assignment distillation (DETRDistill, Sec. 3.4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detectors.structures import Matches
from engine.errors import UserError

from .context import DistillationContext, View
from .objective import Objective

Assignment = Literal["teacher", "last", "own"]


class QueryPriorAssignment(Objective):
    """The teacher's queries in the student's decoder detect under the teacher's assignment (Eq. 9).

    Args:
        assignment: ``teacher`` gives every stage that of the teacher's stage which it is mapped to;
            ``last`` does so in the last stage alone, the others match by themselves (D3ETR); with
            ``own`` all do, as the released code of DETRDistill does against its paper.
        weight: factor of the losses, beside the student's own weights.
    """

    needs_group = True

    def __init__(self, assignment: Assignment = "teacher", weight: float = 1.0):
        super().__init__()
        if assignment not in ("teacher", "last", "own"):
            raise UserError(f"assignment is {assignment!r}, expected 'teacher', 'last' or 'own'")
        self.assignment = assignment
        self.weight = weight

    def prepare(self, student: View, teacher: View) -> None:
        """Check that the student's cost can match the teacher's scores."""
        kinds = [view.detector.criterion.loss_class_type for view in (student, teacher)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the student scores classes by {kinds[0]}, the teacher by {kinds[1]}: "
                "expected the same for an assignment of the teacher's"
            )

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The group's detection losses, each summed over the stages."""
        criterion, group = context.student.detector.criterion, context.group
        parts = criterion.group_losses(
            group.logits, group.boxes, context.targets, self._matches(context), context.num_boxes
        )
        return {
            name.replace("loss_", "loss_group_"): self._weighted(context, name, values)
            for name, values in parts.items()
        }

    def _weighted(self, context: DistillationContext, name: str, values: Tensor) -> Tensor:
        """The sum of the stages' losses (L,), each weighted as the student's own of that layer."""
        weight_of, last = context.student.detector.loss_weight, len(values) - 1
        weights = [weight_of(f"{name}_{layer}") for layer in range(last)] + [weight_of(name)]
        return (values * values.new_tensor(weights)).sum() * self.weight

    def _matches(self, context: DistillationContext) -> Matches:
        if self.assignment == "own":
            return context.group_matches
        given = context.teacher_matches.of_groups(context.stages())
        if self.assignment == "teacher":
            return given
        own = context.group_matches
        return Matches(
            given.images,
            torch.cat([own.queries[:-1], given.queries[-1:]]),
            torch.cat([own.targets[:-1], given.targets[-1:]]),
        )
