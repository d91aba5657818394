"""DETR's set prediction loss over all decoder layers, branches and images at once."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detrex.layers import box_cxcywh_to_xyxy
from detrex.modeling import HungarianMatcher
from detrex.modeling import SetCriterion as _SetCriterion
from detrex.modeling.losses import sigmoid_focal_loss
from detrex.utils import get_world_size, is_dist_avail_and_initialized
from torch import Tensor

import ops

from .boxes import generalized_iou
from .structures import Matches, Targets

WORST_COST = 1e8
"""Of a cost that is not finite: a diverged model is to show in its losses, not in the matching."""


class SetCriterion(_SetCriterion):
    """detrex's criterion, with one matching and one loss for all groups of predictions.

    A group is what is matched by itself: the predictions of a decoder layer in a branch. The
    constructor is detrex's, and so is a call with a dictionary of outputs; detectors call
    :meth:`match` and :meth:`group_losses`.
    """

    cost_epsilon: ClassVar[float] = 1e-8
    """Keeps the focal cost's logarithms finite."""

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Matches:
        """Match all groups and images in one call, at the least cost of each.

        Args:
            logits: (G, B, N, K).
            boxes: (G, B, N, 4) cxcywh.
            targets: ground truth of the B images.
        """
        sizes = [len(target["labels"]) for target in targets]
        images = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        images = images.to(logits.device)
        costs = self._costs(logits, boxes, targets, images)
        costs = costs.nan_to_num(WORST_COST, WORST_COST, -WORST_COST)
        pairs = ops.linear_sum_assignment(costs.transpose(1, 2), sizes)
        starts = [sum(sizes[:image]) for image in range(len(sizes))]
        counts = torch.tensor([queries.shape[-1] for queries, _ in pairs], dtype=torch.long)
        return Matches(
            torch.arange(len(sizes)).repeat_interleave(counts).to(logits.device),
            torch.cat([queries for queries, _ in pairs], dim=-1),
            torch.cat(
                [columns + start for (_, columns), start in zip(pairs, starts, strict=True)], dim=-1
            ),
        )

    def _costs(self, logits: Tensor, boxes: Tensor, targets: Targets, images: Tensor) -> Tensor:
        """Cost of each target with the queries of its own image, (G, T, N)."""
        matcher: HungarianMatcher = self.matcher  # type: ignore[assignment]
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets]).float()[:, None]
        if matcher.cost_class_type == "ce_cost":
            probabilities = logits.float().softmax(-1)[:, images, :, labels].transpose(0, 1)
            costs = -matcher.cost_class * probabilities
        else:
            found = logits[:, images, :, labels].float().sigmoid().transpose(0, 1)
            costs = matcher.cost_class * focal_cost(
                found, matcher.alpha, matcher.gamma, self.cost_epsilon
            )
        candidates = boxes.float()[:, images]  # (G, T, N, 4)
        distance, overlap = self.compare(candidates, wanted)
        return costs + matcher.cost_bbox * distance - matcher.cost_giou * overlap

    def compare(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """L1 distance and generalised IoU (...) of boxes (..., 4) cxcywh, which may broadcast."""
        overlap = generalized_iou(box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(wanted))
        return (found - wanted).abs().sum(-1), overlap

    def group_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        matches: Matches,
        num_boxes: float,
    ) -> dict[str, Tensor]:
        """Unweighted losses of every group.

        Args:
            logits: (G, B, N, K).
            boxes: (G, B, N, 4) cxcywh.
            targets: ground truth of the B images.
            matches: as :meth:`match` returns them.
            num_boxes: what sums are divided by.

        Returns:
            ``loss_class``, ``loss_bbox`` and ``loss_giou``, or some of them, each (G,).
        """
        losses = {}
        if "class" in self.losses:
            labels = torch.cat([target["labels"] for target in targets])
            losses["loss_class"] = self._class_losses(logits.float(), labels, matches, num_boxes)
        if "boxes" in self.losses:
            found = matches.select(boxes).float()
            wanted = torch.cat([target["boxes"] for target in targets]).float()[matches.targets]
            distance, overlap = self.compare(found, wanted)
            losses["loss_bbox"] = distance.sum(1) / num_boxes
            losses["loss_giou"] = (1 - overlap).sum(1) / num_boxes
        return losses

    def _class_losses(
        self, logits: Tensor, labels: Tensor, matches: Matches, num_boxes: float
    ) -> Tensor:
        """Focal loss per box or weighted mean cross entropy, (G,)."""
        if self.loss_class_type == "ce_loss":
            classes = torch.full(
                logits.shape[:3], self.num_classes, dtype=torch.long, device=logits.device
            )
            classes[matches.index] = labels[matches.targets]
            weights = self.empty_weight[classes].flatten(1)
            losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
            total = weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)  # there may be none
            return (losses.view_as(weights) * weights).sum(1) / total
        one_hot = torch.zeros_like(logits)
        groups, images, queries = matches.index
        one_hot[groups, images, queries, labels[matches.targets]] = 1
        losses = sigmoid_focal_loss(
            logits, one_hot, alpha=self.alpha, gamma=self.gamma, reduction="none"
        )
        return losses.sum((1, 2, 3)) / num_boxes


def focal_cost(probabilities: Tensor, alpha: float, gamma: float, epsilon: float = 1e-8) -> Tensor:
    """What the focal loss gains when background turns into the target's class."""
    positive = -alpha * (1 - probabilities) ** gamma * (probabilities + epsilon).log()
    negative = -(1 - alpha) * probabilities**gamma * (1 - probabilities + epsilon).log()
    return positive - negative


def average_num_boxes(targets: Targets, device: torch.device) -> float:
    """Boxes per process, at least 1."""
    return average_count(sum(len(target["labels"]) for target in targets), device)


def average_count(number: int, device: torch.device) -> float:
    """Mean over all processes of a number of things, at least 1."""
    count = float(number)
    if is_dist_avail_and_initialized():
        total = torch.tensor([count], device=device)
        dist.all_reduce(total)
        count = total.item() / get_world_size()
    return max(count, 1.0)
