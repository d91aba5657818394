"""Hungarian matching with cost modules."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detrex.layers import box_cxcywh_to_xyxy
from detrex.modeling.matcher.match_cost import FocalLossCost, GIoUCost, L1Cost

__all__ = ["HungarianMatcher"]

_WORST_COST = 1e8


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of least total cost, image by image."""

    def __init__(
        self,
        cost_class: nn.Module = FocalLossCost(alpha=0.25, gamma=2.0, weight=2.0, eps=1e-8),  # noqa: B008
        cost_bbox: nn.Module = L1Cost(weight=5.0),  # noqa: B008
        cost_giou: nn.Module = GIoUCost(weight=2.0),  # noqa: B008
    ):
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    @torch.no_grad()
    def forward(
        self,
        pred_logits: Tensor,
        pred_bboxes: Tensor,
        gt_labels_list: Sequence[Tensor],
        gt_bboxes_list: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Match predictions (B, N, K) and (B, N, 4) with each image's labels (T,), boxes (T, 4).

        Boxes are cxcywh.

        Returns:
            For each image the matched queries, ascending, and their targets.
        """
        logits, boxes = pred_logits.float().flatten(0, 1), pred_bboxes.float().flatten(0, 1)
        labels, targets = torch.cat(list(gt_labels_list)), torch.cat(list(gt_bboxes_list)).float()
        cost = self.cost_bbox(boxes, targets) + self.cost_class(logits, labels)
        cost += self.cost_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets))
        # A cost that is not finite counts as the worst: a diverged model is to show in its losses.
        cost = cost.nan_to_num(_WORST_COST, _WORST_COST, -_WORST_COST)
        cost = cost.view(*pred_logits.shape[:2], -1).cpu()
        blocks = cost.split([len(each) for each in gt_bboxes_list], dim=-1)
        matches = [linear_sum_assignment(block[i]) for i, block in enumerate(blocks)]
        return [(torch.as_tensor(i), torch.as_tensor(j)) for i, j in matches]
