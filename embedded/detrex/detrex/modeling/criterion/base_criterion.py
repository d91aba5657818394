"""DETR's set prediction loss put together from loss modules that carry their weights."""

from torch import Tensor, nn

from detrex.layers import box_cxcywh_to_xyxy
from detrex.modeling.criterion.criterion import (
    _average_num_boxes,
    _matched_boxes,
    _target_labels,
)
from detrex.modeling.losses import FocalLoss, GIoULoss, L1Loss
from detrex.modeling.matcher import ModifedMatcher

__all__ = ["BaseCriterion"]


class BaseCriterion(nn.Module):
    """Matches predictions with targets and computes their losses, weighted.

    Args:
        num_classes: classes without the background, which has the label ``num_classes``.
        matcher: takes logits, boxes, target labels and target boxes.
        loss_class: loss of logits and labels, as the next two with ``avg_factor``.
        loss_bbox: loss of boxes in cxcywh.
        loss_giou: loss of boxes in xyxy.
    """

    def __init__(
        self,
        num_classes: int,
        matcher=ModifedMatcher(),  # noqa: B008
        loss_class: nn.Module = FocalLoss(alpha=0.25, gamma=2.0, loss_weight=1.0),  # noqa: B008
        loss_bbox: nn.Module = L1Loss(loss_weight=5.0),  # noqa: B008
        loss_giou: nn.Module = GIoULoss(eps=1e-6, loss_weight=2.0),  # noqa: B008
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.loss_class = loss_class
        self.loss_bbox = loss_bbox
        self.loss_giou = loss_giou

    def calculate_class_loss(self, pred_logits, targets, indices, num_boxes) -> Tensor:
        """Compute the classification loss of logits (B, N, K)."""
        labels = _target_labels(pred_logits, targets, indices, self.num_classes)
        logits = pred_logits.float().flatten(0, 1)
        return self.loss_class(logits, labels.flatten(), avg_factor=num_boxes)

    def calculate_bbox_loss(self, pred_boxes, targets, indices, num_boxes) -> Tensor:
        """Compute the L1 loss of boxes (B, N, 4) cxcywh."""
        pairs = _matched_boxes(pred_boxes.float(), targets, indices)
        return self.loss_bbox(*pairs, avg_factor=num_boxes)

    def calculate_giou_loss(self, pred_boxes, targets, indices, num_boxes) -> Tensor:
        """Compute the GIoU loss of boxes (B, N, 4) cxcywh."""
        pairs = _matched_boxes(pred_boxes.float(), targets, indices)
        return self.loss_giou(*map(box_cxcywh_to_xyxy, pairs), avg_factor=num_boxes)

    def forward(self, outputs, targets) -> dict[str, Tensor]:
        """Compute the losses; arguments and names as in :class:`SetCriterion`."""
        num_boxes = _average_num_boxes(targets, outputs["pred_logits"].device)
        target_lists = [[target[key] for target in targets] for key in ("labels", "boxes")]
        layers = {"": outputs}
        layers |= {f"_{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))}
        losses = {}
        for suffix, layer in layers.items():
            logits, boxes = layer["pred_logits"], layer["pred_boxes"]
            shared = (targets, self.matcher(logits, boxes, *target_lists), num_boxes)
            losses["loss_class" + suffix] = self.calculate_class_loss(logits, *shared)
            losses["loss_bbox" + suffix] = self.calculate_bbox_loss(boxes, *shared)
            losses["loss_giou" + suffix] = self.calculate_giou_loss(boxes, *shared)
        return losses
