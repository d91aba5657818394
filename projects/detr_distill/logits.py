"""Hungarian-matching logits distillation (DETRDistill, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from detrex.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from torch import Tensor

from detectors.criterion import average_count
from engine.errors import UserError

from .context import DistillationContext, View
from .matching import Detections, Pairs, SoftCost, match, match_chosen, overlap_of
from .objective import Objective


def soft_class_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Binary cross entropy with the teacher's scores, (L, P, K) to (L,), summed over the rest."""
    return F.binary_cross_entropy_with_logits(
        logits, teacher_logits.sigmoid(), reduction="none"
    ).sum((1, 2))


def box_losses(boxes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and ``1 - GIoU`` of boxes (L, P, 4) cxcywh, both (L,), summed over the rest."""
    return (boxes - wanted).abs().sum((1, 2)), (1 - overlap_of(boxes, wanted)).sum(1)


def check_scores(what: str, student: View, teacher: View) -> None:
    """Refuse detectors whose class scores are not independent of one another.

    Raises:
        UserError: one of the two predicts classes and background by softmax.
    """
    for name, view in (("student", student), ("teacher", teacher)):
        if view.detector.criterion.loss_class_type == "ce_loss":
            raise UserError(
                f"the {name} predicts classes and background by softmax (ce_loss): {what} "
                "needs a score for every class by itself (focal_loss)"
            )


class LogitsDistillation(Objective):
    """The student's predictions follow those of the teacher's that a bipartite matching gives them.

    In ``paper`` mode positives, which are the teacher's queries that match the ground truth in
    their stage, and negatives are matched apart, and negatives teach boxes only. In ``joint`` mode,
    that of the released code, there is one matching, and all teach classes and boxes; the switches
    of positives and negatives are for ``paper`` mode.

    Args:
        mode: ``paper`` or ``joint``.
        progressive: each stage learns from its own of the teacher's (Eq. 4), else from the last.
        positive_class: whether positives teach classes (Table 6).
        positive_boxes: whether they teach boxes.
        negative_boxes: whether negatives teach boxes.
        cost: of the matching; negatives are matched by boxes alone.
        class_weight: factor of the class losses.
        box_weight: factor of the L1 losses.
        giou_weight: factor of the GIoU losses.
        weight: factor of all.
    """

    def __init__(
        self,
        mode: Literal["paper", "joint"] = "paper",
        progressive: bool = True,
        positive_class: bool = True,
        positive_boxes: bool = True,
        negative_boxes: bool = True,
        cost: SoftCost | None = None,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        weight: float = 1.0,
    ):
        super().__init__()
        if mode not in ("paper", "joint"):
            raise UserError(f"mode is {mode!r}, expected 'paper' or 'joint'")
        switches = positive_class, positive_boxes, negative_boxes
        if mode == "joint" and not all(switches):
            raise UserError("mode 'joint' has no positives or negatives to switch off")
        if not any(switches):
            raise UserError("all of positive_class, positive_boxes and negative_boxes are False")
        self.joint = mode == "joint"
        self.progressive = progressive
        boxes = ["bbox", "giou"]
        self.positive_kinds = ["class"] * positive_class + boxes * positive_boxes
        self.negative_kinds = boxes * negative_boxes
        self.cost = cost or SoftCost()
        self.weights = {"class": class_weight, "bbox": box_weight, "giou": giou_weight}
        self.weight = weight

    def prepare(self, student: View, teacher: View) -> None:
        """Check that both score each class by itself."""
        check_scores("logits distillation", student, teacher)

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """Losses of positives and negatives, or of all, each summed over the stages."""
        stages = context.stages(last=not self.progressive)
        learner = Detections(context.student.logits, context.student.boxes)
        taught = Detections(context.teacher.logits[stages], context.teacher.boxes[stages])
        if self.joint:
            inside = box_cxcywh_to_xyxy(taught.boxes).clamp(0, 1)
            taught = Detections(taught.logits, box_xyxy_to_cxcywh(inside))
            pairs = match(self.cost(learner, taught))
            return self._losses("logits", pairs, learner, taught, ["class", "bbox", "giou"])
        by_boxes = SoftCost(0.0, self.cost.boxes, self.cost.giou)
        positives, negatives = split_queries(context, stages)
        groups = [
            ("logits_positive", self.cost, positives, self.positive_kinds),
            ("logits_negative", by_boxes, negatives, self.negative_kinds),
        ]
        wanted = [group for group in groups if group[-1]]
        matched = match_chosen([(cost(learner, taught), chosen) for _, cost, chosen, _ in wanted])
        losses: dict[str, Tensor] = {}
        for (name, _, _, kinds), pairs in zip(wanted, matched, strict=True):
            losses |= self._losses(name, pairs, learner, taught, kinds)
        return losses

    def _losses(
        self,
        name: str,
        pairs: Pairs,
        learner: Detections,
        taught: Detections,
        kinds: Sequence[str],
    ) -> dict[str, Tensor]:
        """Weighted losses of the pairs, per pair."""
        precise = torch.promote_types(learner.boxes.dtype, torch.float32)
        logits, boxes = (pairs.of_student(part).to(precise) for part in learner)
        teacher_logits, wanted = (pairs.of_teacher(part).to(precise) for part in taught)
        parts = {}
        if "class" in kinds:
            parts["class"] = soft_class_loss(logits, teacher_logits)
        if "bbox" in kinds:
            parts["bbox"], parts["giou"] = box_losses(boxes, wanted)
        count = average_count(len(pairs.images), boxes.device)
        return {
            f"loss_{name}_{kind}": values.sum() * (self.weight * self.weights[kind] / count)
            for kind, values in parts.items()
        }


def split_queries(
    context: DistillationContext, stages: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's queries that match the ground truth in these stages, and the others.

    Returns:
        For each image positives (L, P_b) and negatives (L, M - P_b).
    """
    matches = context.teacher_matches
    shape = context.teacher.logits.shape[:3]
    matched = torch.zeros(shape, dtype=torch.bool, device=matches.queries.device)
    matched[matches.index] = True
    # the matched ones first, the others behind them, both in their order
    order = matched[stages].logical_not().byte().argsort(dim=-1, stable=True)
    counts = torch.bincount(matches.images, minlength=shape[1]).tolist()
    positive = [order[:, image, :count] for image, count in enumerate(counts)]
    return positive, [order[:, image, count:] for image, count in enumerate(counts)]
