"""How well teacher and student detect in training, and how restless their matching is."""

from __future__ import annotations

import torch
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor

from detectors.boxes import box_iou
from detectors.structures import Matches, Targets

from .context import View


@torch.no_grad()
def detection_quality(view: View, matches: Matches, targets: Targets) -> Tensor:
    """Mean over the matched targets of ``score ** 0.5 * IoU ** 0.5`` in the last layer (Eq. 7).

    Zero if the batch has no target.
    """
    last = Matches(matches.images, matches.queries[-1:], matches.targets[-1:])
    labels = torch.cat([target["labels"] for target in targets])[last.targets]
    wanted = torch.cat([target["boxes"] for target in targets])[last.targets]
    scores = last.select(view.logits[-1:]).float().sigmoid().gather(-1, labels[..., None])[..., 0]
    boxes = last.select(view.boxes[-1:]).float()
    overlap = box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(wanted))
    return (scores * overlap).sqrt().sum() / max(labels.numel(), 1)


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
