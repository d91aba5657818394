"""What the objectives of D3ETR have in common: two groups of queries, and decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from engine.errors import UserError

from .context import DistillationContext, View
from .logits import check_scores
from .objective import Objective

QueryGroup = Literal["adaptive", "fixed"]


class Correspondence(NamedTuple):
    """Which of two detectors' queries belong together in a decoder layer.

    Attributes:
        student: (B, P) query within the image; None for all in their order.
        teacher: (B, P), likewise.
    """

    student: Tensor | None = None
    teacher: Tensor | None = None


class LayerwiseObjective(Objective):
    """Each decoder layer of the student learns from the teacher's layer that it is mapped to.

    Args:
        group: ``adaptive`` for the student's own queries, each beside the teacher's query that the
            matching of the layer gives it; ``fixed`` for the teacher's queries in the student's
            decoder, each beside itself in the teacher.
        layers: the student's decoder layers that learn, counted from 0; None for all.
        weight: factor of the losses.
    """

    kind: str
    """Of the losses, after ``loss_``."""

    def __init__(
        self,
        group: QueryGroup = "adaptive",
        layers: Sequence[int] | None = None,
        weight: float = 1.0,
    ):
        super().__init__()
        if group not in ("adaptive", "fixed"):
            raise UserError(f"group is {group!r}, expected 'adaptive' or 'fixed'")
        self.needs_group = group == "fixed"
        self.layers = None if layers is None else list(layers)
        self.weight = weight

    def prepare(self, student: View, teacher: View) -> None:
        """Check that the layers exist and that the matching has scores to go by."""
        count = len(student.logits)
        if self.layers == []:
            raise UserError(f"{type(self).__name__} has layers [], expected some or None for all")
        for layer in self.layers or []:
            if not 0 <= layer < count:
                raise UserError(
                    f"{type(self).__name__} has layers {self.layers}, "
                    f"the student's decoder has 0 to {count - 1}"
                )
        if not self.needs_group:
            check_scores("the matching with the teacher", student, teacher)

    def chosen(self, context: DistillationContext) -> list[int]:
        """The student's layers that learn."""
        return list(range(len(context.stages()))) if self.layers is None else self.layers

    def learner(self, context: DistillationContext) -> View:
        """The view that learns: the student's, or that of the teacher's queries in it."""
        return context.group if self.needs_group else context.student

    def correspondence(self, context: DistillationContext, layer: int) -> Correspondence:
        """The P = min(N, M) pairs of the student's N and the teacher's M queries in a layer."""
        if self.needs_group:
            return Correspondence()
        batch, queries = context.student.logits.shape[1:3]
        student, teacher = (
            queries_of[layer].view(batch, -1)
            for queries_of in (context.pairs.student, context.pairs.teacher)
        )
        # where every one of the student's has a partner, they are in their order
        return Correspondence(None if student.shape[1] == queries else student, teacher)

    def loss_name(self, part: str = "") -> str:
        """Name of a loss; those of the fixed group have a suffix."""
        return f"loss_{self.kind}{part}" + ("_group" if self.needs_group else "")
