"""How well teacher and student detect in training, and how restless their matching is."""

from __future__ import annotations

import torch
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor

from detectors.boxes import box_iou
from detectors.structures import Matches, Targets

from .context import View
from .matching import TINY_AREA


def matched_quality(
    scores: Tensor, boxes: Tensor, matches: Matches, targets: Targets, gamma: float = 0.5
) -> Tensor:
    """``score ** gamma * IoU ** (1 - gamma)`` of queries with their targets (Eq. 7).

    Args:
        scores: (L, B, N, K) of all classes.
        boxes: (L, B, N, 4) cxcywh.
        matches: with the ground truth, of L groups and M pairs.
        targets: ground truth of the B images.
        gamma: what the score counts.

    Returns:
        (L, M).
    """
    labels = torch.cat([target["labels"] for target in targets])[matches.targets]
    wanted = torch.cat([target["boxes"] for target in targets])[matches.targets]
    score = matches.select(scores).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    found = box_cxcywh_to_xyxy(matches.select(boxes))
    overlap = box_iou(found, box_cxcywh_to_xyxy(wanted), epsilon=TINY_AREA)
    return score**gamma * overlap ** (1 - gamma)


@torch.no_grad()
def detection_quality(view: View, matches: Matches, targets: Targets) -> Tensor:
    """Mean over the matched targets of ``score ** 0.5 * IoU ** 0.5`` in the last layer (Eq. 7).

    Zero if the batch has no target.
    """
    last = Matches(matches.images, matches.queries[-1:], matches.targets[-1:])
    logits, boxes = view.logits[-1:].float(), view.boxes[-1:].float()
    softmax = view.detector.criterion.loss_class_type == "ce_loss"
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    quality = matched_quality(scores, boxes, last, targets)
    return quality.sum() / max(quality.numel(), 1)


@torch.no_grad()
def instability(matches: Matches, batch: int, queries: int) -> Tensor:
    """Queries per image whose target changes between a layer and the next (Fig. 7): (L - 1,).

    Args:
        matches: with the ground truth, one group for each of L layers.
        batch: B.
        queries: N.
    """
    groups = len(matches.queries)
    matched = torch.full((groups, batch, queries), -1, device=matches.queries.device)
    matched[matches.index] = matches.targets
    return (matched[1:] != matched[:-1]).sum((1, 2)) / batch
