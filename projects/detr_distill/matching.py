"""Which stage of the teacher, and which of its queries, a stage of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor

import ops
from detectors.boxes import generalized_iou
from detectors.criterion import WORST_COST

TINY_AREA = 1e-12
"""Keeps boxes without area from dividing by zero."""


def map_stages(student: int, teacher: int) -> list[int]:
    """Group the teacher's decoder layers evenly; the last of a group teaches (DETRDistill, Fig. 5).

    Args:
        student: its decoder layers.
        teacher: its decoder layers.

    Returns:
        For each of the student's layers the index of the teacher's.
    """
    return [-(-(stage + 1) * teacher // student) - 1 for stage in range(student)]


@dataclass(frozen=True)
class Pairs:
    """P pairs of queries in each of L stages.

    Attributes:
        images: (P,) the image of each pair.
        student: (L, P) query within the image.
        teacher: (L, P) query within the image.
    """

    images: Tensor
    student: Tensor
    teacher: Tensor

    def of_student(self, values: Tensor) -> Tensor:
        """The paired entries of (L, B, N, ...): (L, P, ...)."""
        return _select(values, self.images, self.student)

    def of_teacher(self, values: Tensor) -> Tensor:
        """The paired entries of (L, B, M, ...): (L, P, ...)."""
        return _select(values, self.images, self.teacher)


def _select(values: Tensor, images: Tensor, queries: Tensor) -> Tensor:
    stages = torch.arange(len(queries), device=queries.device)[:, None]
    return values[stages, images.expand_as(queries), queries]


def overlap_of(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (...) of boxes (..., 4) cxcywh, which may broadcast."""
    return generalized_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(others), epsilon=TINY_AREA)


class Detections(NamedTuple):
    """What queries say.

    Attributes:
        logits: (L, B, N, K).
        boxes: (L, B, N, 4) cxcywh in [0, 1].
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class SoftCost:
    """What it costs that a student's query follows a teacher's.

    Attributes:
        logits: factor of the binary cross entropy with the teacher's scores, summed over classes.
        boxes: factor of the L1 distance.
        giou: factor of the negative generalised IoU.
    """

    logits: float = 1.0
    boxes: float = 5.0
    giou: float = 2.0

    @torch.no_grad()
    def __call__(self, student: Detections, teacher: Detections) -> Tensor:
        """Costs (L, B, N, M) of the student's N queries with the teacher's M in the same stage."""
        precise = torch.promote_types(student[1].dtype, torch.float32)
        logits, boxes, teacher_logits, wanted = (x.to(precise) for x in (*student, *teacher))
        boxes, wanted = boxes.unsqueeze(-2), wanted.unsqueeze(-3)
        costs = self.boxes * (boxes - wanted).abs().sum(-1)
        overlap = overlap_of(boxes, wanted)
        costs = costs - self.giou * overlap
        if self.logits:
            background = F.softplus(logits).sum(-1, keepdim=True)
            with torch.autocast(logits.device.type, enabled=False):  # or products would be rounded
                agreement = logits @ teacher_logits.sigmoid().mT
            costs = costs + self.logits * (background - agreement)
        return costs.nan_to_num(WORST_COST, WORST_COST, -WORST_COST)


def match(costs: Tensor) -> Pairs:
    """Pair min(N, M) queries of every image at the least cost.

    Args:
        costs: (L, B, N, M).
    """
    return match_chosen([(costs, everyone(costs))])[0]


def everyone(costs: Tensor) -> list[Tensor]:
    """All of the teacher's queries, (L, M) for each image of costs (L, B, N, M)."""
    queries = torch.arange(costs.shape[-1], device=costs.device).expand(len(costs), -1)
    return [queries] * costs.shape[1]


def match_chosen(problems: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> list[Pairs]:
    """Pair some of the teacher's queries with the student's, all problems in one call.

    Args:
        problems: each with costs (L, B, N, M) and, for each of the B images, those of the teacher's
            queries (L, M_b) that take part.

    Returns:
        For each problem the min(N, M_b) pairs of every image, independent of other problems.
    """
    blocks, chosen = [], []
    for costs, choices in problems:
        for image, choice in enumerate(choices):
            columns = choice[:, None].expand(-1, costs.shape[2], -1)
            blocks.append(costs[:, image].gather(-1, columns))
            chosen.append(choice)
    matched = iter(
        (rows, choice.gather(-1, columns))
        for choice, (rows, columns) in zip(
            chosen,
            ops.linear_sum_assignment(torch.cat(blocks, -1), [c.shape[-1] for c in chosen]),
            strict=True,
        )
    )
    return [_join([next(matched) for _ in choices]) for _, choices in problems]


def _join(images: Sequence[tuple[Tensor, Tensor]]) -> Pairs:
    """The pairs (student, teacher), each (L, P_b), of all images."""
    student, teacher = (torch.cat(part, dim=-1) for part in zip(*images, strict=True))
    counts = torch.tensor([rows.shape[-1] for rows, _ in images])
    numbers = torch.arange(len(images)).repeat_interleave(counts)
    return Pairs(numbers.to(student.device), student, teacher)
