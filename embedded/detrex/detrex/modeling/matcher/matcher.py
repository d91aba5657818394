"""Hungarian matching with cost weights."""

import torch
from torch import Tensor, nn

from detrex.modeling.matcher.match_cost import CrossEntropyCost, FocalLossCost, GIoUCost, L1Cost
from detrex.modeling.matcher.modified_matcher import HungarianMatcher as _CostMatcher

__all__ = ["HungarianMatcher"]

_CLASS_COSTS = ("ce_cost", "focal_loss_cost")


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of least total cost, image by image.

    Args:
        cost_class: weight of the classification cost.
        cost_bbox: weight of the boxes' L1 distance.
        cost_giou: weight of minus their generalised IoU.
        cost_class_type: ``"focal_loss_cost"`` or ``"ce_cost"``.
        alpha: balance of positives and negatives in the focal cost.
        gamma: focus of the focal cost.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        cost_class_type: str = "focal_loss_cost",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        assert any((cost_class, cost_bbox, cost_giou)), "HungarianMatcher: all costs are 0"
        assert cost_class_type in _CLASS_COSTS, (
            f"HungarianMatcher: found cost_class_type {cost_class_type!r}, expected {_CLASS_COSTS}"
        )
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.cost_class_type = cost_class_type
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match predictions with targets.

        Args:
            outputs: ``pred_logits`` (B, N, K) and ``pred_boxes`` (B, N, 4) cxcywh.
            targets: for each image ``labels`` (T,) and ``boxes`` (T, 4) cxcywh.

        Returns:
            For each image the matched queries, ascending, and their targets.
        """
        if self.cost_class_type == "ce_cost":
            class_cost: nn.Module = CrossEntropyCost(self.cost_class)
        else:
            class_cost = FocalLossCost(self.alpha, self.gamma, self.cost_class)
        matcher = _CostMatcher(class_cost, L1Cost(self.cost_bbox), GIoUCost(self.cost_giou))
        return matcher(
            outputs["pred_logits"],
            outputs["pred_boxes"],
            [target["labels"] for target in targets],
            [target["boxes"] for target in targets],
        )

    def __repr__(self, _repr_indent=4) -> str:
        fields = ("cost_class", "cost_bbox", "cost_giou", "cost_class_type", "alpha", "gamma")
        lines = [f"{name}: {getattr(self, name)}" for name in fields]
        return f"\n{' ' * _repr_indent}".join([f"Matcher {type(self).__name__}", *lines])
