"""DETR's set prediction loss with loss weights left to the detector."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from detrex.layers import box_cxcywh_to_xyxy
from detrex.layers.box_ops import _giou
from detrex.modeling.losses import sigmoid_focal_loss as _focal_loss
from detrex.utils import get_world_size, is_dist_avail_and_initialized

__all__ = ["SetCriterion", "sigmoid_focal_loss"]

_Indices = list[tuple[Tensor, Tensor]]
_LOSSES = {"class": "loss_labels", "boxes": "loss_boxes"}


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """Focal loss of logits (B, N, K), averaged over N, summed and divided by ``num_boxes``."""
    loss = _focal_loss(inputs, targets, None, alpha, gamma, reduction="none")
    return loss.mean(1).sum() / num_boxes


class SetCriterion(nn.Module):
    """Matches predictions with targets and computes their losses, unweighted.

    Args:
        num_classes: classes without the background, which has the label ``num_classes``.
        matcher: assigns queries to targets.
        weight_dict: weights of the losses by name, for the detector to apply.
        losses: ``"class"`` and ``"boxes"``, or one of them.
        eos_coef: weight of the background in the cross entropy.
        loss_class_type: ``"focal_loss"`` or ``"ce_loss"``.
        alpha: balance of positives and negatives in the focal loss.
        gamma: focus of the focal loss.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes,
        matcher,
        weight_dict,
        losses: list[str] = ["class", "boxes"],  # noqa: B006
        eos_coef: float = 0.1,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        assert loss_class_type in ("ce_loss", "focal_loss"), (
            f"SetCriterion: found loss_class_type {loss_class_type!r}, expected ce_loss, focal_loss"
        )
        self.num_classes, self.matcher = num_classes, matcher
        self.losses, self.weight_dict = losses, weight_dict
        self.loss_class_type, self.eos_coef = loss_class_type, eos_coef
        self.alpha, self.gamma = alpha, gamma
        if loss_class_type == "ce_loss":
            class_weights = torch.tensor([1.0] * num_classes + [eos_coef])
            self.register_buffer("empty_weight", class_weights)

    def loss_labels(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Compute ``loss_class``: cross entropy, or focal loss per box."""
        logits = outputs["pred_logits"].float()
        labels = _target_labels(logits, targets, indices, self.num_classes)
        if self.loss_class_type == "ce_loss":
            return {"loss_class": F.cross_entropy(logits.mT, labels, self.empty_weight)}
        one_hot = F.one_hot(labels, logits.shape[2] + 1)[..., :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, one_hot, num_boxes, self.alpha, self.gamma)
        return {"loss_class": loss * logits.shape[1]}

    def loss_boxes(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Compute ``loss_bbox`` (L1) and ``loss_giou``, both per box."""
        boxes, target_boxes = _matched_boxes(outputs["pred_boxes"].float(), targets, indices)
        giou = _giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return {
            "loss_bbox": F.l1_loss(boxes, target_boxes, reduction="sum") / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs) -> dict[str, Tensor]:
        """Compute the losses of one kind, ``"class"`` or ``"boxes"``."""
        assert loss in _LOSSES, f"SetCriterion: found loss {loss!r}, expected {list(_LOSSES)}"
        compute = getattr(self, _LOSSES[loss])
        return compute(outputs, targets, indices, num_boxes, **kwargs)

    def forward(self, outputs, targets, return_indices=False):
        """Match every decoder layer's predictions with the targets and compute their losses.

        Args:
            outputs: ``pred_logits`` (B, N, K), ``pred_boxes`` (B, N, 4) cxcywh and optionally
                ``aux_outputs``, a list of such dicts; the losses of the i-th end in ``_<i>``.
            targets: for each image ``labels`` (T,) and ``boxes`` (T, 4) cxcywh.
            return_indices: also return the assignments, the auxiliary ones first.
        """
        num_boxes = _average_num_boxes(targets, outputs["pred_logits"].device)
        layers = {"": {k: v for k, v in outputs.items() if k != "aux_outputs"}}
        layers |= {f"_{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))}
        losses, assignments = {}, []
        for suffix, layer in layers.items():
            indices = self.matcher(layer, targets)
            assignments.append(indices)
            for kind in self.losses:
                values = self.get_loss(kind, layer, targets, indices, num_boxes)
                losses |= {name + suffix: value for name, value in values.items()}
        if return_indices:
            return losses, [*assignments[1:], assignments[0]]
        return losses

    def _get_src_permutation_idx(self, indices: _Indices) -> tuple[Tensor, Tensor]:
        return _flat_index([queries for queries, _ in indices])

    def _get_tgt_permutation_idx(self, indices: _Indices) -> tuple[Tensor, Tensor]:
        return _flat_index([matched for _, matched in indices])

    def __repr__(self) -> str:
        fields = ["losses", "loss_class_type", "weight_dict", "num_classes"]
        fields += ["eos_coef", "alpha", "gamma"]
        lines = [f"{name}: {getattr(self, name)}" for name in fields]
        return "\n    ".join(
            [f"Criterion {type(self).__name__}", f"matcher: {self.matcher}", *lines]
        )


def _average_num_boxes(targets: list[dict[str, Tensor]], device: torch.device) -> float:
    """Boxes per process, at least 1."""
    count = float(sum(len(target["labels"]) for target in targets))
    if is_dist_avail_and_initialized():
        total = torch.tensor([count], device=device)
        dist.all_reduce(total)
        count = total.item() / get_world_size()
    return max(count, 1.0)


def _flat_index(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Index that picks, from a (B, N, ...) tensor, the entries that ``parts`` lists per image."""
    images = [torch.full_like(part, i) for i, part in enumerate(parts)]
    return torch.cat(images), torch.cat(parts)


def _matched(targets: list[dict[str, Tensor]], key: str, indices: _Indices) -> Tensor:
    """Concatenate the matched targets' labels or boxes."""
    return torch.cat([t[key][matched] for t, (_, matched) in zip(targets, indices, strict=True)])


def _target_labels(logits: Tensor, targets, indices: _Indices, background: int) -> Tensor:
    """Label of every query, (B, N)."""
    labels = logits.new_full(logits.shape[:2], background, dtype=torch.int64)
    labels[_flat_index([queries for queries, _ in indices])] = _matched(targets, "labels", indices)
    return labels


def _matched_boxes(boxes: Tensor, targets, indices: _Indices) -> tuple[Tensor, Tensor]:
    """Predicted and target boxes of all matches, row by row."""
    index = _flat_index([queries for queries, _ in indices])
    return boxes[index], _matched(targets, "boxes", indices).to(boxes.dtype)
