"""Target-aware feature distillation (DETRDistill, Sec. 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor

from detectors.boxes import box_iou
from engine.errors import UserError

from .context import DistillationContext, View
from .features import FeatureObjective, Place, adapt_channels
from .logits import check_scores
from .matching import TINY_AREA
from .measures import matched_quality

Form = Literal["released", "eq8", "eq6"]
DEFAULT_WEIGHTS = {"released": 1.0, "eq8": 20.0, "eq6": 20.0}


class TargetAwareDistillation(FeatureObjective):
    """Maps are imitated where the teacher's queries find what they detect.

    ``released`` weighs the maps by one mask for every stage and level: cosines of queries and
    cells, weighted by the quality of the best detections, from 0.01 to 1. ``eq8`` weighs the error
    by the squared dot products of each matched query, ``eq6`` by that of the mean query, which
    hurts (Table 2).

    Args:
        form: ``released``, ``eq8`` or ``eq6``.
        place: see :class:`~projects.detr_distill.features.FeatureObjective`.
        weight: factor of the loss; None for the form's: 1, or the paper's 20.
        last_stage: use the teacher's last decoder layer alone; None for the form's: all layers that
            the student's are mapped to with ``released``, else the last.
        max_detections: (query, class) pairs of an image that form a released mask.
        gamma: of the quality ``score ** gamma * IoU ** (1 - gamma)`` in ``eq8`` (Eq. 7).
    """

    name = "target_aware"

    def __init__(
        self,
        form: Form = "released",
        place: Place = "neck",
        weight: float | None = None,
        last_stage: bool | None = None,
        max_detections: int = 100,
        gamma: float = 0.5,
    ):
        if form not in DEFAULT_WEIGHTS:
            raise UserError(f"form is {form!r}, expected one of {', '.join(DEFAULT_WEIGHTS)}")
        super().__init__(place, DEFAULT_WEIGHTS[form] if weight is None else weight)
        self.form = form
        self.last_stage = form != "released" if last_stage is None else last_stage
        self.max_detections = max_detections
        self.gamma = gamma

    def prepare(self, student: View, teacher: View) -> None:
        """Check also that the teacher's scores tell the quality of its queries."""
        if self.form != "eq6":
            check_scores("the quality of queries", student, teacher)
        super().prepare(student, teacher)

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """A 1 x 1 convolution where the teacher's maps have other channels."""
        self.adapters = adapt_channels(student, teacher)

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The unweighted loss of a level's maps (B, C, H, W)."""
        difference = teacher - self.adapters[level](student)
        return (difference.square().sum(1) * self.cell_weights(teacher, context)).sum()

    @torch.no_grad()
    def cell_weights(self, teacher: Tensor, context: DistillationContext) -> Tensor:
        """What the squared error of each cell (B, H, W) of the maps (B, C, H, W) counts."""
        stages = context.stages()[-1:] if self.last_stage else context.stages()
        queries = context.teacher.states[stages].to(teacher.dtype)
        cells = teacher.flatten(2)
        if self.form == "released":
            quality = detection_weights(context, stages, self.max_detections)
            weights = cosine_masks(queries, quality.to(teacher.dtype), cells).square().sum(0)
        elif self.form == "eq8":
            quality = self.query_quality(context, stages).to(teacher.dtype)
            products = queries @ cells  # (L, B, M, S)
            weights = (quality.unsqueeze(-1) * products.square()).mean(2).sum(0)
        else:
            weights = (queries.mean(2, keepdim=True) @ cells).squeeze(2).square().sum(0)
        return weights.view_as(teacher[:, 0]) / teacher.numel()

    def query_quality(self, context: DistillationContext, stages: list[int]) -> Tensor:
        """Quality (L, B, M) of the teacher's queries that match a target (Eq. 7), else 0."""
        matches = context.teacher_matches.of_groups(stages)
        scores, boxes = context.teacher.logits[stages].sigmoid(), context.teacher.boxes[stages]
        quality = torch.zeros_like(scores[..., 0])
        quality[matches.index] = matched_quality(
            scores, boxes, matches, context.targets, self.gamma
        )
        return quality


def detection_weights(
    context: DistillationContext, stages: list[int], max_detections: int
) -> Tensor:
    """Summed quality (L, B, M) of each of the teacher's queries among the best detections.

    A detection's quality is its score times the highest IoU with a target, or its score in an image
    without targets. A query with several classes among the best counts for each.
    """
    logits, boxes = context.teacher.logits[stages], context.teacher.boxes[stages]
    overlap = torch.ones_like(logits[..., 0])
    for image, target in enumerate(context.targets):
        if len(target["boxes"]):
            found = boxes[:, image, :, None]
            overlap[:, image] = _iou(found, target["boxes"].to(boxes.dtype)).amax(-1)
    scores = logits.sigmoid().flatten(2)
    best, indices = scores.topk(min(max_detections, scores.shape[-1]), dim=-1)
    queries = indices // logits.shape[-1]
    quality = best * overlap.gather(-1, queries)
    return torch.zeros_like(overlap).scatter_add_(-1, queries, quality)


def cosine_masks(queries: Tensor, quality: Tensor, cells: Tensor) -> Tensor:
    """Masks (L, B, S) of queries (L, B, M, C) and cells (B, C, S); the highest value is 1.

    The weighted sum of cosines is the cosine with the weighted sum of unit queries.
    """
    direction = (quality.unsqueeze(-1) * F.normalize(queries, dim=-1)).sum(2, keepdim=True)
    masks = (direction @ F.normalize(cells, dim=1)).squeeze(2).clamp(min=0.01)
    return masks / masks.amax(-1, keepdim=True)


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    return box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(others), epsilon=TINY_AREA)
